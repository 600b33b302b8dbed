"""Prepared corpora on disk: a manifest, memory-mapped token streams, and the check that nothing was altered."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt16
from tokenizers import Tokenizer

from ds_lightning.data.tokenizer import END_OF_TEXT, PAD, load_tokenizer, special_id

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TOKEN_BYTES = "token_bytes.npy"
VAL_TEXT = "val.txt"

FULL_VERIFY_BYTES = 4 * 2**30
"""Size up to which ``verify="auto"`` reads and hashes everything."""

Verify = Literal["auto", "size", "full"]
SplitName = Literal["train", "val"]


@dataclass(frozen=True)
class Split:
    """One part of a prepared corpus."""

    documents: int
    tokens: int
    """Length of the stream: an end-of-text token, then each document with an end-of-text token after it."""
    bytes: int
    """UTF-8 bytes of the documents."""
    fim_documents: int
    """Documents rearranged for fill-in-the-middle."""
    shards: list[str]
    """Files of the stream, in order."""


@dataclass(frozen=True)
class FileFact:
    """What a file of the folder must look like."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and how it was made; written last, as ``manifest.json``."""

    format_version: int
    settings: dict[str, Any]
    """Everything that decides the contents: another value of any of these is another corpus."""
    settings_sha256: str
    dtype: str
    """NumPy type of the tokens on disk, little endian."""
    vocab_size: int
    """Largest token id plus 1."""
    eos_id: int
    pad_id: int
    tokenizer_sha256: str
    splits: dict[str, Split]
    skipped_bad_utf8: list[str]
    skipped_empty: int
    files: dict[str, FileFact]
    overlong: int = 0
    """Conversations longer than a row, cut or skipped; documents have no limit."""

    def to_json(self) -> str:
        """Return the text of ``manifest.json``."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a prepared folder.

        Raises:
            ValueError: If it is damaged or of another format version.
            FileNotFoundError: If there is none.
        """
        path = Path(folder) / MANIFEST
        text = path.read_text(encoding="utf-8")
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version == FORMAT_VERSION:
                values["splits"] = {name: Split(**split) for name, split in values["splits"].items()}
                values["files"] = {name: FileFact(**fact) for name, fact in values["files"].items()}
                manifest = cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete the folder and prepare it again") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, expected {FORMAT_VERSION}: delete the folder and prepare it "
                "again"
            )
        if manifest.settings_sha256 != settings_sha256(manifest.settings):
            raise ValueError(f"{path} was altered: its settings no longer have its settings_sha256; prepare it again")
        return manifest


def write_manifest(folder: Path, *, settings: dict[str, Any], **facts: Any) -> Manifest:
    """Synchronise every file of a folder to the disk, and write the manifest that names them last.

    Args:
        folder: With everything in it, the tokenizer too.
        settings: What decides the contents.
        facts: The other fields of :class:`Manifest`.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = FileFact(path.stat().st_size, file_sha256(path))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        settings=settings,
        settings_sha256=settings_sha256(settings),
        tokenizer_sha256=files[TOKENIZER].sha256,
        files=files,
        **facts,
    )
    with (folder / MANIFEST).open("w", encoding="utf-8") as manifest_file:
        manifest_file.write(manifest.to_json())
        manifest_file.flush()
        os.fsync(manifest_file.fileno())
    return manifest


class TokenStream:
    """The tokens of one split as one long array, read from memory-mapped shards as needed.

    It opens the files on first use in each process, so it can be handed to worker processes.
    """

    def __init__(self, folder: str | Path, split: Split, dtype: str, offsets_file: str) -> None:
        self._paths = [Path(folder) / name for name in split.shards]
        self._offsets_path = Path(folder) / offsets_file
        self._dtype = np.dtype(dtype)
        self._length = split.tokens

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_shards", "_starts")}

    @functools.cached_property
    def _shards(self) -> list[np.memmap[Any, np.dtype[Any]]]:
        return [np.memmap(path, dtype=self._dtype, mode="r") for path in self._paths]

    @functools.cached_property
    def _starts(self) -> list[int]:
        ends = np.cumsum([0] + [len(shard) for shard in self._shards])
        return [int(end) for end in ends[:-1]]

    def read(self, start: int, stop: int) -> Int64[np.ndarray, " tokens"]:
        """Return the tokens from ``start`` to before ``stop``; what lies past the end is left out."""
        parts = [
            shard[max(0, start - first) : max(0, stop - first)]
            for first, shard in zip(self._starts, self._shards, strict=True)
            if first < stop and start < first + len(shard)
        ]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def document_offsets(self) -> Int64[np.ndarray, " documents_and_end"]:
        """Return where each document begins in the stream, and after the last one the length of the stream."""
        offsets: np.ndarray = np.load(self._offsets_path, allow_pickle=False)
        return offsets


class TokenShards:
    """A prepared corpus, opened and verified.

    Args:
        folder: What :func:`ds_lightning.data.preparation.prepare` made.
        verify: ``size`` compares the sizes of all files, ``full`` their SHA-256 too; ``auto`` is ``full`` up to
            :data:`FULL_VERIFY_BYTES`. The tokenizer's SHA-256 is always compared.

    Raises:
        ValueError: If a file is not what the manifest says; the message names the file, both values and the remedy.
        FileNotFoundError: If the folder or a file is missing.
    """

    def __init__(self, folder: str | Path, *, verify: Verify = "auto") -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        verify_files(self.folder, self.manifest, verify)
        self.train = self._stream("train")
        self.val = self._stream("val")

    def _stream(self, name: SplitName) -> TokenStream:
        return TokenStream(self.folder, self.manifest.splits[name], self.manifest.dtype, offsets_file(name))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards."""
        return load_tokenizer(self.folder / TOKENIZER)

    @functools.cached_property
    def token_bytes(self) -> UInt16[np.ndarray, " vocab"]:
        """Bytes of text each token id stands for; special tokens 0."""
        lengths: np.ndarray = np.load(self.folder / TOKEN_BYTES, allow_pickle=False)
        return lengths


