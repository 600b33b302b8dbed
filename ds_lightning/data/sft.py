"""The Lightning data module of supervised fine-tuning: conversations in, packed rows with labels on answers out."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64, UInt16
from tokenizers import Tokenizer

from ds_lightning.data.batches import Batch, BatchRequest, RowDataModule, Rows
from ds_lightning.data.chat import chat_tokenizer
from ds_lightning.data.chat_rows import Overlong, answers_file, labels_file, prepare_conversations, rows_file
from ds_lightning.data.packing import IGNORED
from ds_lightning.data.sampler import BatchSchedule, StepPlan
from ds_lightning.data.shards import SplitName, TokenShards, TokenStream, offsets_file

PADDING = -1
"""Segment of a position that belongs to no conversation."""


class ConversationRows(Rows):
    """Rows of whole conversations one after the other, each a segment of its own, then padding."""

    def __init__(self, shards: TokenShards, split: SplitName, seq_len: int) -> None:
        manifest = shards.manifest
        facts = manifest.splits[split]
        masks = replace(facts, shards=[answers_file(split)] if facts.shards else [])
        self.stream = shards.train if split == "train" else shards.val
        self.answers = TokenStream(shards.folder, masks, "|u1", offsets_file(split))
        self.offsets = self.stream.document_offsets().tolist()
        self.bounds = np.load(shards.folder / rows_file(split), allow_pickle=False).tolist()
        self.labels = np.load(shards.folder / labels_file(split), allow_pickle=False)
        self.pad_id = manifest.pad_id
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, request: BatchRequest) -> Batch:
        shape = len(request.rows), self.seq_len
        inputs = np.full(shape, self.pad_id, dtype=np.int64)
        labels, segments = np.full(shape, IGNORED, dtype=np.int64), np.full(shape, PADDING, dtype=np.int64)
        for place, row in enumerate(request.rows):
            at = 0
            conversations = range(self.bounds[row], self.bounds[row + 1]) if row < len(self) else range(0)
            for segment, conversation in enumerate(conversations):
                first, last = self.offsets[conversation : conversation + 2]
                tokens, counted = self.stream.read(first, last), self.answers.read(first, last)
                here = slice(at, at + len(tokens) - 1)
                inputs[place, here] = tokens[:-1]
                labels[place, here] = np.where(counted[1:], tokens[1:], IGNORED)
                segments[place, here] = segment
                at = here.stop
        return Batch(
            input_ids=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            segment_ids=torch.from_numpy(segments),
            step_tokens=request.step_tokens,
            step_labels=request.step_labels,
        )

    def counted(self, rows: Int64[np.ndarray, " rows"]) -> int:
        """Return how many labels some rows have that are counted: tokens of answers."""
        return int(self.labels[rows[rows < len(self)]].sum())


class SFTDataModule(RowDataModule):
    """Packed conversations for supervised fine-tuning, each batch a :class:`Batch` with ``segment_ids``.

    Labels are counted on answers only, their end tokens included. Conversations that share a row do not see each other:
    attention stays within a segment. Positions go on through the row, since rotary embeddings make attention a function
    of their differences alone. Which conversations share a row is settled once; the order of the rows is another in
    each epoch. DeepSeek-R1 trains for 2 to 3 epochs (arXiv:2501.12948v2, appendix B.4).

    Args:
        sources: JSON-lines files, directories or globs; see
            :func:`ds_lightning.data.conversations.read_conversations`.
        folder: Where the prepared conversations are, or go.
        tokenizer: Path of the ``tokenizer.json`` in the folder of the weights to start from.
        seq_len: Tokens of a row.
        batch_size: Rows of an optimizer step, over all ranks and micro-batches.
        epochs: Passes over the rows, with the step that completes them; none: ``total_tokens`` says.
        total_tokens: Planned tokens, prompts and padding included, instead of epochs.
        chat_template: Path of a ``chat_template.jinja``; none: the one beside the tokenizer, or the default.
        overlong: Whether a conversation longer than a row is an error, is cut at its end or is left out.
        val_fraction: Part of the conversations that is held out; 0: no validation.
        val_batch_size: Rows of a validation batch on each rank.
        seed: Of split and order.
        num_workers: Processes that read ahead.

    Raises:
        ValueError: If a number is out of range or not exactly one of epochs and total_tokens is given; in ``setup``,
            if a split has no conversation.
    """

    stage = "sft"

    def __init__(
        self,
        *,
        sources: list[str],
        folder: str,
        tokenizer: str,
        seq_len: int,
        batch_size: int,
        epochs: float | None = None,
        total_tokens: int | None = None,
        chat_template: str | None = None,
        overlong: Overlong = "error",
        val_fraction: float = 0.05,
        val_batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            seq_len=seq_len,
            val_fraction=val_fraction,
            val_batch_size=val_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        if (epochs is None) == (total_tokens is None):
            raise ValueError(f"epochs is {epochs} and total_tokens {total_tokens}, expected one of them")
        if epochs is not None and not 0 < epochs < math.inf:
            raise ValueError(f"epochs is {epochs}, expected more than 0")
        self.schedule = BatchSchedule(batch_size, multiple=batch_size)
        self.sources = sources
        self.folder = folder
        self.tokenizer_path = tokenizer
        self.epochs = epochs
        self.total_tokens = total_tokens
        self.chat_template_path = chat_template
        self.overlong = overlong
        self.shards: TokenShards | None = None

    def prepare_data(self) -> None:
        """Prepare the conversations, or check that the folder was prepared with these settings and files."""
        prepare_conversations(
            self.sources,
            self.folder,
            tokenizer=self.tokenizer_path,
            seq_len=self.seq_len,
            chat_template=self.chat_template_path,
            overlong=self.overlong,
            val_fraction=self.val_fraction,
            seed=self.seed,
        )

    def setup(self, stage: str | None = None) -> None:
        """Open and verify the conversations, and plan the steps."""
        if self.shards is None:
            shards = TokenShards(self.folder)
            splits = shards.manifest.splits
            for name in ("train", "val"):
                if not splits[name].documents and (name == "train" or self.val_fraction > 0):
                    raise ValueError(
                        f"the {name} split in {self.folder} has none of the "
                        f"{sum(split.documents for split in splits.values())} conversations, expected at least one: "
                        f"give more, or another val_fraction ({self.val_fraction})"
                    )
            self.shards = shards
            tokens = self.total_tokens
            if tokens is None:
                assert self.epochs is not None
                tokens = math.ceil(self.epochs * len(self.rows("train"))) * self.seq_len
            self.plan = StepPlan(self.schedule, self.seq_len, tokens)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the conversations; text that spells a turn marker encodes to it."""
        return chat_tokenizer(self.opened.tokenizer)

    @property
    def token_bytes(self) -> UInt16[np.ndarray, " vocab"]:
        """Bytes of text each token id stands for; special tokens 0. For bits per byte."""
        return self.opened.token_bytes

    def rows(self, split: SplitName) -> ConversationRows:
        """Return the rows of a split."""
        return ConversationRows(self.opened, split, self.seq_len)
