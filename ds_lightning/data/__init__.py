"""From text to batches: corpus, tokenizer, token shards, packing, order, and the Lightning data module.

``TokenDataModule`` alone needs Lightning, which is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_lightning.data.corpus import Corpus, Document
from ds_lightning.data.preparation import prepare
from ds_lightning.data.sampler import BatchSchedule, StepPlan
from ds_lightning.data.shards import Manifest, TokenShards, TokenStream, compression_baselines
from ds_lightning.data.tokenizer import load_tokenizer, token_bytes, train_tokenizer

if TYPE_CHECKING:
    from ds_lightning.data.datamodule import TokenDataModule

__all__ = [
    "BatchSchedule",
    "Corpus",
    "Document",
    "Manifest",
    "StepPlan",
    "TokenDataModule",
    "TokenShards",
    "TokenStream",
    "compression_baselines",
    "load_tokenizer",
    "prepare",
    "token_bytes",
    "train_tokenizer",
]


def __getattr__(name: str) -> object:
    if name == "TokenDataModule":
        from ds_lightning.data.datamodule import TokenDataModule

        return TokenDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