def verify_files(folder: Path, manifest: Manifest, verify: Verify = "auto") -> None:
    """Compare the files of a prepared folder with its manifest; see :class:`TokenShards` for what is raised."""
    full = verify == "full" or (
        verify == "auto" and sum(fact.bytes for fact in manifest.files.values()) <= FULL_VERIFY_BYTES
    )
    remedy = "delete the folder and prepare it again"
    if TOKENIZER not in manifest.files or manifest.files[TOKENIZER].sha256 != manifest.tokenizer_sha256:
        raise ValueError(
            f"{folder / MANIFEST}: the tokenizer that made the shards has SHA-256 {manifest.tokenizer_sha256}, but the "
            f"one listed is another: {remedy}"
        )
    for name, fact in manifest.files.items():
        path = folder / name
        size = path.stat().st_size
        if size != fact.bytes:
            raise ValueError(f"{path} has {size} bytes, expected {fact.bytes}: {remedy}")
        if full or name == TOKENIZER:
            found = file_sha256(path)
            if found != fact.sha256 and name == TOKENIZER:
                raise ValueError(
                    f"{path} has SHA-256 {found}, but the shards were made with the tokenizer {fact.sha256}: put that "
                    f"one back, or {remedy}"
                )
            if found != fact.sha256:
                raise ValueError(f"{path} was altered: its SHA-256 is {found}, expected {fact.sha256}: {remedy}")


def offsets_file(split: SplitName) -> str:
    """Return the name of the file with the document offsets of a split."""
    return f"{split}-documents.npy"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_sha256(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def compression_baselines(folder: str | Path) -> dict[str, float]:
    """Return what general compressors reach on the held-out text, each in one stream over ``val.txt``.

    Returns:
        Bits per byte of ``gzip_9`` and ``xz_9e``: what a model's validation bits per byte stand beside.

    Raises:
        ValueError: If no text was held out.
    """
    path = Path(folder) / VAL_TEXT
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty, expected held-out text: prepare the corpus with a larger val_fraction")
    wbits = 16 + zlib.MAX_WBITS  # 16 asks zlib for a gzip header
    gzip_stream = zlib.compressobj(9, zlib.DEFLATED, wbits)
    xz_stream = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    gzip_bytes = xz_bytes = 0
    with path.open("rb") as text:
        while chunk := text.read(2**20):
            gzip_bytes += len(gzip_stream.compress(chunk))
            xz_bytes += len(xz_stream.compress(chunk))
    gzip_bytes += len(gzip_stream.flush())
    xz_bytes += len(xz_stream.flush())
    return {"gzip_9": 8 * gzip_bytes / size, "xz_9e": 8 * xz_bytes / size}


def eos_and_pad(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of the end-of-text and of the padding token."""
    return special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, PAD)
