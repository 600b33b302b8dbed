"""Pretraining: the next-token objective around the model, as a LightningModule."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ds_lightning.config import DeepSeekConfig
from ds_lightning.losses.load_balance import bias_update, expert_load, sequence_balance_loss
from ds_lightning.losses.next_token import IGNORE, mtp_labels, next_token_loss
from ds_lightning.models import DeepSeek
from ds_lightning.nn.moe import Router
from ds_lightning.ops.topk_gate import Gate
from ds_lightning.optim import Schedule, WarmupStableDecay, build_optimizer
from ds_lightning.training.metrics import LanguageModelMetrics


class PretrainModule(pl.LightningModule):
    """Train a DeepSeek model to predict the next tokens.

    The loss of a step is the mean over the counted tokens of the whole global batch: each micro-batch brings its sum
    divided by that number, so accumulation and ranks change nothing but rounding.

    Args:
        config: Shape of the model.
        total_tokens: Planned tokens; schedules run over them.
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

    Raises:
        ValueError: If a number is out of range; in ``setup``, if model and data, or trainer, do not fit together.

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
        total_tokens: int,
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
        for name, value in (("total_tokens", total_tokens), ("lr", lr), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {list(betas)}, expected two numbers from 0 to below 1")
        weights = {
            "weight_decay": weight_decay,
            "mtp_loss_weight": mtp_loss_weight,
            "balance_loss_alpha": balance_loss_alpha,
            "bias_update_speed": bias_update_speed,
        }
        for name, weight in weights.items():
            if not isinstance(weight, Schedule) and not weight >= 0:
                raise ValueError(f"{name} is {weight}, expected 0 or more")
        self.config = config
        self.total_tokens = total_tokens
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
        self._step_nll: Tensor | float = 0.0

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: of its tokens or of its budget, whichever is further."""
        return min(max(self.tokens_seen / self.total_tokens, self.budget_progress), 1.0)

    def setup(self, stage: str) -> None:
        """Check that the model has a row for every token of the data, and that gradients are clipped as is done here.

        Raises:
            ValueError: If it has not, or they are not.
        """
        limit, algorithm = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        if limit is not None and not limit >= 0:
            raise ValueError(f"trainer.gradient_clip_val is {limit}, expected 0 or more")
        if algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm is {algorithm.value!r}, expected 'norm'")
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        shards = getattr(datamodule, "shards", None)
        if shards is not None and shards.manifest.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {datamodule.folder} has {shards.manifest.vocab_size} ids, the model's vocab_size is "
                f"{self.config.vocab_size}, expected at least as many: set the model's to the tokenizer's"
            )

    def configure_model(self) -> None:
        """Build the model, where the strategy wants it."""
        if self.model is None:
            self.model = DeepSeek(self.config)
            self.model.recompute = self.recompute

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the mean loss of the global batch."""
        model, gates = self._built, list[Gate]()
        input_ids, labels = batch["input_ids"], batch["labels"]
        segments = batch.get("segment_ids")
        hidden = model(input_ids, segment_ids=segments, gates=gates)
        nll = next_token_loss(hidden, model.lm_head.weight, labels)
        loss = nll
        if len(model.mtp):
            weight = self._now(self.mtp_loss_weight) / len(model.mtp)
            states = model.mtp_hidden(input_ids, hidden, segment_ids=segments, gates=gates)
            for depth, state in enumerate(states, start=1):
                loss = loss + weight * next_token_loss(state, model.lm_head.weight, mtp_labels(labels, depth))
        if gates:
            self._count_load(gates)
            if self.balance_loss_alpha:
                seq_len, topk = input_ids.shape[1], self.config.num_experts_per_tok
                balance = sum(sequence_balance_loss(gate.scores, topk, seq_len=seq_len) for gate in gates)
                loss = loss + self.balance_loss_alpha * seq_len * balance
        self._step_tokens = int(batch["step_tokens"])
        accumulate, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        self._step_nll = nll.detach() + (self._step_nll if batch_idx % accumulate else 0.0)
        if (batch_idx + 1) % accumulate == 0:
            self.log("train/loss", self._step_nll * ranks / self._step_tokens, prog_bar=True, sync_dist=True)
        # Lightning divides by the accumulation and takes the mean over ranks; the sum over both is wanted.
        return loss * (accumulate * ranks / self._step_tokens)

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

    def _now(self, value: float | Schedule) -> float:
        return value(self.progress) if isinstance(value, Schedule) else value

    @torch.no_grad()
    def _count_load(self, gates: list[Gate]) -> None:
        experts = self.config.n_routed_experts
        load = torch.stack([expert_load(gate.indices, experts) for gate in gates])
        self.expert_load = load if self.expert_load is None else self.expert_load + load

    def _token_bytes(self) -> Any:
        return self.trainer.datamodule.token_bytes.astype("int64")  # type: ignore[attr-defined]
