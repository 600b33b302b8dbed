"""Rows of fixed length out of a token stream: inputs, labels and the documents they belong to."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from ds_lightning.data.shards import TokenStream

IGNORED = -100
"""Label of a position that no loss counts."""


def num_full_rows(tokens: int, seq_len: int) -> int:
    """Return how many rows of ``seq_len`` inputs and labels a stream fills; neighbours share one token."""
    return max(0, (tokens - 1) // seq_len)


def num_rows(tokens: int, seq_len: int) -> int:
    """Return the number of rows with the last, partly filled one."""
    return max(0, -(-(tokens - 1) // seq_len))


def counted_labels(tokens: int, seq_len: int, start: int, stop: int) -> int:
    """Return how many labels the rows from ``start`` to before ``stop`` hold, padding excluded."""
    return max(0, min(stop * seq_len, tokens - 1) - min(start * seq_len, tokens - 1))


def read_rows(
    stream: TokenStream, rows: Int64[np.ndarray, " rows"], seq_len: int, *, pad_id: int
) -> tuple[Int64[np.ndarray, "rows seq"], Int64[np.ndarray, "rows seq"]]:
    """Return inputs and labels of some rows.

    Row i has the inputs ``stream[i * seq_len : (i + 1) * seq_len]`` and as labels the tokens after them. Taken in
    order, all rows predict each token but the first exactly once. What lies past the end of the stream, and whole
    rows past it, are padding: inputs ``pad_id``, labels :data:`IGNORED`.

    Args:
        stream: Tokens of a split.
        rows: Row numbers, from 0.
        seq_len: Inputs of a row.
        pad_id: Token of the padding.
    """
    inputs = np.full((len(rows), seq_len), pad_id, dtype=np.int64)
    labels = np.full((len(rows), seq_len), IGNORED, dtype=np.int64)
    for position, row in enumerate(rows.tolist()):
        tokens = stream.read(row * seq_len, row * seq_len + seq_len + 1)
        predicted = max(0, len(tokens) - 1)
        inputs[position, :predicted] = tokens[:predicted]
        labels[position, :predicted] = tokens[1:]
    return inputs, labels


def document_segments(input_ids: Int64[np.ndarray, "rows seq"], eos_id: int) -> Int64[np.ndarray, "rows seq"]:
    """Return for each position the index of its document within the row; an end-of-text token ends its document."""
    ends = input_ids == eos_id
    segments: np.ndarray = np.cumsum(ends, axis=1, dtype=np.int64) - ends
    return segments
