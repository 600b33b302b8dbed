"""Batches of rows for Lightning, in an order that survives any restart; what a row holds, others say."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import DataLoader, Dataset

from ds_lightning.data.sampler import StepPlan, micro_batch, row_order
from ds_lightning.data.shards import SplitName, TokenShards


class Batch(TypedDict):
    """Rows of packed documents or conversations."""

    input_ids: Int64[torch.Tensor, "batch seq"]
    labels: Int64[torch.Tensor, "batch seq"]
    """The token after each of ``input_ids``; -100 is not counted."""
    segment_ids: NotRequired[Int64[torch.Tensor, "batch seq"]]
    """Index of the document within the row, -1 for padding; only where attention should stay within documents."""
    step_tokens: int
    """Tokens of the whole optimizer step over all ranks and micro-batches, what it counts as progress; in validation,
    of the batches of all ranks."""
    step_labels: int
    """Counted labels among them, what its loss is divided by."""


class BatchRequest(NamedTuple):
    """Which rows make a batch, and the tokens and counted labels of its whole optimizer step."""

    rows: tuple[int, ...]
    step_tokens: int
    step_labels: int


class Rows(Dataset[Batch]):
    """The rows of a split: batches of them, one for each :class:`BatchRequest`; rows past the end are padding."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows; in training, of an epoch."""

    @abstractmethod
    def __getitem__(self, request: BatchRequest) -> Batch:
        """Return the rows of a request."""

    @abstractmethod
    def counted(self, rows: Int64[np.ndarray, " rows"]) -> int:
        """Return how many labels some rows have that are counted."""


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
        batches: Rows,
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


class RowDataModule(pl.LightningDataModule):
    """Loaders of training and validation over the rows of two splits, and the position of the run among them.

    Which rows an optimizer step sees depends on the seed and the tokens consumed before it, not on ranks, accumulation
    or workers.

    Args:
        seq_len: Tokens of a row.
        val_fraction: Part that is held out; 0: no validation.
        val_batch_size: Rows of a validation batch on each rank.
        seed: Of the order.
        num_workers: Processes that read ahead.

    Attributes:
        plan: The steps of the run; whoever inherits sets it, in ``setup`` at the latest.
        tokens_seen: Tokens of the steps completed before this process.

    Raises:
        ValueError: If a number is out of range.
    """

    plan: StepPlan
    folder: str
    shards: TokenShards | None
    stage: str
    """What a run on these data is called in its report."""

    def __init__(self, *, seq_len: int, val_fraction: float, val_batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        for name, value in (("seq_len", seq_len), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if seed < 0 or num_workers < 0:
            raise ValueError(f"seed is {seed} and num_workers {num_workers}, expected 0 or more")
        self.seq_len = seq_len
        self.val_fraction = val_fraction
        self.val_batch_size = val_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.tokens_seen = 0

    @abstractmethod
    def rows(self, split: SplitName) -> Rows:
        """Return the rows of a split; ``setup`` must have run."""

    @property
    def opened(self) -> TokenShards:
        """The prepared shards; ``setup`` must have run."""
        assert self.shards is not None, "setup() opens the shards"
        return self.shards

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, which exports carry along."""
        return self.opened.folder / "tokenizer.json"

    @property
    def eos_id(self) -> int:
        """End of a text."""
        return self.opened.manifest.eos_id

    @property
    def pad_id(self) -> int:
        """Padding."""
        return self.opened.manifest.pad_id

    def train_dataloader(self) -> BatchLoader:
        """Return the micro-batches of this rank.

        Raises:
            ValueError: If ranks and accumulation cannot share the rows of a step evenly.
        """
        rank, world_size, accumulate = self._layout()
        plan, schedule, seq_len = self.plan, self.plan.schedule, self.seq_len
        for name, rows in (("batch_size", schedule.batch_size), ("ramp_multiple", schedule.multiple)):
            if rows % (world_size * accumulate):
                raise ValueError(
                    f"{name} is {rows} rows, expected a multiple of {world_size} ranks times accumulate_grad_batches "
                    f"{accumulate}"
                )
        train = self.rows("train")

        def requests() -> Iterator[BatchRequest]:
            for step in plan.steps(self.tokens_seen):
                begin = step.tokens_before // seq_len
                order = row_order(len(train), begin, step.rows, seed=self.seed)
                labels = train.counted(order)
                for micro in range(accumulate):
                    positions = micro_batch(
                        step, seq_len, micro=micro, accumulate=accumulate, rank=rank, world_size=world_size
                    )
                    chosen = order[positions.start - begin : positions.stop - begin]
                    yield BatchRequest(tuple(chosen.tolist()), step.rows * seq_len, labels)

        return BatchLoader(train, requests, plan.num_steps * accumulate, self.num_workers)

    def val_dataloader(self) -> BatchLoader | Sequence[Batch]:
        """Return the held-out rows of this rank in order; all ranks have as many batches, the last ones padded."""
        if self.val_fraction == 0:
            return []
        rank, world_size, _ = self._layout()
        val, size = self.rows("val"), self.val_batch_size
        length = -(-len(val) // (size * world_size))

        def requests() -> Iterator[BatchRequest]:
            for index in range(length):
                first = index * world_size * size
                together = np.arange(first, first + world_size * size)
                start = first + rank * size
                yield BatchRequest(
                    tuple(range(start, start + size)), len(together) * self.seq_len, val.counted(together)
                )

        return BatchLoader(val, requests, length, self.num_workers)

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
