"""Documents from text files, JSON lines, Parquet, Hugging Face datasets and the running Python's library."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

PYTHON_STDLIB = "python-stdlib"
HUGGING_FACE = "hf:"

OnBadUtf8 = Literal["error", "skip"]

_SKIPPED_FOLDERS = ("__pycache__", "site-packages")


class Document(NamedTuple):
    """One text of a corpus.

    ``name`` does not depend on where the corpus lies, so that the train and validation split, which hashes it, is the
    same on every machine.
    """

    name: str
    text: str


@dataclass
class Skipped:
    """What an iteration over a :class:`Corpus` left out."""

    bad_utf8: list[str] = field(default_factory=list)
    """Where the texts that are not UTF-8 lie: file, byte offset."""
    empty: int = 0
    """Documents without a character."""


class Corpus:
    """The documents of several sources, in an order that depends on the sources alone.

    A source is one of:

    * a file: ``.jsonl`` and ``.ndjson`` are JSON lines, ``.parquet`` is Parquet, anything else is one document of text;
    * a directory, walked recursively in sorted order without hidden entries, ``__pycache__`` and
      ``site-packages``;
    * a glob pattern, ``**`` included;
    * ``hf:owner/name`` or ``hf:owner/name:config``: the ``train`` split of a Hugging Face dataset, streamed;
    * ``python-stdlib``: the modules of the running Python's standard library, or ``python-stdlib/email`` those of one
      of its packages. Its few deliberately broken files are skipped whatever ``on_bad_utf8`` says, since nobody should
      repair them.

    Iterating reads the sources anew and resets :attr:`skipped`.

    Args:
        sources: What to read, in this order.
        text_key: Key or column of the text in JSON lines, Parquet and datasets.
        on_bad_utf8: Whether text that is not UTF-8 ends the iteration or is skipped and counted.

    Raises:
        ValueError: While iterating, if a source cannot be understood, a text is not UTF-8, or no text is found.
        FileNotFoundError: While iterating, if a source does not exist.
    """

    def __init__(self, sources: Sequence[str], *, text_key: str = "text", on_bad_utf8: OnBadUtf8 = "error") -> None:
        self.sources = list(sources)
        self.text_key = text_key
        self.on_bad_utf8 = on_bad_utf8
        self.skipped = Skipped()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that hold at least one character."""
        self.skipped = Skipped()
        found = 0
        for source in self.sources:
            for document in self._read_source(source):
                if not document.text:
                    self.skipped.empty += 1
                    continue
                found += 1
                yield document
        if not found:
            raise ValueError(
                f"the corpus {self.sources} holds no text ({self.skipped.empty} empty documents, "
                f"{len(self.skipped.bad_utf8)} not UTF-8), expected at least one document: check sources"
            )

    def _read_source(self, source: str) -> Iterator[Document]:
        if source.startswith(HUGGING_FACE):
            yield from self._read_hugging_face(source.removeprefix(HUGGING_FACE))
        elif source.partition("/")[0] == PYTHON_STDLIB:
            root = Path(sysconfig.get_paths()["stdlib"])
            folder = root / source.removeprefix(PYTHON_STDLIB).lstrip("/")
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"the source {source} does not exist, expected {PYTHON_STDLIB}, alone or with one of its packages"
                )
            for path in _walk(folder):
                if path.suffix == ".py":
                    yield from self._read_text(path, path.relative_to(root).as_posix(), "skip")
        else:
            for path, name in expand(source):
                yield from self._read_file(path, name)

    def _read_file(self, path: Path, name: str) -> Iterator[Document]:
        if path.suffix in (".jsonl", ".ndjson"):
            yield from self._read_json_lines(path, name)
        elif path.suffix == ".parquet":
            yield from self._read_parquet(path, name)
        else:
            yield from self._read_text(path, name, self.on_bad_utf8)

    def _read_text(self, path: Path, name: str, on_bad_utf8: OnBadUtf8) -> Iterator[Document]:
        text = self._decode(path.read_bytes(), path, 0, on_bad_utf8)
        if text is not None:
            yield Document(name, text)

    def _read_json_lines(self, path: Path, name: str) -> Iterator[Document]:
        offset = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                decoded = self._decode(line, path, offset, self.on_bad_utf8)
                offset += len(line)
                if decoded is None or not decoded.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = json.loads(decoded)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is not JSON ({error.msg}), expected one object a line") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{where} is a {type(record).__name__}, expected an object with {self.text_key!r}")
                yield from self._checked(f"{name}:{number}", self._text_of(record, where), where)

    def _read_parquet(self, path: Path, name: str) -> Iterator[Document]:
        try:
            import pyarrow.parquet as parquet
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{path} needs pyarrow, which is not installed: pip install 'ds-lightning[data]'"
            ) from error
        # pyarrow's own errors derive from ValueError, but their message does not name the file.
        try:
            table = parquet.ParquetFile(path)
        except ValueError as error:
            raise ValueError(f"{path} is not a Parquet file ({error}), expected one: name it otherwise") from error
        if self.text_key not in table.schema_arrow.names:
            raise ValueError(
                f"{path} has the columns {table.schema_arrow.names}, expected {self.text_key!r}: set text_key"
            )
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[self.text_key]):
            for record in batch.to_pylist():
                where = f"{path}, row {number}"
                yield from self._checked(f"{name}:{number}", self._text_of(record, where), where)
                number += 1

    def _read_hugging_face(self, name: str) -> Iterator[Document]:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{HUGGING_FACE}{name} needs datasets, which is not installed: pip install 'ds-lightning[data]'"
            ) from error
        repository, _, config = name.partition(":")
        rows = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        for number, record in enumerate(rows):
            where = f"{HUGGING_FACE}{name}, row {number}"
            yield from self._checked(f"{name}:{number}", self._text_of(record, where), where)

    def _text_of(self, record: dict[str, object], where: str) -> str:
        if self.text_key not in record:
            raise ValueError(f"{where} has the keys {sorted(record)}, expected {self.text_key!r}: set text_key")
        text = record[self.text_key]
        if not isinstance(text, str):
            raise ValueError(f"{where}: {self.text_key!r} is a {type(text).__name__}, expected text: set text_key")
        return text

    def _checked(self, name: str, text: str, where: str) -> Iterator[Document]:
        """Refuse lone surrogates, which JSON can spell but UTF-8 cannot."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.on_bad_utf8 == "error":
                raise ValueError(
                    f"{where} holds the surrogate {text[error.start]!a} at character {error.start}, expected text that "
                    "UTF-8 can hold: repair it or set on_bad_utf8 to skip"
                ) from error
            self.skipped.bad_utf8.append(f"{where}, character {error.start}")
        else:
            yield Document(name, text)

    def _decode(self, data: bytes, path: Path, offset: int, on_bad_utf8: OnBadUtf8) -> str | None:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            where = offset + error.start
            if on_bad_utf8 == "error":
                raise ValueError(
                    f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {where}, expected UTF-8 text: "
                    "convert the file or set on_bad_utf8 to skip"
                ) from error
            self.skipped.bad_utf8.append(f"{path}, byte {where}")
            return None


def _walk(root: Path) -> list[Path]:
    """List the files below ``root`` in the order of their names, without hidden ones and byte code."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def expand(source: str) -> Iterator[tuple[Path, str]]:
    """Yield the files that a path, a directory or a glob stands for, each with its document name."""
    path = Path(source)
    if path.is_dir():
        for file in _walk(path):
            yield file, file.relative_to(path).as_posix()
    elif path.exists():
        yield path, path.name
    elif glob.has_magic(source):
        parts = path.parts
        first_magic = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:first_magic])
        matches = sorted(Path(match) for match in glob.iglob(source, recursive=True) if Path(match).is_file())
        if not matches:
            raise FileNotFoundError(f"the pattern {source} matches no file, expected at least one: check sources")
        for file in matches:
            yield file, file.relative_to(root).as_posix()
    else:
        raise FileNotFoundError(f"the source {source} does not exist, expected a file, a directory or a glob")
