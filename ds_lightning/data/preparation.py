"""From a corpus to a prepared folder: tokenizer, shuffled token shards, held-out text, manifest."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from ds_lightning.data.corpus import Corpus, Document, OnBadUtf8
from ds_lightning.data.shards import (
    MANIFEST,
    TOKEN_BYTES,
    TOKENIZER,
    VAL_TEXT,
    Manifest,
    Split,
    SplitName,
    eos_and_pad,
    offsets_file,
    verify_files,
    write_manifest,
)
from ds_lightning.data.tokenizer import (
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    SPECIAL_TOKENS,
    load_tokenizer,
    num_ids,
    special_id,
    token_bytes,
    tokenizer_sha256,
    train_tokenizer,
)

SHARD_TOKENS = 2**27
"""Tokens of one shard file."""

BATCH_CHARACTERS = 2**22
"""Text encoded at once."""

PIECE_CHARACTERS = 2**20
"""Longest text given to the encoder in one call; longer documents are cut, after a line end where there is one."""

_MARKUP = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


def prepare(
    sources: Sequence[str],
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 8192,
    val_fraction: float = 0.02,
    fim_rate: float = 0.0,
    on_bad_utf8: OnBadUtf8 = "error",
    text_key: str = "text",
    markup: bool = False,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Turn a corpus into token shards, or reuse what the same settings made before.

    Everything is written to a temporary folder beside ``folder`` and renamed when complete. Whether a document is
    held out, where in the order it stands and how it is rearranged are functions of the seed and its name alone.

    Args:
        sources: What to read; see :class:`ds_lightning.data.corpus.Corpus`.
        folder: Where the prepared corpus goes.
        tokenizer: Path of a ``tokenizer.json``; none: one is trained on the training documents.
        vocab_size: Ids of a trained tokenizer; the most that a given one may have.
        val_fraction: Part of the documents that is held out, in [0, 1).
        fim_rate: Part of the training documents rearranged to prefix, suffix, middle (DeepSeek-V3, arXiv:2412.19437,
            section 4.1, uses 0.1), in [0, 1].
        on_bad_utf8: Whether text that is not UTF-8 is an error or is skipped and listed in the manifest.
        text_key: Key or column of the text in JSON lines, Parquet and datasets.
        markup: Whether text that spells a special token encodes to it: for conversations rendered by a chat template.
        seed: Of the split, the order and the rearrangement.
        shard_tokens: Tokens of one shard file.

    Returns:
        The manifest of the folder.

    Raises:
        ValueError: If the corpus, the tokenizer or a setting will not do, or if ``folder`` was prepared with others.
        OSError: If the file system refuses, a full disk for one; ``folder`` is then as it was.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and less than 1")
    if not 0 <= fim_rate <= 1:
        raise ValueError(f"fim_rate is {fim_rate}, expected 0 to 1")
    folder = Path(folder)
    settings: dict[str, Any] = {
        "sources": list(sources),
        "tokenizer_sha256": tokenizer_sha256(tokenizer) if tokenizer else None,
        "vocab_size": vocab_size,
        "val_fraction": val_fraction,
        "fim_rate": fim_rate,
        "on_bad_utf8": on_bad_utf8,
        "text_key": text_key,
        "seed": seed,
    } | ({"markup": True} if markup else {})
    corpus = Corpus(sources, text_key=text_key, on_bad_utf8=on_bad_utf8)
    return publish(folder, settings, lambda made: _Writer(made, settings, shard_tokens).run(corpus, tokenizer))


def publish(folder: Path, settings: dict[str, Any], write: Callable[[Path], Manifest]) -> Manifest:
    """Return what the same settings made before, or write a temporary folder and rename it when complete.

    Whatever happens, the temporary folder does not stay.

    Raises:
        ValueError: If ``folder`` was prepared with other settings.
        OSError: If the file system refuses.
    """
    if (ready := _reuse(folder, settings)) is not None:
        return ready
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        # mkdtemp is private to the user; a prepared corpus has the permissions of any other folder.
        temporary.chmod(folder.parent.stat().st_mode & 0o777)
        manifest = write(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process may have been quicker with the same settings; anything else it left is an error.
            if (ready := _reuse(folder, settings)) is None:
                raise
            return ready
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _reuse(folder: Path, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a folder prepared with these settings, None where there is no folder yet."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds no {MANIFEST}, expected a prepared corpus or nothing: choose another folder or delete it"
        )
    manifest = Manifest.read(folder)
    differing = [
        f"{name} {manifest.settings.get(name)!r} (this run: {settings.get(name)!r})"
        for name in sorted(settings.keys() | manifest.settings.keys())
        if manifest.settings.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} was prepared with {', '.join(differing)}: choose another folder, delete this one or use its "
            "settings"
        )
    verify_files(folder, manifest, "size")
    return manifest


def name_hash(seed: int, name: str, purpose: bytes, count: int = 1) -> list[int]:
    """Return ``count`` 64-bit numbers that depend on the seed, a document's name and the purpose."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8 * count, person=purpose).digest()
    return [int.from_bytes(digest[8 * index : 8 * index + 8], "big") for index in range(count)]


