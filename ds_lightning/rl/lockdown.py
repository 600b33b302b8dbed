"""What a scoring process gives up before it sees a completion: files, network, processes, memory.

Four independent layers, each put on where the system has it. None needs root:

1. resource limits: memory, file size, open files, CPU seconds a call, core dumps;
2. Landlock (Linux 5.13): the kernel refuses every path but the ones listed, and from 6.12 signals to others;
3. a network namespace of its own, where user namespaces are permitted: there is no interface in it;
4. a seccomp filter (Linux, x86_64 and aarch64): no sockets, no new processes or programs, no signals to others.

An audit hook is the last one: it refuses the same from within Python, with a message that names what was tried, and is
all there is on other systems. Native code could go round it. Imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence
from typing import Any

LAYERS = ("limits", "landlock", "network namespace", "seccomp", "audit hook")

_MIB = 1 << 20
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def lock_down(
    folder: str,
    readable: Sequence[str],
    listable: Sequence[str],
    *,
    memory_mib: int,
    file_mib: int,
    open_files: int,
    layers: Sequence[str],
) -> list[str]:
    """Give up what scoring does not need, for good, and return the layers that are active.

    Args:
        folder: The only place where files may be written.
        readable: Further files and folders that may be read.
        listable: Further folders in which names may be looked up, as imports do.
        memory_mib: Address space.
        file_mib: Size of a file.
        open_files: File descriptors.
        layers: Those of :data:`LAYERS` to put on where possible.
    """
    active = []
    if "limits" in layers:
        _set_limits(memory_mib, file_mib, open_files)
        active.append("limits")
    libc = _libc() if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if "network namespace" in layers and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
            active.append("network namespace")
        if "landlock" in layers and _restrict_paths(libc, folder, readable, listable):
            active.append("landlock")
        if "seccomp" in layers and _filter_system_calls(libc):
            active.append("seccomp")
    if "limits" in layers and "seccomp" not in active:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if "audit hook" in layers:
        native = {"landlock", "seccomp"} <= set(active)
        sys.addaudithook(_audit_hook(os.path.realpath(folder), [*map(os.path.realpath, readable)], native=native))
        active.append("audit hook")
    return active


def _set_limits(memory_mib: int, file_mib: int, open_files: int) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, memory_mib * _MIB),
        (resource.RLIMIT_FSIZE, file_mib * _MIB),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def limit_cpu(seconds: float) -> None:
    """Let the kernel end this process after so many more CPU seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


# Landlock: linux/landlock.h

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15  # truncate, ioctl
_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # from 5 on: 16


