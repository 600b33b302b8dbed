"""The Lightning data module: prepared shards in, packed batches out, in an order that survives any restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import Any, NamedTuple, NotRequired, TypedDict

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Int64, UInt16
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from ds_lightning.data.corpus import OnBadUtf8
from ds_lightning.data.packing import counted_labels, document_segments, num_full_rows, num_rows, read_rows
from ds_lightning.data.preparation import prepare
from ds_lightning.data.sampler import BatchSchedule, StepPlan, micro_batch, row_order
from ds_lightning.data.shards import TokenShards, TokenStream


class Batch(TypedDict):
    """Rows of packed documents."""

    input_ids: Int64[torch.Tensor, "batch seq"]
    labels: Int64[torch.Tensor, "batch seq"]
    """The token after each of ``input_ids``; -100 is not counted."""
    segment_ids: NotRequired[Int64[torch.Tensor, "batch seq"]]
    """Index of the document within the row; only where attention should stay within documents."""
    step_tokens: int
    """Counted labels of the whole optimizer step over all ranks and micro-batches; in validation, of the batches of
    all ranks."""


class BatchRequest(NamedTuple):
    """Which rows make a batch, and the labels that its whole optimizer step counts."""

    rows: tuple[int, ...]
    step_tokens: int


class PackedBatches(Dataset[Batch]):
    """The batches of a split, one for each :class:`BatchRequest`."""

    def __init__(self, stream: TokenStream, *, seq_len: int, eos_id: int, pad_id: int, mask_documents: bool) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.mask_documents = mask_documents

    def __getitem__(self, request: BatchRequest) -> Batch:
        rows = np.array(request.rows, dtype=np.int64)
        inputs, labels = read_rows(self.stream, rows, self.seq_len, pad_id=self.pad_id)
        batch = Batch(
            input_ids=torch.from_numpy(inputs), labels=torch.from_numpy(labels), step_tokens=request.step_tokens
        )
        if self.mask_documents:
            batch["segment_ids"] = torch.from_numpy(document_segments(inputs, self.eos_id))
        return batch


class BatchLoader:
    """An iterable of batches whose length is the whole run and whose iteration begins where the run stands.

    Lightning counts the batches of a resumed run on from the checkpoint, so the length must be that of the whole. It is
    no ``DataLoader``: Lightning replaces the sampler of one when several ranks train.

    Args:
        batches: Where the batches come from.
        requests: The requests from where the run stands; called when an iteration begins.
        length: Batches of the whole run.
        num_workers: Processes that read ahead; 0: none. The batches and their order do not depend on it.
    """

    def __init__(
        self,
        batches: PackedBatches,
        requests: Callable[[], Iterator[BatchRequest]],
        length: int,
        num_workers: int,
    ) -> None:
        self.batches = batches
        self.requests = requests
        self.length = length
        self.num_workers = num_workers

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        # A generator of its own: a DataLoader without one draws from the global one, once more after every restart.
        yield from DataLoader(
            self.batches,
            batch_size=None,
            sampler=_Requests(self.requests),
            num_workers=self.num_workers,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the position. Lightning asks before it believes in resumption."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


class _Requests:
    """A sampler that yields batch requests."""

    def __init__(self, requests: Callable[[], Iterator[BatchRequest]]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.requests()


class TokenDataModule(pl.LightningDataModule):
    """Packed batches of a corpus for pretraining, each a :class:`Batch`.

    Which tokens an optimizer step sees depends on the seed and the tokens consumed before it, not on ranks,
    accumulation or workers. Documents are packed one after the other (DeepSeek-V3, arXiv:2412.19437, section 4.1).

    Args:
        sources: Files, directories, globs, ``hf:owner/name`` or ``python-stdlib``.
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
        seed: Of split, order and rearrangement.
        num_workers: Processes that read ahead.

    Raises:
        ValueError: If a number is out of range, and in ``setup`` if the corpus is too small.
    """

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
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if seed < 0 or num_workers < 0:
            raise ValueError(f"seed is {seed} and num_workers {num_workers}, expected 0 or more")
        self.sources = sources
        self.folder = folder
        self.tokenizer_path = tokenizer
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.val_fraction = val_fraction
        self.val_batch_size = val_batch_size
        self.fim_rate = fim_rate
        self.mask_documents = mask_documents
        self.on_bad_utf8 = on_bad_utf8
        self.text_key = text_key
        self.seed = seed
        self.num_workers = num_workers
        if ramp_multiple is None:
            ramp_multiple = gcd(batch_size, start_batch_size or batch_size)
        self.plan = StepPlan(
            BatchSchedule(batch_size, ramp_tokens, start_batch_size, ramp_multiple), seq_len, total_tokens
        )
        self.tokens_seen = 0
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
    def opened(self) -> TokenShards:
        """The shards; ``setup`` must have run."""
        assert self.shards is not None, "setup() opens the shards"
        return self.shards

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards."""
        return self.opened.tokenizer

    @property
    def token_bytes(self) -> UInt16[np.ndarray, " vocab"]:
        """Bytes of text each token id stands for; special tokens 0. For bits per byte."""
        return self.opened.token_bytes

    def train_dataloader(self) -> BatchLoader:
        """Return the micro-batches of this rank.

        Raises:
            ValueError: If ranks and accumulation cannot share the rows of a step evenly.
        """
        rank, world_size, accumulate = self._layout()
        plan, schedule = self.plan, self.plan.schedule
        for name, rows in (("batch_size", schedule.batch_size), ("ramp_multiple", schedule.multiple)):
            if rows % (world_size * accumulate):
                raise ValueError(
                    f"{name} is {rows} rows, expected a multiple of {world_size} ranks times accumulate_grad_batches "
                    f"{accumulate}"
                )
        size = num_full_rows(len(self.opened.train), self.seq_len)

        def requests() -> Iterator[BatchRequest]:
            for step in plan.steps(self.tokens_seen):
                for micro in range(accumulate):
                    positions = micro_batch(
                        step, self.seq_len, micro=micro, accumulate=accumulate, rank=rank, world_size=world_size
                    )
                    rows = row_order(size, positions.start, len(positions), seed=self.seed)
                    yield BatchRequest(tuple(rows.tolist()), step.rows * self.seq_len)

        return self._loader(self.opened.train, requests, plan.num_steps * accumulate)

    def val_dataloader(self) -> BatchLoader | Sequence[Batch]:
        """Return the held-out rows of this rank in order; all ranks have as many batches, the last ones padded."""
        if self.val_fraction == 0:
            return []
        rank, world_size, _ = self._layout()
        tokens, size = len(self.opened.val), self.val_batch_size
        length = -(-num_rows(tokens, self.seq_len) // (size * world_size))

        def requests() -> Iterator[BatchRequest]:
            for index in range(length):
                first = index * world_size * size
                counted = counted_labels(tokens, self.seq_len, first, first + world_size * size)
                start = first + rank * size
                yield BatchRequest(tuple(range(start, start + size)), counted)

        return self._loader(self.opened.val, requests, length)

    def _loader(self, stream: TokenStream, requests: Callable[[], Iterator[BatchRequest]], length: int) -> BatchLoader:
        manifest = self.opened.manifest
        batches = PackedBatches(
            stream,
            seq_len=self.seq_len,
            eos_id=manifest.eos_id,
            pad_id=manifest.pad_id,
            mask_documents=self.mask_documents,
        )
        return BatchLoader(batches, requests, length, self.num_workers)

    def _layout(self) -> tuple[int, int, int]:
        """Return rank, ranks and accumulation; one process without a trainer."""
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the tokens of the completed optimizer steps; what a step not completed has seen, it sees again."""
        if self.trainer is None or self.trainer.global_step == 0:
            return {"tokens_seen": self.tokens_seen}
        return {"tokens_seen": self.plan.step(self.trainer.global_step).tokens_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration begin where the state was taken.

        Raises:
            ValueError: If no step of this batch schedule begins there.
        """
        self.plan.step_at(state_dict["tokens_seen"])
        self.tokens_seen = state_dict["tokens_seen"]
