"""The checkpoint store under crashes and damage.

The oracle for atomicity is a crash at every call that touches the disk, one after the other: whatever the moment,
the folder's newest valid checkpoint is the old one or the new one, whole. For damage it is the file system: each
kind is made on purpose and must be named.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.training import checkpoint

CONTENT = {"state.ckpt": b"weights" * 50, "shards/rank0.pt": b"zero", "shards/deep/rank1.pt": b""}


def write(folder: Path, step: int) -> Path:
    temporary = checkpoint.temporary(folder, step)
    checkpoint.begin(temporary)
    for name, data in CONTENT.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(data)
    return checkpoint.publish(temporary, tokens=step * 10)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_published_checkpoint_is_whole_and_says_what_it_is(tmp_path: Path) -> None:
    final = write(tmp_path / "run" / "checkpoints", 100)
    assert final.name == "step-00000100"
    assert {name: (final / name).read_bytes() for name in CONTENT} == CONTENT
    expected = checkpoint.Manifest(step=100, tokens=1000, sequence=1, num_bytes=354)
    assert checkpoint.verify(final) == checkpoint.verify(final / checkpoint.STATE) == expected
    assert checkpoint.newest_valid(final.parent) == (final, [])


def test_no_folder_and_an_empty_one_hold_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "absent") == (None, [])
    assert checkpoint.newest_valid(tmp_path) == (None, [])


class Crash(BaseException):
    pass


def test_a_crash_at_any_moment_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls_left: int | None = None

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls_left
            if calls_left == 0:
                raise Crash
            calls_left = calls_left and calls_left - 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", crashing(os.fsync))
    for name in ("rename", "write_text", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, crashing(getattr(Path, name)))
    outcomes: list[str] = []
    while not outcomes or outcomes[-1] != "finished":
        folder = tmp_path / str(len(outcomes))
        old = write(folder, 100)
        checkpoint.temporary(folder, 50).mkdir()
        calls_left = len(outcomes)
        try:
            write(folder, 200)
            outcomes.append("finished")
        except Crash:
            newest, skipped = checkpoint.newest_valid(folder)
            assert newest is not None
            assert skipped == []
            outcomes.append(newest.name)
        calls_left = None
        assert checkpoint.verify(old).step == 100
        assert checkpoint.verify(write(folder, 300)).step == 300
        assert not list(folder.glob("*.tmp"))
    assert outcomes[0] == "step-00000100"
    assert outcomes[-2] == "step-00000200"
    assert len(outcomes) > 8


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    write(tmp_path, 1)
    temporary = str(checkpoint.temporary(tmp_path, 1))
    inside = {temporary, *(f"{temporary}/{name}" for name in [*CONTENT, "shards", "shards/deep"])}
    before = events[: events.index("rename")]
    assert set(before[:-2]) == inside
    assert before[-2:] == [f"{temporary}/manifest.json", temporary]
    assert events[events.index("rename") + 1 :] == [str(tmp_path)]


def alter_manifest(**fields: Any) -> Callable[[Path], Any]:
    def alter(path: Path) -> None:
        manifest = path / checkpoint.MANIFEST
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **fields}))

    return alter


def replace_by_link(path: Path) -> None:
    (path / "state.ckpt").rename(path.parent / "elsewhere.tmp")
    (path / "state.ckpt").symlink_to(path.parent / "elsewhere.tmp")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: os.truncate(path / "state.ckpt", 349), r"state\.ckpt has 349 bytes, expected 350"),
    "missing": (lambda path: (path / "shards/rank0.pt").unlink(), r"shards/rank0\.pt is missing, expected 4 bytes"),
    "flipped": (
        lambda path: flip_bit(path / "state.ckpt"),
        r"state\.ckpt has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}",
    ),
    "foreign file": (lambda path: (path / "notes").touch(), "notes is foreign, its manifest does not name it"),
    "link": (replace_by_link, r"state\.ckpt is a link or a device, expected a plain file"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing"),
    "cut manifest": (lambda path: os.truncate(path / "manifest.json", 40), r"manifest\.json is not JSON"),
    "other bytes": (lambda path: (path / "manifest.json").write_bytes(b"\xff"), r"manifest\.json is not ASCII text"),
    "no object": (lambda path: (path / "manifest.json").write_text("[]"), "has format 'list', expected 1"),
    "format": (alter_manifest(format=2), r"manifest\.json has format 2, expected 1"),
    "tokens": (alter_manifest(tokens=5), r"manifest\.json was altered: it names sha256 \w+, its content has \w+"),
    "sequence": (alter_manifest(sequence=9), r"manifest\.json was altered"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_run_falls_back(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    old, new = write(tmp_path, 100), write(tmp_path, 200)
    damage(new)
    with pytest.raises(ValueError, match=rf"^checkpoint .*step-00000200: .*{message}.*; resume from another one"):
        checkpoint.verify(new)
    newest, skipped = checkpoint.newest_valid(tmp_path)
    assert newest == old
    assert len(skipped) == 1
    assert str(skipped[0]).startswith(f"skipped checkpoint {new}: ")
    assert "\n" not in str(skipped[0])
    assert write(tmp_path, 200) == new
    assert checkpoint.newest_valid(tmp_path) == (new, [])


def test_a_renamed_checkpoint_is_not_valid(tmp_path: Path) -> None:
    renamed = write(tmp_path, 100).rename(tmp_path / "step-00000300")
    with pytest.raises(ValueError, match="the folder is named step-00000300, its manifest is of step 100"):
        checkpoint.verify(renamed)


def test_a_checkpoint_that_is_not_there_or_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoint.verify(tmp_path / "step-00000001")
    (tmp_path / "step-00000002").touch()
    with pytest.raises(ValueError, match="found a file, expected a folder"):
        checkpoint.verify(tmp_path / "step-00000002")


def test_other_things_in_the_folder_are_mentioned_and_temporary_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    checkpoint.temporary(tmp_path, 5).mkdir()
    newest, skipped = checkpoint.newest_valid(tmp_path)
    assert newest is None
    assert [item.reason for item in skipped] == ["found the name 'last.ckpt', expected step- and 8 digits"]


def test_newest_is_what_was_published_last_and_not_the_highest_step(tmp_path: Path) -> None:
    for step in (100, 300, 200):
        write(tmp_path, step)
    assert checkpoint.newest_valid(tmp_path)[0] == tmp_path / "step-00000200"
    checkpoint.retain(tmp_path, 2)
    assert names(tmp_path) == ["step-00000200", "step-00000300"]


def test_steps_beyond_eight_digits_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999)
    assert write(tmp_path, 100_000_000) == checkpoint.newest_valid(tmp_path)[0]


def test_retention_keeps_the_last_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    assert len(checkpoint.retain(tmp_path, 3)) == 1
    assert checkpoint.retain(tmp_path, 3) == []
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_retention_never_deletes_the_only_valid_checkpoint(tmp_path: Path) -> None:
    old, *newer = [write(tmp_path, step) for step in (1, 2, 3)]
    os.truncate(newer[0] / "state.ckpt", 3)
    flip_bit(newer[1] / "state.ckpt")
    assert checkpoint.retain(tmp_path, 1) == []
    assert checkpoint.newest_valid(tmp_path)[0] == old
    os.truncate(newer[1] / "state.ckpt", 3)
    assert checkpoint.retain(tmp_path, 1) == newer
    assert checkpoint.newest_valid(tmp_path) == (old, [])


def test_retention_leaves_alone_what_the_store_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "notes").touch()
    write(tmp_path, 2)
    assert checkpoint.retain(tmp_path, 1) == []
    assert names(tmp_path) == ["notes", "step-00000001", "step-00000002"]


def test_deletion_goes_through_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write(tmp_path, 1)
    write(tmp_path, 2)

    def crash(path: Path) -> None:
        raise Crash

    monkeypatch.setattr("shutil.rmtree", crash)
    with pytest.raises(Crash):
        checkpoint.retain(tmp_path, 1)
    monkeypatch.undo()
    assert not old.exists()
    assert checkpoint.newest_valid(tmp_path)[1] == []
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_folder_that_cannot_be_made_raises_an_os_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(FileExistsError, match="checkpoints"):
        checkpoint.begin(checkpoint.temporary(tmp_path / "checkpoints", 1))


def write_shards(folder: Path, *, ranks: int, zero_stage: int) -> Path:
    temporary = checkpoint.temporary(folder, 7)
    checkpoint.begin(temporary)
    (temporary / checkpoint.STATE).mkdir()
    (temporary / checkpoint.STATE / "shard").write_bytes(b"weights")
    return checkpoint.publish(temporary, tokens=70, ranks=ranks, zero_stage=zero_stage)


def test_a_checkpoint_says_how_it_is_sharded(tmp_path: Path) -> None:
    manifest = checkpoint.verify(write_shards(tmp_path, ranks=4, zero_stage=3))
    assert (manifest.ranks, manifest.zero_stage) == (4, 3)


@pytest.mark.parametrize(
    ("written", "run", "change"),
    [
        ((2, 3), (2, 3), ""),
        ((2, 0), (8, 0), ""),
        ((2, 3), (4, 3), "2 shards of ZeRO stage 3 become 4 shards of ZeRO stage 3"),
        ((2, 2), (1, 1), "2 shards of ZeRO stage 2 become 1 shard of ZeRO stage 1"),
    ],
)
def test_another_layout_of_shards_is_named(
    tmp_path: Path, written: tuple[int, int], run: tuple[int, int], change: str
) -> None:
    path = write_shards(tmp_path, ranks=written[0], zero_stage=written[1])
    assert checkpoint.check_layout(path, ranks=run[0], zero_stage=run[1]) == change
    assert checkpoint.layout(path) == written


@pytest.mark.parametrize(
    ("written", "run", "message"),
    [
        (
            (2, 3),
            (2, 0),
            "holds 2 shards of ZeRO stage 3, this run has a state that is not sharded: go on with or",
        ),
        (
            (1, 0),
            (2, 1),
            "holds a state that is not sharded, this run has 2 shards of ZeRO stage 1: go on with or",
        ),
    ],
)
def test_shards_are_not_made_of_a_state_that_has_none_nor_the_reverse(
    tmp_path: Path, written: tuple[int, int], run: tuple[int, int], message: str
) -> None:
    path = write_shards(tmp_path, ranks=written[0], zero_stage=written[1])
    with pytest.raises(ValueError, match=message):
        checkpoint.check_layout(path, ranks=run[0], zero_stage=run[1])
