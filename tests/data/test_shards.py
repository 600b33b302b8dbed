"""Oracle: NumPy over the plain files, and files that the test alters by hand."""

from __future__ import annotations

import gzip
import json
import lzma
import pickle
from pathlib import Path

import numpy as np
import pytest

from ds_lightning.data import Manifest, TokenShards, compression_baselines, prepare
from ds_lightning.data.shards import settings_sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"Text number {number}. " * 9)
    prepare([str(corpus)], tmp_path / "out", vocab_size=300, val_fraction=0.3, shard_tokens=300)
    return tmp_path / "out"


def test_reading_across_shards_is_slicing_the_joined_files(folder: Path) -> None:
    shards = TokenShards(folder)
    names = shards.manifest.splits["train"].shards
    assert len(names) > 3
    whole = np.concatenate([np.fromfile(folder / name, shards.manifest.dtype) for name in names])
    assert len(shards.train) == len(whole)
    for start, stop in [(0, 1), (0, 300), (299, 301), (300, 600), (3, 1000), (len(whole) - 2, len(whole) + 9), (7, 7)]:
        assert shards.train.read(start, stop).tolist() == whole[start:stop].tolist()
    assert shards.train.read(0, 5).dtype == np.int64


def test_a_stream_goes_to_another_process_without_its_tokens(folder: Path) -> None:
    stream = TokenShards(folder).train
    stream.read(0, 10)
    pickled = pickle.dumps(stream)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).read(0, 10).tolist() == stream.read(0, 10).tolist()


def test_a_truncated_shard_is_refused_whatever_the_verification(folder: Path) -> None:
    shard = folder / "train-00001.bin"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    for verify in ("size", "auto", "full"):
        with pytest.raises(ValueError, match=rf"train-00001.bin has {size - 2} bytes, expected {size}: delete"):
            TokenShards(folder, verify=verify)


@pytest.mark.parametrize(
    "name", ["train-00001.bin", "val-00000.bin", "val-documents.npy", "token_bytes.npy", "val.txt"]
)
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    TokenShards(folder, verify="size")
    with pytest.raises(ValueError, match=rf"{name} was altered: its SHA-256 is [0-9a-f]+, expected [0-9a-f]+: delete"):
        TokenShards(folder)


def test_hashing_is_left_out_above_the_limit_of_auto(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = folder / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr("ds_lightning.data.shards.FULL_VERIFY_BYTES", 1000)
    TokenShards(folder)
    with pytest.raises(ValueError, match="was altered"):
        TokenShards(folder, verify="full")


def test_another_tokenizer_is_found_even_when_only_sizes_are_compared(folder: Path) -> None:
    path = folder / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace("<|user|>", "<|usir|>"))
    with pytest.raises(ValueError, match=r"tokenizer.json has SHA-256 .* but the shards were made with the tokenizer"):
        TokenShards(folder, verify="size")


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "val-00000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"val-00000\.bin"):
        TokenShards(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest\.json"):
        TokenShards(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "splits": []}'])
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*: delete the folder and prepare it again"):
        TokenShards(folder)


def altered_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_of_another_format_is_refused(folder: Path) -> None:
    altered_manifest(folder, format_version=9)
    with pytest.raises(ValueError, match="has format version 9, expected 1: delete the folder and prepare it again"):
        TokenShards(folder)


def test_settings_changed_by_hand_are_found(folder: Path) -> None:
    altered_manifest(folder, settings={"seed": 3})
    with pytest.raises(ValueError, match=r"manifest.json was altered: its settings no longer have its settings_sha256"):
        TokenShards(folder)


def test_a_tokenizer_hash_changed_by_hand_is_found(folder: Path) -> None:
    altered_manifest(folder, tokenizer_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"the tokenizer that made the shards has SHA-256 0{64}, but the one"):
        TokenShards(folder)


def test_a_manifest_survives_being_written_and_read(folder: Path) -> None:
    manifest = Manifest.read(folder)
    (folder / "manifest.json").write_text(manifest.to_json())
    assert Manifest.read(folder) == manifest
    assert settings_sha256(dict(reversed(manifest.settings.items()))) == manifest.settings_sha256


def test_compression_baselines_are_what_the_standard_library_gives(folder: Path) -> None:
    text = Path(json.decoder.__file__).read_bytes()
    (folder / "val.txt").write_bytes(text)
    baselines = compression_baselines(folder)
    assert baselines["gzip_9"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text), abs=1e-9)
    expected = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert baselines["xz_9e"] == pytest.approx(expected, abs=1e-9)


def test_compression_needs_held_out_text(folder: Path) -> None:
    (folder / "val.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val.txt is empty, expected held-out text: prepare .* larger val_fraction"):
        compression_baselines(folder)
