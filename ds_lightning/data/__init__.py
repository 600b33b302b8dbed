"""From text and conversations to batches: corpus, tokenizer, token shards, packing, order, Lightning data modules.

The data modules need Lightning, which is imported when one of them is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_lightning.data.chat import ChatTemplate, chat_tokenizer
from ds_lightning.data.chat_rows import prepare_conversations
from ds_lightning.data.corpus import Corpus, Document
from ds_lightning.data.preparation import prepare
from ds_lightning.data.sampler import BatchSchedule, StepPlan
from ds_lightning.data.shards import Manifest, TokenShards, TokenStream, compression_baselines
from ds_lightning.data.tokenizer import load_tokenizer, token_bytes, train_tokenizer

if TYPE_CHECKING:
    from ds_lightning.data.datamodule import TokenDataModule
    from ds_lightning.data.sft import SFTDataModule

__all__ = [
    "BatchSchedule",
    "ChatTemplate",
    "Corpus",
    "Document",
    "Manifest",
    "SFTDataModule",
    "StepPlan",
    "TokenDataModule",
    "TokenShards",
    "TokenStream",
    "chat_tokenizer",
    "compression_baselines",
    "load_tokenizer",
    "prepare",
    "prepare_conversations",
    "token_bytes",
    "train_tokenizer",
]


def __getattr__(name: str) -> object:
    if name == "TokenDataModule":
        from ds_lightning.data.datamodule import TokenDataModule

        return TokenDataModule
    if name == "SFTDataModule":
        from ds_lightning.data.sft import SFTDataModule

        return SFTDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
