"""Pretraining and fine-tuning: the next-token objective around the model, as a LightningModule."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lightning.config import DeepSeekConfig
from ds_lightning.data import load_tokenizer
from ds_lightning.losses.load_balance import sequence_balance_loss
from ds_lightning.losses.next_token import IGNORE, mtp_labels, next_token_loss
from ds_lightning.ops.topk_gate import Gate
from ds_lightning.optim import Schedule
from ds_lightning.training.metrics import LanguageModelMetrics
from ds_lightning.training.module import DeepSeekModule, check_weights


class PretrainModule(DeepSeekModule):
    """Train a DeepSeek model to predict the next tokens: all of them in pretraining, those of answers in fine-tuning.

    The loss of a step is the mean over the counted labels of the whole global batch: each micro-batch brings its sum
    divided by that number, so accumulation and ranks change nothing but rounding. Padding, which fine-tuning has, is
    not counted in the load of experts.

    Args:
        config: Shape of the model.
        total_tokens: Planned tokens; schedules run over them. None: as many as the data plan, which count in epochs.
        mtp_loss_weight: Weight lambda of multi-token prediction, or a schedule of it; V3: 0.3, later 0.1.
        balance_loss_alpha: Weight of the sequence-wise balance loss; V3: 0.0001.
        options: As for :class:`~ds_lightning.training.module.DeepSeekModule`.

    Raises:
        ValueError: If a number is out of range; in ``setup``, if model and data, or trainer, do not fit together.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        total_tokens: int | None = None,
        *,
        mtp_loss_weight: float | Schedule = 0.3,
        balance_loss_alpha: float = 0.0001,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        if total_tokens is not None and total_tokens <= 0:
            raise ValueError(f"total_tokens is {total_tokens}, expected more than 0")
        check_weights(mtp_loss_weight=mtp_loss_weight, balance_loss_alpha=balance_loss_alpha)
        self.total_tokens = total_tokens
        self.mtp_loss_weight = mtp_loss_weight
        self.balance_loss_alpha = balance_loss_alpha
        self.metrics = LanguageModelMetrics()
        self._step_nll: Tensor | float = 0.0

    @property
    def planned_progress(self) -> float:
        """Tokens seen over tokens planned."""
        assert self.total_tokens is not None, "setup() takes the data's"
        return self.tokens_seen / self.total_tokens

    def setup(self, stage: str) -> None:
        """Take the data's number of tokens where none is given, and check that the model knows the data's tokenizer.

        Raises:
            ValueError: If it does not, or gradients are to be clipped otherwise than is done here.
        """
        super().setup(stage)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.total_tokens is None:
            self.total_tokens = datamodule.plan.total_tokens
        shards = getattr(datamodule, "shards", None)
        if shards is not None and shards.manifest.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {datamodule.folder} has {shards.manifest.vocab_size} ids, the model's vocab_size is "
                f"{self.config.vocab_size}, expected at least as many: set the model's to the tokenizer's"
            )
        beside = None if self.weights is None else Path(self.weights) / "tokenizer.json"
        if shards is not None and beside is not None and beside.is_file():
            ours, theirs = shards.tokenizer.get_vocab(), load_tokenizer(beside).get_vocab()
            if ours != theirs:
                raise ValueError(
                    f"the tokenizer in {datamodule.folder} gives {len(ours.items() - theirs.items())} of {len(ours)} "
                    f"tokens other ids than {beside}, expected the tokenizer that the weights were trained with"
                )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the mean loss of the global batch."""
        model, gates = self._built, list[Gate]()
        input_ids, labels = batch["input_ids"], batch["labels"]
        segments = batch.get("segment_ids")
        step_tokens, step_labels = int(batch["step_tokens"]), int(batch["step_labels"])
        hidden = model(input_ids, segment_ids=segments, gates=gates)
        nll = next_token_loss(hidden, model.lm_head.weight, labels)
        loss = nll
        if len(model.mtp):
            weight = self._now(self.mtp_loss_weight) / len(model.mtp)
            states = model.mtp_hidden(input_ids, hidden, segment_ids=segments, gates=gates)
            for depth, state in enumerate(states, start=1):
                loss = loss + weight * next_token_loss(state, model.lm_head.weight, mtp_labels(labels, depth))
        if gates:
            self._count_load(gates, None if segments is None else segments >= 0)
            if self.balance_loss_alpha:
                seq_len, topk = input_ids.shape[1], self.config.num_experts_per_tok
                balance = sum(sequence_balance_loss(gate.scores, topk, seq_len=seq_len) for gate in gates)
                # Its mean is over all tokens; what is divided by below are the labels.
                loss = loss + self.balance_loss_alpha * (seq_len * step_labels / step_tokens) * balance
        self._step_tokens = step_tokens
        self._log_loss(nll.detach(), step_labels, batch_idx)
        return loss * (self._share / step_labels)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        labels = batch["labels"]
        hidden = self._built(batch["input_ids"], segment_ids=batch.get("segment_ids"))
        nll = next_token_loss(hidden, self._built.lm_head.weight, labels)
        counted = labels[labels != IGNORE]
        token_bytes = torch.as_tensor(self._token_bytes(), device=labels.device)
        self.metrics.update(nll, counted.numel(), int(token_bytes[counted].sum()))

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte of all validation batches."""
        self.log_dict(self.metrics.compute(), prog_bar=False)
        self.metrics.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the hidden states of a batch."""
        hidden: Tensor = self._built(batch["input_ids"], segment_ids=batch.get("segment_ids"))
        return hidden

    def _log_loss(self, nll: Tensor, step_labels: int, batch_idx: int) -> None:
        """Log the loss of an optimizer step when its last micro-batch has come."""
        accumulate, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        self._step_nll = nll + (self._step_nll if batch_idx % accumulate else 0.0)
        if (batch_idx + 1) % accumulate == 0:
            self.log("train/loss", self._step_nll * ranks / step_labels, prog_bar=True, sync_dist=True)

    def _token_bytes(self) -> Any:
        return self.trainer.datamodule.token_bytes.astype("int64")  # type: ignore[attr-defined]
