"""Checkpoints on disk: folders that are either whole or not there.

A checkpoint is a folder ``step-00000100`` of any number of files beside its ``manifest.json``, which names every one of
them with size and sha256. It is written under a temporary name, synchronised to the disk, given its manifest last,
and renamed: whatever kills the process, a folder of that name is complete. A reader still verifies it, since
disks and people alter files later.

"Newest" is the one published last, by a sequence number and not by its step: whoever goes back to an earlier
checkpoint and trains on from there continues from what that run wrote, not from what the abandoned one left.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.ckpt"

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp"


class Manifest(NamedTuple):
    """What a verified checkpoint says of itself.

    Attributes:
        step: Optimizer steps completed.
        tokens: Tokens consumed by them.
        sequence: Position in the order of publication, from 1.
        num_bytes: Size of all files but the manifest.
        ranks: Processes that wrote it.
        zero_stage: How the state is sharded over them; 0: not at all, the state is one file.
    """

    step: int
    tokens: int
    sequence: int
    num_bytes: int
    ranks: int = 1
    zero_stage: int = 0


class Skipped(NamedTuple):
    """A folder that is no valid checkpoint, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"skipped checkpoint {self.path}: {self.reason}"


def rank_file(rank: int) -> str:
    """Return the name of the file in a checkpoint with what a rank has for itself: its random state."""
    return f"rank-{rank:05d}.ckpt"


def temporary(folder: Path, step: int) -> Path:
    """Return the name under which the checkpoint of ``step`` is written.

    Args:
        folder: Where the run keeps its checkpoints.
        step: Optimizer steps completed.
    """
    return folder / f"step-{step:08d}{_TEMPORARY}"


def begin(temporary: Path) -> None:
    """Make a temporary folder, empty; removes what interrupted saves left behind.

    Raises:
        OSError: If the folder cannot be made.
    """
    folder = temporary.parent
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"step-*{_TEMPORARY}"):
        _remove(leftover)
    temporary.mkdir()


def discard(temporary: Path) -> None:
    """Remove a temporary folder after a failed save; what cannot be removed is left to the next save."""
    shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, *, tokens: int, ranks: int = 1, zero_stage: int = 0) -> Path:
    """Make a filled temporary folder a checkpoint, in one atomic rename.

    Args:
        temporary: The folder that ``begin`` made, with the state in it.
        tokens: Tokens consumed by the steps completed.
        ranks: Processes that have written into it; all must be done.
        zero_stage: How the state is sharded over them.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: If a file cannot be written; the temporary folder is then left to ``discard``.
    """
    final = temporary.with_name(temporary.name.removesuffix(_TEMPORARY))
    match = _NAME.fullmatch(final.name)
    assert match, f"{temporary} is no temporary checkpoint folder"
    files = {name: _describe(path) for name, path in _files(temporary)}
    assert files, f"{temporary} is empty"
    body = {
        "format": FORMAT,
        "step": int(match[1]),
        "tokens": tokens,
        "sequence": max((_sequence(path) for path in _published(final.parent)), default=0) + 1,
        "ranks": ranks,
        "zero_stage": zero_stage,
        "files": files,
    }
    for path in [temporary, *temporary.rglob("*")]:
        _sync(path)
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({**body, "sha256": _self_hash(body)}, indent=1) + "\n", encoding="ascii")
    _sync(manifest)
    _sync(temporary)
    if final.exists():  # an invalid one, or the same step of an abandoned run: rename cannot replace a full folder
        _remove(final)
    temporary.rename(final)
    _sync(final.parent)
    return final


