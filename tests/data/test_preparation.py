"""Oracle: the documents decoded from the stream, and a plain Python rearrangement of the same texts."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from ds_lightning.data import TokenShards, TokenStream, prepare, train_tokenizer
from ds_lightning.data.corpus import Document
from ds_lightning.data.preparation import fim_pieces, is_held_out, name_hash
from ds_lightning.data.tokenizer import END_OF_TEXT, FIM_BEGIN, FIM_END, FIM_HOLE

HOSTILE = {
    "empty.txt": "",
    "spaces.txt": " \t\n\n  ",
    "special.txt": f"a {END_OF_TEXT} b {FIM_HOLE} </think>",
    "giant_line.txt": "abc " * 20_000,
    "surrogates.txt": "\U0001f600 \ud7ff e\u0301 \x00",
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"doc{number:02d}.txt").write_text(f"Document {number} says: " + "some words, " * (number % 7 + 1))
    for name, text in HOSTILE.items():
        (folder / name).write_bytes(text.encode())
    return folder


def documents(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    offsets = stream.document_offsets().tolist()
    eos = tokenizer.token_to_id(END_OF_TEXT)
    texts = []
    assert offsets[0] == 1
    assert offsets[-1] == len(stream)
    assert stream.read(0, 1).tolist() == [eos]
    for start, stop in pairwise(offsets):
        tokens = stream.read(start, stop).tolist()
        assert tokens[-1] == eos
        assert eos not in tokens[:-1]
        texts.append(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
    return texts


@pytest.mark.parametrize("shard_tokens", [2**20, 97])
def test_every_document_is_in_one_split_once_and_comes_back(corpus: Path, tmp_path: Path, shard_tokens: int) -> None:
    manifest = prepare(
        [str(corpus)], tmp_path / "out", vocab_size=300, val_fraction=0.2, seed=1, shard_tokens=shard_tokens
    )
    shards = TokenShards(tmp_path / "out")
    found = {"train": documents(shards.train, shards.tokenizer), "val": documents(shards.val, shards.tokenizer)}
    for name in ("train", "val"):
        expected = [
            (name_hash(1, path.name, b"order"), path.read_bytes().decode())
            for path in corpus.iterdir()
            if is_held_out(1, path.name, 0.2) == (name == "val") and path.stat().st_size
        ]
        assert found[name] == [text for _, text in sorted(expected)]
        assert manifest.splits[name].documents == len(expected)
        assert manifest.splits[name].bytes == sum(len(text.encode()) for _, text in expected)
        assert manifest.splits[name].tokens == sum(
            np.fromfile(tmp_path / "out" / shard, "<u2").size for shard in manifest.splits[name].shards
        )
    assert (tmp_path / "out/val.txt").read_bytes().decode() == "".join(found["val"])
    assert manifest.skipped_empty == 1
    assert 3 < len(found["val"]) < 30
    if shard_tokens == 97:
        assert len(manifest.splits["train"].shards) > 3


def test_the_held_out_tokens_spell_the_bytes_of_the_held_out_text(corpus: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], tmp_path / "out", vocab_size=300, val_fraction=0.3)
    shards = TokenShards(tmp_path / "out")
    predicted = shards.val.read(1, len(shards.val))
    assert int(shards.token_bytes[predicted].sum(dtype=np.int64)) == (tmp_path / "out/val.txt").stat().st_size


def test_fill_in_the_middle_rearranges_training_documents_at_the_rate(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare([str(corpus)], tmp_path / "out", vocab_size=300, val_fraction=0.2, fim_rate=0.5, seed=2)
    shards = TokenShards(tmp_path / "out")
    tokenizer = shards.tokenizer
    rearranged = 0
    texts = {path.read_bytes().decode() for path in corpus.iterdir()}
    pattern = re.escape(FIM_BEGIN) + "(.*)" + re.escape(FIM_HOLE) + "(.*)" + re.escape(FIM_END) + "(.*)"
    markers = {tokenizer.token_to_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)}
    offsets = shards.train.document_offsets().tolist()
    for text, start, stop in zip(documents(shards.train, tokenizer), offsets[:-1], offsets[1:], strict=True):
        if markers & set(shards.train.read(start, stop).tolist()):
            rearranged += 1
            matched = re.fullmatch(pattern, text, re.DOTALL)
            assert matched is not None
            prefix, suffix, middle = matched.groups()
            assert prefix + middle + suffix in texts
        else:
            assert text in texts
    assert rearranged == manifest.splits["train"].fim_documents
    assert 0.25 < rearranged / manifest.splits["train"].documents < 0.75
    assert manifest.splits["val"].fim_documents == 0
    assert not markers & set(shards.val.read(0, len(shards.val)).tolist())


def test_fim_cuts_are_uniform_and_chosen_at_the_rate() -> None:
    pieces = [fim_pieces("0123456789", 0, str(number), 0.3) for number in range(4000)]
    chosen = [piece for piece in pieces if piece is not None]
    assert abs(len(chosen) / 4000 - 0.3) < 0.03
    assert all("".join(piece) == "0123456789" for piece in chosen)
    cuts = np.bincount([len(prefix) for prefix, _, _ in chosen] + [10 - len(end) for _, _, end in chosen])
    assert len(cuts) == 11
    assert np.all(np.abs(cuts / cuts.sum() - 1 / 11) < 0.03)


def test_two_preparations_are_the_same_file_for_file(corpus: Path, tmp_path: Path) -> None:
    one, two = (prepare([str(corpus)], tmp_path / name, vocab_size=350, fim_rate=0.2) for name in ("one", "two"))
    assert one == two


def test_documents_are_held_out_at_the_rate_and_by_the_seed() -> None:
    one, two = ([is_held_out(seed, str(number), 0.3) for number in range(4000)] for seed in (0, 1))
    assert abs(sum(one) / 4000 - 0.3) < 0.03
    assert abs(sum(both == (True, True) for both in zip(one, two, strict=True)) / 4000 - 0.09) < 0.02


def test_the_tokenizer_learns_nothing_from_held_out_documents(corpus: Path, tmp_path: Path) -> None:
    held_out = next(path for path in corpus.iterdir() if is_held_out(0, path.name, 0.3))
    held_out.write_text("zyzzyva " * 1000)
    prepare([str(corpus)], tmp_path / "out", vocab_size=300, val_fraction=0.3)
    assert not any("zy" in token for token in TokenShards(tmp_path / "out").tokenizer.get_vocab())


def test_a_long_document_is_encoded_in_pieces_and_comes_back(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds_lightning.data.preparation.PIECE_CHARACTERS", 50)
    monkeypatch.setattr("ds_lightning.data.preparation.BATCH_CHARACTERS", 500)
    lines = "a line of text:\n" * 100
    (corpus / "long.txt").write_text(lines)
    prepare([str(corpus)], tmp_path / "out", vocab_size=300, val_fraction=0.2)
    shards = TokenShards(tmp_path / "out")
    found = documents(shards.train, shards.tokenizer) + documents(shards.val, shards.tokenizer)
    assert sorted(found) == sorted(path.read_bytes().decode() for path in corpus.iterdir() if path.stat().st_size)
    start, stop = list(pairwise(shards.train.document_offsets().tolist()))[found.index(lines)]
    assert shards.train.read(start, stop - 1).tolist() == shards.tokenizer.encode(lines).ids, "cut inside a line"


def test_a_large_vocabulary_takes_four_bytes_a_token(corpus: Path, tmp_path: Path) -> None:
    description = json.loads(train_tokenizer([Document("a", "x y z")], 300).to_str())
    description["model"]["vocab"]["zzzz"] = 70_000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    manifest = prepare([str(corpus)], tmp_path / "out", tokenizer=str(path), vocab_size=70_001)
    assert (manifest.dtype, manifest.vocab_size) == ("<u4", 70_001)
    shards = TokenShards(tmp_path / "out")
    assert " \t\n\n  " in documents(shards.train, shards.tokenizer) + documents(shards.val, shards.tokenizer)


def test_the_same_settings_reuse_the_folder_without_reading_the_corpus(corpus: Path, tmp_path: Path) -> None:
    first = prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    for path in corpus.iterdir():
        path.unlink()
    stamp = (tmp_path / "out/train-00000.bin").stat().st_mtime_ns
    assert prepare([str(corpus)], tmp_path / "out", vocab_size=300) == first
    assert (tmp_path / "out/train-00000.bin").stat().st_mtime_ns == stamp


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_settings_are_refused_and_nothing_is_overwritten(corpus: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    before = snapshot(tmp_path)
    message = r"prepared with seed 0 \(this run: 4\), vocab_size 300 \(this run: 400\): choose another folder, delete"
    with pytest.raises(ValueError, match=message):
        prepare([str(corpus)], tmp_path / "out", vocab_size=400, seed=4)
    assert snapshot(tmp_path) == before


def test_a_tokenizer_other_than_the_one_of_the_shards_is_refused(corpus: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    train_tokenizer([Document("a", "x y z")], 300).save(str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match=r"prepared with tokenizer_sha256 None \(this run: '[0-9a-f]{64}'\)"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=300, tokenizer=str(tmp_path / "other.json"))


def test_a_folder_of_something_else_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus holds no manifest\.json, expected a prepared corpus or nothing"):
        prepare([str(corpus)], corpus, vocab_size=300)


def test_an_empty_folder_is_filled(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    TokenShards(tmp_path / "out", verify="full")


class FullDisk(io.FileIO):
    """A file that takes a hundred bytes and then has no space left."""

    def write(self, data: bytes) -> int:  # type: ignore[override]  # bytes are what it is given
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("full", ["tokens.tmp", "val.tmp", "train-00000.bin", "val.txt"])
def test_a_full_disk_leaves_nothing_behind(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    real_open = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", **kwargs: str) -> object:
        if path.name == full and mode == "wb":
            return FullDisk(path, "w")
        return real_open(path, mode, **kwargs)  # type: ignore[call-overload]  # passes on what it was given

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=300, val_fraction=0.3)
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_disk_that_is_full_at_the_last_sync_leaves_nothing_behind(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_process_that_was_quicker_with_the_same_settings_is_not_overwritten(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_rename = Path.rename

    def rename_second(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", real_rename)
        prepare([str(corpus)], tmp_path / "out", vocab_size=300)
        return real_rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_second)
    manifest = prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    assert manifest == TokenShards(tmp_path / "out").manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_an_error_in_the_corpus_leaves_no_folder(corpus: Path, tmp_path: Path) -> None:
    (corpus / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin1.txt is not UTF-8: byte 0xe9 at offset 3"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    manifest = prepare([str(corpus)], tmp_path / "out", vocab_size=300, on_bad_utf8="skip")
    assert manifest.skipped_bad_utf8 == [f"{corpus / 'latin1.txt'}, byte 3"]


def test_a_tokenizer_that_changes_the_text_is_refused(corpus: Path, tmp_path: Path) -> None:
    description = json.loads(train_tokenizer([Document("a", "x y z")], 300).to_str())
    description["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"the document .* has \d+ bytes, but its tokens spell \d+: the tokenizer is"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=str(path))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer([Document("a", "x y z")], 300).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer.json has \d+ ids .*expected at most vocab_size \(260\)"):
        prepare([str(corpus)], tmp_path / "out", tokenizer=str(path), vocab_size=260)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction is 1.0, expected at least 0 and less than 1"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1, expected"),
        ({"fim_rate": 1.5}, "fim_rate is 1.5, expected 0 to 1"),
        ({"vocab_size": 100}, "vocab_size is 100, expected at least"),
    ],
)
def test_settings_out_of_range_are_refused(
    corpus: Path, tmp_path: Path, setting: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare([str(corpus)], tmp_path / "out", **setting)  # type: ignore[arg-type]  # one of several numbers