def _restrict_paths(libc: Any, folder: str, readable: Sequence[str], listable: Sequence[str]) -> bool:
    abi = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    every = (1 << _RIGHTS_OF_ABI.get(abi, 16)) - 1
    # file rights, network rights (TCP bind and connect), scopes (abstract sockets, signals)
    attributes = struct.pack("QQQ", every, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes[:size], ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    reading = _EXECUTE | _READ_FILE | _READ_DIR
    devices = [(path, _READ_FILE | _WRITE_FILE) for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")]
    places = [(path, reading) for path in readable] + [(path, _READ_DIR) for path in listable]
    for path, rights in [(folder, every), *devices, *places]:
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # what is not there needs no rule
            continue
        allowed = rights & every if os.path.isdir(path) else rights & every & _FILE_RIGHTS
        rule = struct.pack("=Qi", allowed, parent)
        failed = libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(parent)
        if failed:
            os.close(ruleset)
            return False
    restricted: bool = libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


# seccomp: linux/seccomp.h, linux/filter.h. Numbers of system calls: (x86_64, aarch64), None where there is none.

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # network, and memory or queues that outlive a process
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206),
    "sendmsg": (46, 211), "accept4": (288, 242), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "memfd_create": (319, 279), "io_uring_setup": (425, 425),
    # processes, programs and signals
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "ptrace": (101, 117), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setsid": (112, 157), "setpgid": (109, 154),
    "setpriority": (141, 140), "setrlimit": (160, 164), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    # what belongs to a file but is not its content: Landlock lets it pass
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "mknod": (133, None), "mknodat": (259, 33),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # the system as a whole, for those who are root
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "reboot": (169, 142), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "swapon": (167, 224), "sethostname": (170, 161), "syslog": (103, 116),
    "quotactl": (179, 60), "acct": (163, 89),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_CLONE_THREAD = 0x10000
_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_MORE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # in struct seccomp_data; arguments have 8 bytes, the low half first


def _program(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """Return the filter as (code, jump if true, jump if false, value)."""
    refuse = (_RETURN, 0, 0, _ERRNO | _EPERM)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_MORE, 0, 1, 0x40000000),  # the x32 numbers of x86_64
        refuse,
    ]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            program += [(_JUMP_EQUAL, 0, 1, number), refuse]
    # glibc falls back from clone3, whose flags a filter cannot see, to clone, where threads may pass
    program += [(_JUMP_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    program += [(_JUMP_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _ARGUMENTS)]
    program += [(_JUMP_SET, 1, 0, _CLONE_THREAD), refuse, (_LOAD, 0, 0, _NUMBER)]
    # of limits, this process may read its own and set that of CPU time
    program += [(_JUMP_EQUAL, 0, 10, _PRLIMIT[column]), (_LOAD, 0, 0, _ARGUMENTS), (_JUMP_EQUAL, 1, 0, 0), refuse]
    program += [(_LOAD, 0, 0, _ARGUMENTS + 8), (_JUMP_EQUAL, 5, 0, resource.RLIMIT_CPU)]
    program += [(_LOAD, 0, 0, _ARGUMENTS + 16), (_JUMP_EQUAL, 0, 2, 0), (_LOAD, 0, 0, _ARGUMENTS + 20)]
    program += [(_JUMP_EQUAL, 1, 0, 0), refuse]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _filter_system_calls(libc: Any) -> bool:
    if platform.machine() not in _ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    program = _program(*_ARCHITECTURES[platform.machine()])
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    filtered: bool = libc.prctl(22, 2, header, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    return filtered


_REFUSED_EVENTS = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.",
    "os.startfile", "signal.pthread_kill", "shutil.chown", "resource.prlimit",
    "syslog.", "webbrowser.",
)  # fmt: skip
_PATHS_OF_EVENTS = {
    "os.chmod": 1, "os.chown": 1, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1,
    "os.symlink": 2, "os.truncate": 1, "os.utime": 1, "os.setxattr": 1, "os.removexattr": 1, "os.chflags": 1,
}  # fmt: skip
_READING = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


def _audit_hook(folder: str, readable: Sequence[str], *, native: bool) -> Any:
    """Return a hook that refuses what the other layers refuse.

    Args:
        folder: Where files may be written.
        readable: Where files may be read besides.
        native: Whether native libraries may be loaded: not where the hook is all there is.
    """
    realpath, fsdecode = os.path.realpath, os.fsdecode
    refused = _REFUSED_EVENTS if native else (*_REFUSED_EVENTS, "ctypes.dlopen", "ctypes.dlsym")

    def beyond(path: Any, *folders: str) -> bool:
        if isinstance(path, int) or path is None:
            return False
        real = realpath(fsdecode(path))
        return not any(real == place or real.startswith(place + os.sep) for place in folders)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if beyond(path, folder, "/dev/null") and (flags & ~_READING or beyond(path, *readable)):
                raise PermissionError(f"scoring may not open {path!r}")
        elif event in _PATHS_OF_EVENTS:
            if any(beyond(path, folder) for path in arguments[: _PATHS_OF_EVENTS[event]]):
                raise PermissionError(f"scoring may not change {arguments[0]!r} ({event})")
        elif event.startswith(refused):
            raise PermissionError(f"scoring may not do {event}")

    return hook
