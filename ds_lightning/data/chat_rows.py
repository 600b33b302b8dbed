"""Conversations prepared for training: tokens, which of them are answers, and how conversations share rows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ds_lightning.data.chat import CHAT_TEMPLATE, ChatTemplate, answer_tokens, chat_tokenizer, template_beside
from ds_lightning.data.conversations import Conversation, read_conversations, sources_sha256
from ds_lightning.data.packing import pack_best_fit
from ds_lightning.data.preparation import is_held_out, name_hash, publish
from ds_lightning.data.shards import (
    TOKEN_BYTES,
    TOKENIZER,
    Manifest,
    Split,
    SplitName,
    eos_and_pad,
    file_sha256,
    offsets_file,
    write_manifest,
)
from ds_lightning.data.tokenizer import load_tokenizer, num_ids, token_bytes, tokenizer_sha256

Overlong = Literal["error", "truncate", "skip"]

ENCODED_AT_ONCE = 256
"""Conversations."""


def prepare_conversations(
    sources: Sequence[str],
    folder: str | Path,
    *,
    tokenizer: str,
    seq_len: int,
    chat_template: str | None = None,
    overlong: Overlong = "error",
    val_fraction: float = 0.05,
    seed: int = 0,
) -> Manifest:
    """Turn conversations into packed rows, or reuse what the same settings and the same files made before.

    Beside what :func:`ds_lightning.data.preparation.prepare` writes, the folder holds the chat template and, for each
    split, which tokens are answers (``*-answers.bin``), the first conversation of each row (``*-rows.npy``) and the
    labels that each row counts (``*-labels.npy``). Conversations lie in the order of the rows.

    Args:
        sources: See :func:`ds_lightning.data.conversations.read_conversations`.
        folder: Where it goes.
        tokenizer: Path of a ``tokenizer.json``.
        seq_len: Positions of a row. A conversation takes one less than it has tokens: nothing follows its last one.
        chat_template: Path of a ``chat_template.jinja``; none: the one beside the tokenizer, or the default.
        overlong: Whether a conversation longer than a row is an error, is cut at its end or is left out.
        val_fraction: Part of the conversations that is held out, in [0, 1).
        seed: Of the split and the order.

    Returns:
        The manifest of the folder.

    Raises:
        ValueError: If a conversation, the template, the tokenizer or a setting will not do, or if ``folder`` was
            prepared with others.
        OSError: If a file is missing or the file system refuses; ``folder`` is then as it was.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and less than 1")
    template = ChatTemplate(chat_template or template_beside(tokenizer))
    settings: dict[str, Any] = {
        "sources": list(sources),
        "sources_sha256": sources_sha256(sources),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": file_sha256(template.path),
        "seq_len": seq_len,
        "overlong": overlong,
        "val_fraction": val_fraction,
        "seed": seed,
    }
    return publish(Path(folder), settings, lambda made: _Writer(made, settings, template, tokenizer).run(sources))


def answers_file(split: SplitName) -> str:
    """Return the name of the file with a byte a token: 1 for those of answers."""
    return f"{split}-answers.bin"


def rows_file(split: SplitName) -> str:
    """Return the name of the file with the first conversation of each row, and after the last one their number."""
    return f"{split}-rows.npy"


def labels_file(split: SplitName) -> str:
    """Return the name of the file with the number of counted labels of each row."""
    return f"{split}-labels.npy"


@dataclass
class _Index:
    """Where the conversations of one split lie in the unsorted files, and where each stands in the order."""

    order: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


