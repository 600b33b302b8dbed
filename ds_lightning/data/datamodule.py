"""The Lightning data module of pretraining: prepared shards in, packed batches out."""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
from jaxtyping import Int64, UInt16
from tokenizers import Tokenizer

from ds_lightning.data.batches import Batch, BatchRequest, RowDataModule, Rows
from ds_lightning.data.corpus import OnBadUtf8
from ds_lightning.data.packing import counted_labels, document_segments, num_full_rows, num_rows, read_rows
from ds_lightning.data.preparation import prepare
from ds_lightning.data.sampler import BatchSchedule, StepPlan
from ds_lightning.data.shards import SplitName, TokenShards, TokenStream, compression_baselines


class PackedRows(Rows):
    """Rows of documents one after the other; in training without the last, partly filled one."""

    def __init__(
        self, stream: TokenStream, shards: TokenShards, *, seq_len: int, mask_documents: bool, full: bool
    ) -> None:
        self.stream = stream
        self.eos_id = shards.manifest.eos_id
        self.pad_id = shards.manifest.pad_id
        self.seq_len = seq_len
        self.mask_documents = mask_documents
        self.full = full

    def __len__(self) -> int:
        return (num_full_rows if self.full else num_rows)(len(self.stream), self.seq_len)

    def __getitem__(self, request: BatchRequest) -> Batch:
        rows = np.array(request.rows, dtype=np.int64)
        inputs, labels = read_rows(self.stream, rows, self.seq_len, pad_id=self.pad_id)
        batch = Batch(
            input_ids=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            step_tokens=request.step_tokens,
            step_labels=request.step_labels,
        )
        if self.mask_documents:
            batch["segment_ids"] = torch.from_numpy(document_segments(inputs, self.eos_id))
        return batch

    def counted(self, rows: Int64[np.ndarray, " rows"]) -> int:
        """Return how many labels some rows have that are counted: all but padding."""
        return counted_labels(len(self.stream), self.seq_len, rows)


class TokenDataModule(RowDataModule):
    """Packed batches of a corpus for pretraining, each a :class:`Batch`.

    Which tokens an optimizer step sees depends on the seed and the tokens consumed before it, not on ranks,
    accumulation or workers. Documents are packed one after the other (DeepSeek-V3, arXiv:2412.19437, section 4.1).

    Args:
        sources: Files, directories, globs, ``hf:owner/name``, ``python-stdlib`` or ``python-stdlib/email``.
        folder: Where the prepared shards are, or go.
        seq_len: Tokens of a row.
        batch_size: Rows of an optimizer step, over all ranks and micro-batches.
        total_tokens: Planned tokens; training ends with the step that reaches them. More than the corpus has: it is
            read again in another order.
        tokenizer: Path of a ``tokenizer.json``; none: one is trained on the training documents.
        vocab_size: Ids of a trained tokenizer; the most that a given one may have.
        ramp_tokens: Tokens over which the batch grows to ``batch_size``; 0: no ramp.
        start_batch_size: Rows of the first step, with a ramp.
        ramp_multiple: Rows of a stair of the ramp, a multiple of ranks times accumulation; none: the greatest common
            divisor of ``start_batch_size`` and ``batch_size``.
        val_fraction: Part of the documents that is held out; 0: no validation.
        val_batch_size: Rows of a validation batch on each rank.
        fim_rate: Part of the training documents rearranged for fill-in-the-middle.
        mask_documents: Whether batches carry ``segment_ids``, so that attention can stay within documents.
        on_bad_utf8: Whether text that is not UTF-8 is an error or is skipped and listed in the manifest.
        text_key: Key or column of the text in JSON lines, Parquet and datasets.
        markup: Whether text that spells a special token encodes to it: for conversations rendered by a chat template,
            and not for text that others wrote.
        seed: Of split, order and rearrangement.
        num_workers: Processes that read ahead.

    Raises:
        ValueError: If a number is out of range, and in ``setup`` if the corpus is too small.
    """

    stage = "pretrain"

    def __init__(
        self,
        *,
        sources: list[str],
        folder: str,
        seq_len: int,
        batch_size: int,
        total_tokens: int,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        ramp_tokens: int = 0,
        start_batch_size: int | None = None,
        ramp_multiple: int | None = None,
        val_fraction: float = 0.02,
        val_batch_size: int = 8,
        fim_rate: float = 0.0,
        mask_documents: bool = False,
        on_bad_utf8: OnBadUtf8 = "error",
        text_key: str = "text",
        markup: bool = False,
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
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.sources = sources
        self.folder = folder
        self.tokenizer_path = tokenizer
        self.vocab_size = vocab_size
        self.fim_rate = fim_rate
        self.mask_documents = mask_documents
        self.on_bad_utf8 = on_bad_utf8
        self.text_key = text_key
        self.markup = markup
        if ramp_multiple is None:
            ramp_multiple = gcd(batch_size, start_batch_size or batch_size)
        self.plan = StepPlan(
            BatchSchedule(batch_size, ramp_tokens, start_batch_size, ramp_multiple), seq_len, total_tokens
        )
        self.shards: TokenShards | None = None

    def prepare_data(self) -> None:
        """Prepare the shards, or check that the folder was prepared with these settings."""
        prepare(
            self.sources,
            self.folder,
            tokenizer=self.tokenizer_path,
            vocab_size=self.vocab_size,
            val_fraction=self.val_fraction,
            fim_rate=self.fim_rate,
            on_bad_utf8=self.on_bad_utf8,
            text_key=self.text_key,
            markup=self.markup,
            seed=self.seed,
        )

    def setup(self, stage: str | None = None) -> None:
        """Open and verify the shards."""
        if self.shards is None:
            shards = TokenShards(self.folder)
            for name, stream in (("train", shards.train), ("val", shards.val)):
                if len(stream) < self.seq_len + 1 and (name == "train" or self.val_fraction > 0):
                    raise ValueError(
                        f"the {name} split in {self.folder} has {len(stream)} tokens in "
                        f"{shards.manifest.splits[name].documents} documents, expected at least seq_len + 1 = "
                        f"{self.seq_len + 1}: give more documents, another val_fraction ({self.val_fraction}) or a "
                        "smaller seq_len"
                    )
            self.shards = shards

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards."""
        return self.opened.tokenizer

    @property
    def token_bytes(self) -> UInt16[np.ndarray, " vocab"]:
        """Bytes of text each token id stands for; special tokens 0. For bits per byte."""
        return self.opened.token_bytes

    def compression_baselines(self) -> dict[str, float]:
        """Return what general compressors reach on the held-out text; nothing where none was held out."""
        return compression_baselines(self.folder) if self.val_fraction else {}

    def rows(self, split: SplitName) -> PackedRows:
        """Return the rows of a split."""
        stream = self.opened.train if split == "train" else self.opened.val
        return PackedRows(
            stream,
            self.opened,
            seq_len=self.seq_len,
            mask_documents=self.mask_documents,
            full=split == "train",
        )
