"""Rows of fixed length out of a token stream: inputs, labels and the documents they belong to."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

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


def counted_labels(tokens: int, seq_len: int, rows: Int64[np.ndarray, " rows"]) -> int:
    """Return how many labels some rows hold, padding excluded."""
    return int((np.minimum((rows + 1) * seq_len, tokens - 1) - np.minimum(rows * seq_len, tokens - 1)).sum())


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


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute samples over rows, the longest first, each into the fullest row that has room for it.

    DeepSeek-R1's training packs this way (arXiv:2501.12948v2, appendix B.1). The rows depend on the lengths alone.

    Args:
        lengths: Positions that each sample takes, at most ``capacity``.
        capacity: Positions of a row.

    Returns:
        The numbers of the samples in each row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (positions left, row), sorted
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(open_rows, (lengths[sample], 0))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        insort(open_rows, (room - lengths[sample], row))
    return rows