def is_held_out(seed: int, name: str, val_fraction: float) -> bool:
    """Return whether a document belongs to the validation split."""
    return name_hash(seed, name, b"split")[0] < val_fraction * 2**64


def fim_pieces(text: str, seed: int, name: str, rate: float) -> tuple[str, str, str] | None:
    """Return prefix, middle and suffix of a document chosen for fill-in-the-middle, None for one that is not.

    Both cuts are uniform over the positions between characters, the ends included.
    """
    choice, first, second = name_hash(seed, name, b"fim", 3)
    if choice >= rate * 2**64:
        return None
    start, stop = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    return text[:start], text[start:stop], text[stop:]


@dataclass
class _Index:
    """Where the documents of one split lie in the unshuffled file, and where each stands in the order."""

    order: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text_start: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    fim_documents: int = 0


class _Writer:
    """One preparation: encode in the order of the corpus, then write in the order of the hashes."""

    def __init__(self, folder: Path, settings: dict[str, Any], shard_tokens: int) -> None:
        self.folder = folder
        self.settings = settings
        self.shard_tokens = shard_tokens
        self.seed: int = settings["seed"]
        self.index: dict[SplitName, _Index] = {"train": _Index(), "val": _Index()}
        self.markup = settings.get("markup", False)
        self.tokens_written = 0
        self.text_written = 0

    def run(self, corpus: Corpus, tokenizer_path: str | None) -> Manifest:
        with _progress() as progress:
            tokenizer = self._tokenizer(corpus, tokenizer_path, progress)
            self.eos_id, pad_id = eos_and_pad(tokenizer)
            self.dtype = np.dtype("<u2" if num_ids(tokenizer) <= 2**16 else "<u4")
            self.token_bytes = token_bytes(tokenizer)
            tokenizer.encode_special_tokens = not self.markup
            # The library's own save raises a bare Exception when the disk is full.
            (self.folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            with (self.folder / TOKEN_BYTES).open("wb") as file:
                np.save(file, self.token_bytes)
            unsorted_tokens, unsorted_text = self.folder / "tokens.tmp", self.folder / "val.tmp"
            documents = progress.track(corpus, description="encoding")
            with unsorted_tokens.open("wb") as tokens, unsorted_text.open("wb") as text:
                for batch in _batches(documents):
                    self._encode(batch, tokenizer, tokens, text)
            splits: dict[str, Split] = {name: self._write_split(name, unsorted_tokens) for name in self.index}
            self._write_val_text(unsorted_text)
            unsorted_tokens.unlink()
            unsorted_text.unlink()
        return write_manifest(
            self.folder,
            settings=self.settings,
            dtype=self.dtype.str,
            vocab_size=num_ids(tokenizer),
            eos_id=self.eos_id,
            pad_id=pad_id,
            splits=splits,
            skipped_bad_utf8=corpus.skipped.bad_utf8,
            skipped_empty=corpus.skipped.empty,
        )

    def _tokenizer(self, corpus: Corpus, path: str | None, progress: Progress) -> Tokenizer:
        if path is None:
            return train_tokenizer(self._training(progress.track(corpus, description="tokenizer")), self.vocab_size)
        tokenizer = load_tokenizer(path)
        if num_ids(tokenizer) > self.vocab_size:
            raise ValueError(
                f"{path} has {num_ids(tokenizer)} ids with the special tokens, expected at most vocab_size "
                f"({self.vocab_size}): raise vocab_size to that"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return int(self.settings["vocab_size"])

    def _training(self, documents: Iterable[Document]) -> Iterator[Document]:
        fraction = self.settings["val_fraction"]
        for name, text in documents:
            if not is_held_out(self.seed, name, fraction):
                yield Document(name, _MARKUP.sub("\n", text) if self.markup else text)

    def _encode(self, batch: list[Document], tokenizer: Tokenizer, tokens: BinaryIO, val_text: BinaryIO) -> None:
        """Append the tokens of some documents to the unshuffled file, and held-out text to its own."""
        markers = [special_id(tokenizer, token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        held_out = [is_held_out(self.seed, name, self.settings["val_fraction"]) for name, _ in batch]
        pieces: list[str] = []
        layouts: list[list[int | slice]] = []
        for (name, text), val in zip(batch, held_out, strict=True):
            fim = None if val else fim_pieces(text, self.seed, name, self.settings["fim_rate"])
            layout: list[int | slice] = []
            parts = [text] if fim is None else [fim[0], fim[2], fim[1]]
            for number, part in enumerate(parts):
                if fim is not None:
                    layout.append(markers[number])
                cut = _cut(part)
                layout.append(slice(len(pieces), len(pieces) + len(cut)))
                pieces.extend(cut)
            layouts.append(layout)
            self.index["train"].fim_documents += fim is not None
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
        for (name, text), val, layout in zip(batch, held_out, layouts, strict=True):
            ids: list[int] = []
            for item in layout:
                if isinstance(item, slice):
                    for piece in encoded[item]:
                        ids.extend(piece)
                else:
                    ids.append(item)
            ids.append(self.eos_id)
            self._append(name, text.encode(), np.array(ids), val, tokens, val_text)

    def _append(self, name: str, text: bytes, ids: np.ndarray, val: bool, tokens: BinaryIO, val_text: BinaryIO) -> None:
        spelled = int(self.token_bytes[ids].sum(dtype=np.int64))
        if self.markup:
            spelled += sum(len(token) for token in _MARKUP.findall(text.decode()))
        if spelled != len(text):
            raise ValueError(
                f"the document {name} has {len(text)} bytes, but its tokens spell {spelled}: the tokenizer is not "
                "lossless, expected one without normalizer and without prefix space"
            )
        index = self.index["val" if val else "train"]
        index.order.append(name_hash(self.seed, name, b"order")[0])
        index.start.append(self.tokens_written)
        index.tokens.append(len(ids))
        index.text_start.append(self.text_written)
        index.text_bytes.append(len(text))
        tokens.write(ids.astype(self.dtype).tobytes())
        self.tokens_written += len(ids)
        if val:
            val_text.write(text)
            self.text_written += len(text)

    def _write_split(self, name: SplitName, unsorted_tokens: Path) -> Split:
        """Write the stream of a split in shards: an end-of-text token, then its documents in hashed order."""
        index = self.index[name]
        order = np.argsort(np.array(index.order, dtype=np.uint64), kind="stable")
        starts, lengths = np.array(index.start, dtype=np.int64)[order], np.array(index.tokens, dtype=np.int64)[order]
        offsets = np.cumsum(np.concatenate([np.ones(1, dtype=np.int64), lengths]))
        with (self.folder / offsets_file(name)).open("wb") as file:
            np.save(file, offsets)
        total = int(offsets[-1])
        bounds = [*range(0, total, self.shard_tokens), total]
        shards = [f"{name}-{number:05d}.bin" for number in range(len(bounds) - 1)]
        if self.tokens_written:
            source = np.memmap(unsorted_tokens, dtype=self.dtype, mode="r")
            stream = _stream(source, starts, lengths, self.eos_id)
            left = np.empty(0, dtype=self.dtype)
            for shard, (first, last) in zip(shards, pairwise(bounds), strict=True):
                with (self.folder / shard).open("wb") as file:
                    wanted = last - first
                    while wanted:
                        if not len(left):
                            left = next(stream)
                        file.write(left[:wanted].tobytes())
                        wanted, left = wanted - min(wanted, len(left)), left[wanted:]
        return Split(len(order), total, sum(index.text_bytes), index.fim_documents, shards)

    def _write_val_text(self, unsorted_text: Path) -> None:
        index = self.index["val"]
        with unsorted_text.open("rb") as source, (self.folder / VAL_TEXT).open("wb") as target:
            for document in np.argsort(np.array(index.order, dtype=np.uint64), kind="stable"):
                source.seek(index.text_start[document])
                target.write(source.read(index.text_bytes[document]))


def _stream(source: np.ndarray, starts: np.ndarray, lengths: np.ndarray, eos_id: int) -> Iterator[np.ndarray]:
    """Yield the end-of-text token that every split begins with, then its documents."""
    yield np.array([eos_id], dtype=source.dtype)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        yield source[start : start + length]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _cut(text: str) -> list[str]:
    """Cut a text in pieces of bounded length that spell it when joined."""
    pieces = []
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        line_end = text.rfind("\n", start + 1, start + PIECE_CHARACTERS) + 1
        stop = line_end if line_end else start + PIECE_CHARACTERS
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _progress() -> Progress:
    """Return a progress bar on standard error, silent where that is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} documents"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
