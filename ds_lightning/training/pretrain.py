"""Pretraining and fine-tuning: the next-token objective around the model, as a LightningModule."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ds_lightning.config import DeepSeekConfig
from ds_lightning.data import load_tokenizer
from ds_lightning.losses.load_balance import bias_update, expert_load, sequence_balance_loss
from ds_lightning.losses.next_token import IGNORE, mtp_labels, next_token_loss
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import load_hf
from ds_lightning.nn.moe import Router
from ds_lightning.ops.topk_gate import Gate
from ds_lightning.optim import Schedule, WarmupStableDecay, build_optimizer
from ds_lightning.training.metrics import LanguageModelMetrics

_CHANGEABLE = {"initializer_range", "max_position_embeddings", "rope_scaling"}
"""Fields in which a run may differ from the weights that it starts from: no tensor has another shape or meaning."""


class PretrainModule(pl.LightningModule):
    """Train a DeepSeek model to predict the next tokens: all of them in pretraining, those of answers in fine-tuning.

    The loss of a step is the mean over the counted labels of the whole global batch: each micro-batch brings its sum
    divided by that number, so accumulation and ranks change nothing but rounding. Padding, which fine-tuning has, is
    not counted in the load of experts.

    Args:
        config: Shape of the model.
        total_tokens: Planned tokens; schedules run over them. None: as many as the data plan, which count in epochs.
        weights: Folder in Hugging Face layout to start from, safetensors only; none: random weights. A run that goes on
            from a checkpoint does not read it.
        optimizer: AdamW for all, or Muon for the matrices of hidden layers.
        lr: Peak learning rate.
        lr_schedule: Factor on it as a function of progress; none: a short warm-up and a linear fall at the end.
        betas: Decay rates of AdamW's moments.
        eps: AdamW's epsilon.
        weight_decay: Decay of matrices.
        mtp_loss_weight: Weight lambda of multi-token prediction, or a schedule of it; V3: 0.3, later 0.1.
        balance_loss_alpha: Weight of the sequence-wise balance loss; V3: 0.0001.
        bias_update_speed: Step gamma of the selection bias, or a schedule of it; V3: 0.001, at the end 0.
        recompute: Trade time for memory: keep only the inputs of blocks for the backward pass.

    Attributes:
        tokens_seen: Tokens of completed optimizer steps, over all ranks.
        budget_progress: Share of the budget that is spent; a callback keeps it.
        expert_load: Tokens routed to each expert since the last optimizer step, [expert layers, experts] on this rank;
            MTP modules last; none before the first micro-batch or in a dense model.
        last_expert_load: The same for the last completed optimizer step, over all ranks.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        total_tokens: int | None = None,
        weights: str | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        lr: float = 3e-4,
        lr_schedule: Schedule | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        mtp_loss_weight: float | Schedule = 0.3,
        balance_loss_alpha: float = 0.0001,
        bias_update_speed: float | Schedule = 0.001,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("total_tokens", total_tokens), ("lr", lr)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, expected more than 0")
        self.config = config
        self.total_tokens = total_tokens
        self.weights = weights
        self.optimizer = optimizer
        self.lr = lr
        self.lr_schedule = lr_schedule or WarmupStableDecay()
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.mtp_loss_weight = mtp_loss_weight
        self.balance_loss_alpha = balance_loss_alpha
        self.bias_update_speed = bias_update_speed
        self.recompute = recompute
        self.model: DeepSeek | None = None
        self.metrics = LanguageModelMetrics()
        self.tokens_seen = 0
        self.budget_progress = 0.0
        self.expert_load: Tensor | None = None
        self.last_expert_load: Tensor | None = None
        self._step_tokens = 0

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: of its tokens or of its budget, whichever is further."""
        assert self.total_tokens is not None, "setup() takes the data's"
        return min(max(self.tokens_seen / self.total_tokens, self.budget_progress), 1.0)

    def setup(self, stage: str) -> None:
        """Take the data's number of tokens where none is given, and check that the model knows the data's tokenizer.

        Raises:
            ValueError: If it does not.
        """
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

    def configure_model(self) -> None:
        """Build the model, where the strategy wants it.

        Raises:
            ValueError: If the weights to start from are damaged, or those of a model with another shape.
        """
        if self.model is None:
            self.model = DeepSeek(self.config)
            if self.weights is not None and self.trainer.ckpt_path is None:
                self._load_weights(self.weights)
            self.model.recompute = self.recompute

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
            self._count_load(gates, segments)
            if self.balance_loss_alpha:
                seq_len, topk = input_ids.shape[1], self.config.num_experts_per_tok
                balance = sum(sequence_balance_loss(gate.scores, topk, seq_len=seq_len) for gate in gates)
                # Its mean is over all tokens; what is divided by below are the labels.
                loss = loss + self.balance_loss_alpha * (seq_len * step_labels / step_tokens) * balance
        self._step_tokens = step_tokens
        # Lightning divides by the accumulation and takes the mean over ranks; the sum over both is wanted.
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size / step_labels
        self.log("train/loss", nll.detach() * share, prog_bar=True, sync_dist=True)
        return loss * share

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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and the learning rate as a function of progress."""
        optimizer = build_optimizer(
            self._built, self.optimizer, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        schedule = LambdaLR(optimizer, lambda _: self.lr_schedule(self.progress))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the global norm, and log the norm before clipping and the learning rate of the step."""
        norm = torch.nn.utils.clip_grad_norm_(self._built.parameters(), gradient_clip_val or float("inf"))
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and count the tokens of the step, before the schedule of the next one is asked."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.tokens_seen += self._step_tokens

    @torch.no_grad()
    def step_routing_bias(self) -> None:
        """Move the selection biases once, on the load of the whole optimizer step over all ranks.

        The routers of MTP modules are among them. Micro-batches, evaluation and recomputation do not count by
        themselves: the load is noted in ``training_step``.
        """
        if self.expert_load is None:
            return
        load: Tensor = self.trainer.strategy.reduce(self.expert_load, reduce_op="sum")
        gamma = self._now(self.bias_update_speed)
        routers = [module for module in self._built.modules() if isinstance(module, Router)]
        assert len(routers) == len(load), "routers and noted loads differ in number"
        for router, layer_load in zip(routers, load, strict=True):
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.copy_(
                    bias_update(layer_load, router.e_score_correction_bias, gamma=gamma)
                )
        self.last_expert_load, self.expert_load = load, None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokens seen."""
        checkpoint["tokens_seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the tokens seen."""
        self.tokens_seen = checkpoint["tokens_seen"]

    @property
    def _built(self) -> DeepSeek:
        assert self.model is not None, "configure_model() builds the model"
        return self.model

    def _load_weights(self, folder: str) -> None:
        source = load_hf(folder)
        theirs, ours = asdict(source.config), asdict(self.config)
        for name in ours:
            if name not in _CHANGEABLE and theirs[name] != ours[name]:
                raise ValueError(
                    f"{folder} holds a model with {name} {theirs[name]}, the run's config has {ours[name]}, expected "
                    "equal shapes: set the config to that of the weights"
                )
        self._built.load_state_dict(source.state_dict())

    def _now(self, value: float | Schedule) -> float:
        return value(self.progress) if isinstance(value, Schedule) else value

    @torch.no_grad()
    def _count_load(self, gates: list[Gate], segments: Tensor | None) -> None:
        experts = self.config.n_routed_experts
        chosen = [gate.indices if segments is None else gate.indices[segments.flatten() >= 0] for gate in gates]
        load = torch.stack([expert_load(indices, experts) for indices in chosen])
        self.expert_load = load if self.expert_load is None else self.expert_load + load

    def _token_bytes(self) -> Any:
        return self.trainer.datamodule.token_bytes.astype("int64")  # type: ignore[attr-defined]
