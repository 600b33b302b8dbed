"""Oracle: the text itself, which every tokenizer must give back, and the number of its UTF-8 bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ds_lightning.data import Document, load_tokenizer, token_bytes, train_tokenizer
from ds_lightning.data.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, SPECIAL_TOKENS, num_ids, tokenizer_sha256

CODE = [
    Document(
        f"{index}.py", f"def name_{index}(self, value):\n    if value > {index * 37}:\n        return self.name\n\n"
    )
    for index in range(50)
]
TOKENIZER = train_tokenizer(CODE, 400)
BYTES = token_bytes(TOKENIZER)


def encode(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back_and_its_bytes_are_counted_exactly(text: str) -> None:
    ids = encode(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert int(BYTES[ids].sum()) == len(text.encode())


@pytest.mark.parametrize(
    "text",
    ["   ", "\t\n \r\n\r", "\x00\x7f", "x" * 500, " " * 500, "\n" * 100, "e\u0301\u0302" * 40, "1234567", "a\u2028b"],
)
def test_hostile_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_stays_text(special: str) -> None:
    text = f"before {special} after{special}"
    ids = encode(text)
    assert TOKENIZER.token_to_id(special) not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert BYTES[TOKENIZER.token_to_id(special)] == 0


def test_an_indented_line_begin_is_one_token() -> None:
    pieces = [piece for piece, _ in TOKENIZER.pre_tokenizer.pre_tokenize_str("if x:\n    return 12345")]
    assert pieces == ["if", "\u0120x", ":\u010a\u0120\u0120\u0120\u0120", "return", "\u0120", "123", "45"]


def test_training_does_not_depend_on_the_order_of_the_documents() -> None:
    assert train_tokenizer(CODE[::-1], 400).to_str() == TOKENIZER.to_str()
    forwards, backwards = (train_tokenizer(documents, 400, sample_bytes=999) for documents in (CODE, CODE[::-1]))
    assert forwards.to_str() == backwards.to_str() != TOKENIZER.to_str()


def test_training_reads_no_more_than_the_sample() -> None:
    rare = Document("rare", "zyzzyva " * 1000)
    learned = train_tokenizer([*CODE, rare], 400)
    unseen = train_tokenizer([*CODE, rare], 400, sample_bytes=2000)
    assert len(encode("zyzzyva", learned)) < len(encode("zyzzyva", unseen))


@pytest.mark.parametrize("text", ["ab", " ", "\n", "\t\n", ".-", "\u2003", "1"])
def test_a_giant_line_is_learned_in_bounded_words(text: str) -> None:
    giant = train_tokenizer([Document("giant", text * 200_000)], 400)
    pieces = giant.pre_tokenizer.pre_tokenize_str(text * 1000 + "x")
    assert max(stop - start for _, (start, stop) in pieces) <= 136
    assert giant.decode(encode(text * 1000, giant), skip_special_tokens=False) == text * 1000


def test_the_vocabulary_needs_room_for_bytes_and_special_tokens() -> None:
    with pytest.raises(ValueError, match=rf"vocab_size is 255, expected at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(CODE, 255)


def test_a_saved_tokenizer_loads_as_it_was(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.to_str() == TOKENIZER.to_str()
    assert encode(f"x {END_OF_TEXT}", loaded) == encode(f"x {END_OF_TEXT}")
    assert len(tokenizer_sha256(tmp_path / "tokenizer.json")) == 64


def foreign(tmp_path: Path, **changes: object) -> Path:
    description = json.loads(TOKENIZER.to_str())
    for token in SPECIAL_TOKENS:
        del description["model"]["vocab"][token]
    description["added_tokens"] = [
        {
            "id": 5000,
            "content": "<think>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    ]
    ids = {token: number for number, token in enumerate(description["model"]["vocab"])}
    description["model"]["vocab"] = ids
    description["added_tokens"][0]["id"] = len(ids)
    description.update(changes)
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(description))
    return path


def test_a_foreign_tokenizer_gets_the_special_tokens_it_lacks(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    before = Tokenizer.from_file(str(path))
    loaded = load_tokenizer(path)
    assert num_ids(loaded) == num_ids(before) + len(SPECIAL_TOKENS) - 1
    assert loaded.token_to_id("<think>") == before.token_to_id("<think>")
    assert before.token_to_id("<think>") in encode("a <think> b", before)
    assert loaded.token_to_id("<think>") not in encode("a <think> b", loaded)
    assert encode("def name(self)", loaded) == encode("def name(self)", before)


def test_ordinary_added_tokens_count_the_bytes_of_their_text(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    description = json.loads(path.read_text())
    description["added_tokens"][0]["content"] = "\u00e9t\u00e9"
    path.write_text(json.dumps(description))
    loaded = load_tokenizer(path)
    ids = encode("un \u00e9t\u00e9", loaded)
    assert loaded.token_to_id("\u00e9t\u00e9") in ids
    assert int(token_bytes(loaded)[ids].sum(dtype=np.int64)) == len("un \u00e9t\u00e9".encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not a tokenizer"),
        ('{"version": "1.0"}', r"is not a tokenizer \(KeyError\('model'\)\), expected the tokenizer.json"),
        ('{"model": {"type": "WordPiece"}, "decoder": {"type": "WordPiece"}}', "is a WordPiece tokenizer"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "Metaspace"}}', "with the decoder .*Metaspace.* byte-level"),
    ],
)
def test_a_file_that_is_no_byte_level_tokenizer_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_tokenizer(tmp_path / "none.json")
