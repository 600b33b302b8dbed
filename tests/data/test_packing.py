"""Oracle: the definitions as Python loops over a list of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ds_lightning.data.packing import (
    IGNORED,
    counted_labels,
    document_segments,
    num_full_rows,
    num_rows,
    read_rows,
)
from ds_lightning.data.shards import Split, TokenStream

EOS, PAD = 0, 1


def stream_of(tmp_path: Path, tokens: list[int]) -> TokenStream:
    np.array(tokens[: len(tokens) // 2], dtype="<u2").tofile(tmp_path / "a.bin")
    np.array(tokens[len(tokens) // 2 :], dtype="<u2").tofile(tmp_path / "b.bin")
    return TokenStream(tmp_path, Split(0, len(tokens), 0, 0, ["a.bin", "b.bin"]), "<u2", "none.npy")


def some_tokens(count: int) -> list[int]:
    generator = np.random.default_rng(count)
    return [EOS if value == 2 else int(value) for value in generator.integers(2, 12, count)]


@pytest.mark.parametrize("count", [2, 5, 8, 9, 10, 16, 17, 18, 33])
def test_rows_in_order_predict_every_token_but_the_first_once(tmp_path: Path, count: int) -> None:
    tokens = some_tokens(count)
    stream = stream_of(tmp_path, tokens)
    rows = num_rows(count, 4)
    inputs, labels = read_rows(stream, np.arange(rows), 4, pad_id=PAD)
    assert labels[labels != IGNORED].tolist() == tokens[1:]
    assert inputs[labels != IGNORED].tolist() == tokens[:-1]
    assert set(inputs[labels == IGNORED].tolist()) <= {PAD}
    assert rows == len(range(0, count - 1, 4))
    assert num_full_rows(count, 4) == sum(start + 4 < count for start in range(0, count, 4))


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    tokens = some_tokens(30)
    inputs, labels = read_rows(stream_of(tmp_path, tokens), np.array([5, 0, 3]), 4, pad_id=PAD)
    for row, start in enumerate((20, 0, 12)):
        assert inputs[row].tolist() == tokens[start : start + 4]
        assert labels[row].tolist() == tokens[start + 1 : start + 5]


def test_rows_past_the_end_are_all_padding(tmp_path: Path) -> None:
    inputs, labels = read_rows(stream_of(tmp_path, some_tokens(9)), np.array([2, 7]), 4, pad_id=PAD)
    assert np.all(inputs == PAD)
    assert np.all(labels == IGNORED)


def test_segments_count_the_documents_that_ended_before() -> None:
    rows = np.array([some_tokens(16) for _ in range(1)] + [[EOS] * 16, [5] * 16, [EOS, 5] * 8])
    expected = [[sum(token == EOS for token in row[:position]) for position in range(16)] for row in rows.tolist()]
    segments = document_segments(rows, EOS)
    assert segments.tolist() == expected
    assert segments.dtype == np.int64


@pytest.mark.parametrize("tokens", [2, 9, 10, 40])
def test_counted_labels_are_those_not_ignored(tmp_path: Path, tokens: int) -> None:
    stream = stream_of(tmp_path, some_tokens(tokens))
    for start in range(12):
        for stop in range(start, 13):
            rows = np.arange(start, stop)[::-1]
            _, labels = read_rows(stream, rows, 4, pad_id=PAD)
            assert counted_labels(tokens, 4, rows) == int(np.sum(labels != IGNORED))