class _Writer:
    """One preparation: encode in the order of the files, then write in the order of the rows."""

    def __init__(self, folder: Path, settings: dict[str, Any], template: ChatTemplate, tokenizer: str) -> None:
        self.folder = folder
        self.settings = settings
        self.template = template
        self.tokenizer = load_tokenizer(tokenizer)
        self.chat_tokenizer = chat_tokenizer(self.tokenizer)
        self.token_bytes = token_bytes(self.tokenizer)
        self.dtype = np.dtype("<u2" if num_ids(self.tokenizer) <= 2**16 else "<u4")
        self.seq_len: int = settings["seq_len"]
        self.index: dict[SplitName, _Index] = {"train": _Index(), "val": _Index()}
        self.tokens_written = 0
        self.read = self.overlong = self.skipped = 0

    def run(self, sources: Sequence[str]) -> Manifest:
        unsorted_tokens, unsorted_answers = self.folder / "tokens.tmp", self.folder / "answers.tmp"
        with unsorted_tokens.open("wb") as tokens, unsorted_answers.open("wb") as answers:
            for batch in _batches(read_conversations(sources)):
                self._encode(batch, tokens, answers)
        if self.skipped == self.read:
            raise ValueError(
                f"none of the {self.read} conversations fits into seq_len {self.seq_len}, expected at least one: raise "
                "seq_len"
            )
        splits: dict[str, Split] = {name: self._write(name, unsorted_tokens, unsorted_answers) for name in self.index}
        unsorted_tokens.unlink()
        unsorted_answers.unlink()
        self.tokenizer.save(str(self.folder / TOKENIZER))
        (self.folder / CHAT_TEMPLATE).write_bytes(self.template.path.read_bytes())
        with (self.folder / TOKEN_BYTES).open("wb") as file:
            np.save(file, self.token_bytes)
        if self.overlong:
            print(
                f"{self.overlong} of {self.read} conversations have more than seq_len + 1 = {self.seq_len + 1} tokens: "
                f"{self.overlong - self.skipped} cut, {self.skipped} left out",
                file=sys.stderr,
            )
        eos_id, pad_id = eos_and_pad(self.tokenizer)
        return write_manifest(
            self.folder,
            settings=self.settings,
            dtype=self.dtype.str,
            vocab_size=num_ids(self.tokenizer),
            eos_id=eos_id,
            pad_id=pad_id,
            splits=splits,
            skipped_bad_utf8=[],
            skipped_empty=0,
            overlong=self.overlong,
        )

    def _encode(self, batch: list[Conversation], tokens: BinaryIO, answers: BinaryIO) -> None:
        """Append the tokens of some conversations to the unsorted files."""
        rendered = []
        for conversation in batch:
            try:
                rendered.append(self.template.render_answers(conversation.messages, conversation.first_answer))
            except ValueError as error:
                raise ValueError(f"{conversation.where}: {error}") from None
        encodings = self.chat_tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for conversation, encoding, (_, spans) in zip(batch, encodings, rendered, strict=True):
            self.read += 1
            ids, inside = answer_tokens(encoding, spans)
            if len(ids) > self.seq_len + 1:
                if self.settings["overlong"] == "error":
                    raise ValueError(
                        f"{conversation.where} has {len(ids)} tokens, expected at most seq_len + 1 = "
                        f"{self.seq_len + 1}: raise seq_len, or set overlong to truncate or skip"
                    )
                self.overlong += 1
                kept = self.seq_len + 1 if self.settings["overlong"] == "truncate" else 0
                ids, inside = ids[:kept], inside[:kept]
                if not inside[1:].any():  # left out, or nothing of its answers is left
                    self.skipped += 1
                    continue
            held_out = is_held_out(self.settings["seed"], conversation.name, self.settings["val_fraction"])
            index = self.index["val" if held_out else "train"]
            index.order.append(name_hash(self.settings["seed"], conversation.name, b"order")[0])
            index.start.append(self.tokens_written)
            index.tokens.append(len(ids))
            index.labels.append(int(inside[1:].sum()))
            tokens.write(ids.astype(self.dtype).tobytes())
            answers.write(inside.astype("|u1").tobytes())
            self.tokens_written += len(ids)

    def _write(self, name: SplitName, unsorted_tokens: Path, unsorted_answers: Path) -> Split:
        """Write the conversations of a split row after row."""
        index = self.index[name]
        hashed = sorted(range(len(index.order)), key=lambda number: index.order[number])
        packed = pack_best_fit([index.tokens[number] - 1 for number in hashed], self.seq_len)
        rows = [[hashed[number] for number in row] for row in packed]
        ordered = [number for row in rows for number in row]
        self._save(offsets_file(name), np.cumsum([0, *(index.tokens[number] for number in ordered)]))
        self._save(rows_file(name), np.cumsum([0, *(len(row) for row in rows)]))
        self._save(labels_file(name), np.array([sum(index.labels[number] for number in row) for row in rows]))
        if not ordered:
            return Split(0, 0, 0, 0, [])
        num_bytes = 0
        tokens = np.memmap(unsorted_tokens, dtype=self.dtype, mode="r")
        answers = np.memmap(unsorted_answers, dtype="|u1", mode="r")
        shard = f"{name}-00000.bin"
        with (self.folder / shard).open("wb") as token_file, (self.folder / answers_file(name)).open("wb") as mask_file:
            for number in ordered:
                part = slice(index.start[number], index.start[number] + index.tokens[number])
                token_file.write(tokens[part].tobytes())
                mask_file.write(answers[part].tobytes())
                num_bytes += int(self.token_bytes[tokens[part]].sum(dtype=np.int64))
        return Split(len(ordered), sum(index.tokens), num_bytes, 0, [shard])

    def _save(self, name: str, values: np.ndarray) -> None:
        with (self.folder / name).open("wb") as file:
            np.save(file, values.astype(np.int64))


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    iterator = iter(conversations)
    while batch := list(islice(iterator, ENCODED_AT_ONCE)):
        yield batch