def verify(path: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Args:
        path: The checkpoint's folder, or the ``state.ckpt`` in it.

    Raises:
        ValueError: If anything is missing, too much, or differs: one line with the file, found and expected.
        OSError: If a file cannot be read.
    """
    if path.name == STATE:
        path = path.parent
    reason, manifest = _inspect(path, contents=True)
    if manifest is None:
        raise ValueError(f"checkpoint {path}: {reason}; resume from another one, or leave the choice to the run")
    return manifest


def layout(path: Path) -> tuple[int, int]:
    """Return how many processes wrote a verified checkpoint, and under which stage of ZeRO (0: none)."""
    manifest = _inspect(path, contents=False)[1]
    assert manifest is not None, f"{path} has not been verified"
    return manifest.ranks, manifest.zero_stage


def check_layout(path: Path, *, ranks: int, zero_stage: int) -> str:
    """Refuse a verified checkpoint that this run cannot go on from, and return what becomes of its shards.

    Args:
        path: The checkpoint's folder.
        ranks: Processes of the run.
        zero_stage: How the run shards its state; 0: not at all, whatever the number of ranks.

    Returns:
        What is done with them, in words; nothing where they stay as they are.

    Raises:
        ValueError: If the one is sharded and the other is not: one line with what to do.
    """
    ranks_before, stage_before = layout(path)
    before, now = _in_words(ranks_before, stage_before), _in_words(ranks, zero_stage)
    if (stage_before > 0) != (zero_stage > 0):
        raise ValueError(
            f"checkpoint {path} holds {before}, this run has {now}: go on with or without trainer.strategy "
            "ZeRO as it began, on any number of devices, or export it and start a run from its weights "
            "(model.init_args.weights)"
        )
    return "" if before == now else f"{before} become {now}"


def _in_words(ranks: int, zero_stage: int) -> str:
    if not zero_stage:
        return "a state that is not sharded"
    return f"{ranks} {'shard' if ranks == 1 else 'shards'} of ZeRO stage {zero_stage}"


def newest_valid(folder: Path) -> tuple[Path | None, list[Skipped]]:
    """Find the checkpoint to go on from.

    Args:
        folder: Where the run keeps its checkpoints; it need not exist.

    Returns:
        The valid checkpoint published last (None if there is none), and whatever else lies in the folder and was
        skipped on the way, with reasons. Temporary folders are not mentioned, older checkpoints not read.
    """
    if not folder.is_dir():
        return None, []
    candidates = set(_published(folder))
    skipped = [
        Skipped(path, f"found the name {path.name!r}, expected step- and 8 digits")
        for path in sorted(folder.iterdir())
        if path not in candidates and not path.name.endswith(_TEMPORARY)
    ]
    ordered = sorted(candidates, key=lambda path: (_sequence(path), path.name), reverse=True)
    newest = None
    for path in ordered:
        if newest is not None and _sequence(path) > 0:
            continue
        reason, manifest = _inspect(path, contents=True)
        if manifest is None:
            skipped.append(Skipped(path, reason))
        elif newest is None:
            newest = path
    return newest, skipped


def retain(folder: Path, keep_last: int) -> list[Path]:
    """Delete all checkpoints but those published last, never the only valid one.

    Nothing is deleted unless one of those kept verifies in full. Checkpoints with files missing or truncated do not
    count as kept, and go. A folder without a manifest of ours is not ours to delete.

    Args:
        folder: Where the run keeps its checkpoints.
        keep_last: Number of checkpoints to keep.

    Returns:
        The folders deleted.

    Raises:
        OSError: If a folder cannot be deleted.
    """
    assert keep_last >= 1
    whole = [path for path in _published(folder) if _inspect(path, contents=False)[1] is not None]
    kept = sorted(whole, key=_sequence, reverse=True)[:keep_last]
    if not any(_inspect(path, contents=True)[1] is not None for path in kept):
        return []
    doomed = [path for path in _published(folder) if path not in kept and _sequence(path) > 0]
    for path in doomed:
        _remove(path)
    return doomed


def _published(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Everything under a folder that is not itself a folder, by relative name; not the manifest."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if name != MANIFEST and (file.is_symlink() or not file.is_dir()):
            yield name, file


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _self_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("ascii")).hexdigest()


def _read_manifest(path: Path) -> tuple[str, dict[str, Any]]:
    """Return why a manifest cannot be used (or nothing), and its body."""
    if not path.exists():
        return "there is no such folder", {}
    try:
        text = (path / MANIFEST).read_text(encoding="ascii")
    except FileNotFoundError:
        return f"{MANIFEST} is missing", {}
    except NotADirectoryError:
        return "found a file, expected a folder", {}
    except UnicodeDecodeError:
        return f"{MANIFEST} is not ASCII text", {}
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        return f"{MANIFEST} is not JSON ({error})", {}
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        return f"{MANIFEST} has format {found!r}, expected {FORMAT}", {}
    expected = _self_hash({key: value for key, value in body.items() if key != "sha256"})
    if body.get("sha256") != expected:
        return f"{MANIFEST} was altered: it names sha256 {body.get('sha256')}, its content has {expected}", {}
    return "", body


def _sequence(path: Path) -> int:
    """Position in the order of publication; 0 where the manifest cannot be used."""
    return int(_read_manifest(path)[1].get("sequence", 0))


def _inspect(path: Path, *, contents: bool) -> tuple[str, Manifest | None]:
    """Compare a folder with its manifest: names and sizes, and the contents if asked for."""
    reason, body = _read_manifest(path)
    if reason:
        return reason, None
    if path.name != f"step-{body['step']:08d}":
        return f"the folder is named {path.name}, its manifest is of step {body['step']}", None
    found, expected = dict(_files(path)), body["files"]
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            return f"{name} is missing, expected {expected[name]['bytes']} bytes", None
        if name not in expected:
            return f"{name} is foreign, its manifest does not name it", None
        if found[name].is_symlink() or not found[name].is_file():
            return f"{name} is a link or a device, expected a plain file", None
        size = found[name].stat().st_size
        if size != expected[name]["bytes"]:
            return f"{name} has {size} bytes, expected {expected[name]['bytes']}", None
        if contents and (digest := _sha256(found[name])) != expected[name]["sha256"]:
            return f"{name} has sha256 {digest}, expected {expected[name]['sha256']}", None
    num_bytes = sum(entry["bytes"] for entry in expected.values())
    shape = body.get("ranks", 1), body.get("zero_stage", 0)
    return "", Manifest(body["step"], body["tokens"], body["sequence"], num_bytes, *shape)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a file or folder such that a process killed meanwhile leaves only a temporary name."""
    if not path.name.endswith(_TEMPORARY):
        path = path.rename(path.with_name(f"{path.name}.old{_TEMPORARY}"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
