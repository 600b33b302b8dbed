"""Oracle: the files themselves, written by each test."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from ds_lightning.data import Corpus, Document


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_directory_is_read_recursively_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.secret", ".git/config", "__pycache__/x.pyc", "c.py"):
        write(tmp_path / name, f"text of {name}")
    assert list(Corpus([str(tmp_path)])) == [
        Document("a/z.md", "text of a/z.md"),
        Document("b.txt", "text of b.txt"),
        Document("c.py", "text of c.py"),
    ]


def test_a_directory_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    write(tmp_path / ".cache/corpus/a.txt", "x")
    assert list(Corpus([str(tmp_path / ".cache/corpus")])) == [Document("a.txt", "x")]


def test_a_glob_names_its_documents_from_the_first_fixed_folder(tmp_path: Path) -> None:
    for name in ("one/a.txt", "one/deep/b.txt", "two/c.txt", "two/d.md"):
        write(tmp_path / name, name)
    names = [document.name for document in Corpus([str(tmp_path / "**/*.txt")])]
    assert names == ["one/a.txt", "one/deep/b.txt", "two/c.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a[1].txt", "x")
    assert list(Corpus([str(tmp_path / "a[1].txt")])) == [Document("a[1].txt", "x")]


def test_text_keeps_its_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\rc\n")
    assert [document.text for document in Corpus([str(tmp_path / "a.txt")])] == ["\ufeffa\r\nb\rc\n"]


def test_json_lines_are_one_document_each(tmp_path: Path) -> None:
    lines = [json.dumps({"body": text}) for text in ("first", "", "third\nline")]
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, "", ""]))
    corpus = Corpus([str(path)], text_key="body")
    assert list(corpus) == [Document("a.jsonl:1", "first"), Document("a.jsonl:3", "third\nline")]
    assert corpus.skipped.empty == 1


def test_parquet_rows_are_one_document_each(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a", "b"], "other": [1, 2]}), tmp_path / "a.parquet")
    assert list(Corpus([str(tmp_path)])) == [Document("a.parquet:0", "a"), Document("a.parquet:1", "b")]


def test_a_hugging_face_dataset_is_streamed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, str]]:
        calls.append((args, kwargs))
        return [{"text": "a"}, {"text": "b"}]

    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(Corpus(["hf:owner/name:de"])) == [Document("owner/name:de:0", "a"), Document("owner/name:de:1", "b")]
    assert calls == [(("owner/name", "de"), {"split": "train", "streaming": True})]


def test_the_standard_library_is_a_corpus_whatever_its_broken_files() -> None:
    corpus = iter(Corpus(["python-stdlib"]))
    names = [next(corpus).name for _ in range(20)]
    assert names == sorted(names)
    assert "__future__.py" in names
    assert not any("site-packages" in name or "/" in name[:1] for name in names)


def test_a_package_of_the_standard_library_is_a_part_of_it() -> None:
    whole = {document.name: document.text for document in Corpus(["python-stdlib"])}
    part = {document.name: document.text for document in Corpus(["python-stdlib/json"])}
    assert part == {name: text for name, text in whole.items() if name.startswith("json/")}
    assert "json/decoder.py" in part
    with pytest.raises(FileNotFoundError, match=r"python-stdlib/jsn does not exist, expected python-stdlib, "):
        list(Corpus(["python-stdlib/jsn"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok\n\xff", r"a.txt is not UTF-8: byte 0xff at offset 3, expected UTF-8 text: convert"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a.jsonl is not UTF-8: byte 0xe9 at offset 24"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a.jsonl:1 holds the surrogate '\\ud800' at character 0"),
        ("a.jsonl", b"{]", r"a.jsonl:1 is not JSON .* expected one object a line"),
        ("a.jsonl", b"[1]", r"a.jsonl:1 is a list, expected an object with 'text'"),
        ("a.jsonl", b'{"body": "a"}', r"a.jsonl:1 has the keys \['body'\], expected 'text': set text_key"),
        ("a.jsonl", b'{"text": 3}', r"a.jsonl:1: 'text' is a int, expected text"),
        ("a.parquet", b"no parquet at all", r"a.parquet is not a Parquet file"),
        ("a.txt", b"", r"holds no text \(1 empty documents, 0 not UTF-8\), expected at least one document"),
    ],
)
def test_bad_content_is_one_line_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as raised:
        list(Corpus([str(path)]))
    assert "\n" not in str(raised.value)


def test_bad_utf8_can_be_skipped_and_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"abc\xff")
    write(tmp_path / "b.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}\n{"text": "\\udfff"}\n{"text": "end"}\n')
    corpus = Corpus([str(tmp_path)], on_bad_utf8="skip")
    assert [document.text for document in corpus] == ["ok", "end"]
    assert corpus.skipped.bad_utf8 == [
        f"{tmp_path / 'a.txt'}, byte 3",
        f"{tmp_path / 'b.jsonl'}, byte 25",
        f"{tmp_path / 'b.jsonl'}:3, character 0",
    ]
    assert len(list(corpus)) == 2
    assert len(corpus.skipped.bad_utf8) == 3


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has the columns \['body'\], expected 'text': set text_key"):
        list(Corpus([str(tmp_path)]))


@pytest.mark.parametrize("source", ["missing.txt", "missing/*.txt"])
def test_a_source_that_matches_nothing_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing.*(does not exist|matches no file), expected"):
        list(Corpus([str(tmp_path / source)]))


@pytest.mark.parametrize(("source", "package"), [("a.parquet", "pyarrow"), ("hf:owner/name", "datasets")])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str
) -> None:
    write(tmp_path / "a.parquet", "x")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = source if source.startswith("hf:") else str(tmp_path / source)
    with pytest.raises(
        ValueError, match=rf"needs {package}, which is not installed: pip install 'ds-lightning\[data\]'"
    ):
        list(Corpus([path]))
