"""What all training of a DeepSeek model shares: the model, its optimizer and schedule, and the routing biases."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ds_lightning.config import DeepSeekConfig
from ds_lightning.losses.load_balance import bias_update, expert_load
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import load_hf
from ds_lightning.nn.moe import Router
from ds_lightning.ops.topk_gate import Gate
from ds_lightning.optim import Schedule, WarmupStableDecay, build_optimizer
from ds_lightning.training.precision import ZeROPrecision
from ds_lightning.training.strategy import ZeRO

_CHANGEABLE = {"initializer_range", "max_position_embeddings", "rope_scaling"}
"""Fields in which a run may differ from the weights that it starts from: no tensor has another shape or meaning."""


class DeepSeekModule(pl.LightningModule):
    """A DeepSeek model in training; what is minimised is up to the two modules that build on this one.

    Args:
        config: Shape of the model.
        weights: Folder in Hugging Face layout to start from, safetensors only; none: random weights. A run that goes on
            from a checkpoint does not read it.
        optimizer: AdamW for all, or Muon for the matrices of hidden layers.
        lr: Peak learning rate.
        embedding_lr: Peak learning rate of the embedding; none: ``lr``. Its rows are looked up, not multiplied, so the
            rate that suits them does not fall with the width (Tensor Programs V, arXiv:2203.03466, table 3).
        lr_schedule: Factor on it as a function of progress; none: a short warm-up and a linear fall at the end.
        betas: Decay rates of AdamW's moments.
        eps: AdamW's epsilon.
        weight_decay: Decay of matrices.
        bias_update_speed: Step gamma of the selection bias, or a schedule of it; V3: 0.001, at the end 0.
        recompute: Trade time for memory: keep only the inputs of blocks for the backward pass.

    Raises:
        ValueError: If a number is out of range; in ``setup``, if the trainer clips gradients in another way.

    Attributes:
        tokens_seen: Tokens of completed optimizer steps, over all ranks.
        budget_progress: Share of the budget that is spent; a callback keeps it.
        expert_load: Tokens routed to each expert since the last optimizer step, [expert layers, experts] on this rank;
            MTP modules last; none before the first micro-batch or in a dense model.
        last_expert_load: The same for the last completed optimizer step, over all ranks.
        step_filter: Tells by the global norm of its gradient whether a step is to be skipped; a callback sets it.
        step_skipped: Whether the latest optimizer step was skipped: weights, optimizer and routing stayed as they were.
        skipped_steps: Optimizer steps of the run that were skipped; their tokens are seen all the same.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        *,
        weights: str | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        lr: float = 3e-4,
        embedding_lr: float | None = None,
        lr_schedule: Schedule | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        bias_update_speed: float | Schedule = 0.001,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("embedding_lr", embedding_lr), ("eps", eps)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {list(betas)}, expected two numbers from 0 to below 1")
        check_weights(weight_decay=weight_decay, bias_update_speed=bias_update_speed)
        self.config = config
        self.weights = weights
        self.optimizer = optimizer
        self.lr = lr
        self.embedding_lr = embedding_lr
        self.lr_schedule = lr_schedule or WarmupStableDecay()
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.bias_update_speed = bias_update_speed
        self.recompute = recompute
        self.model: DeepSeek | None = None
        self.tokens_seen = 0
        self.budget_progress = 0.0
        self.expert_load: Tensor | None = None
        self.last_expert_load: Tensor | None = None
        self.step_filter: Callable[[Tensor], Tensor] | None = None
        self.step_skipped: Tensor | bool = False
        self.skipped_steps: Tensor | int = 0
        self._step_tokens = 0

    @property
    @abstractmethod
    def planned_progress(self) -> float:
        """Share of the planned work that is done."""

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: of its plan or of its budget, whichever is further."""
        return min(max(self.planned_progress, self.budget_progress), 1.0)

    def setup(self, stage: str) -> None:
        """Check that gradients are to be clipped as is done here.

        Raises:
            ValueError: If not.
        """
        limit, algorithm = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        if limit is not None and not limit >= 0:
            raise ValueError(f"trainer.gradient_clip_val is {limit}, expected 0 or more")
        if algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm is {algorithm.value!r}, expected 'norm'")

    def configure_model(self) -> None:
        """Build the model, where the strategy wants it.

        Raises:
            ValueError: If the weights to start from are damaged, or those of a model with another shape.
        """
        if self.model is None:
            self.model = DeepSeek(self.config)
            if self._zero is not None:
                self._zero.draw(self.model, self.config.initializer_range)
            if self.weights is not None and self.trainer.ckpt_path is None:
                self._load_weights(self.weights)
            self.model.recompute = self.recompute

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and the learning rate as a function of progress."""
        optimizer = build_optimizer(
            self._built,
            self.optimizer,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            embedding_lr=self.embedding_lr,
        )
        schedule = LambdaLR(optimizer, lambda _: self.lr_schedule(self.progress))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the global norm, and log the norm before clipping and the learning rate of the step."""
        norm = torch.nn.utils.clip_grad_norm_(self._built.parameters(), gradient_clip_val or float("inf"))
        if self.step_filter is not None:
            self.step_skipped = self.step_filter(norm)
            optimizer.found_inf = self.step_skipped.float()  # read by the optimizer on the device: the host goes on
        self._log_optimizer_step(norm, optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and count the tokens of the step, before the schedule of the next one is asked."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.tokens_seen += self._step_tokens
            precision = self.trainer.precision_plugin
            if isinstance(precision, ZeROPrecision) and precision.outcome is not None:
                self._log_optimizer_step(precision.outcome.grad_norm, optimizer)
                self.step_skipped = torch.tensor(not precision.outcome.applied, device=self.device)
            if isinstance(self.step_skipped, Tensor):
                self.skipped_steps = self.skipped_steps + self.step_skipped
                self.log("train/skipped_steps", self.skipped_steps.float())

    @torch.no_grad()
    def step_routing_bias(self) -> None:
        """Move the selection biases once, on the load of the whole optimizer step over all ranks.

        The routers of MTP modules are among them. Micro-batches, evaluation and recomputation do not count by
        themselves: the load is noted in ``training_step``. That of a skipped step is dropped: the forward may have been
        as broken as the gradient.
        """
        if self.expert_load is None:
            return
        load: Tensor = self.trainer.strategy.reduce(self.expert_load, reduce_op="sum")
        gamma = self._now(self.bias_update_speed)
        routers = [module for module in self._built.modules() if isinstance(module, Router)][: len(load)]
        for router, layer_load in zip(routers, load, strict=True):
            bias = router.e_score_correction_bias
            if bias is not None:
                bias.copy_(self._unless_skipped(bias_update(layer_load, bias, gamma=gamma), bias))
        self.last_expert_load, self.expert_load = self._unless_skipped(load, self.last_expert_load), None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counters."""
        checkpoint["tokens_seen"], checkpoint["skipped_steps"] = self.tokens_seen, int(self.skipped_steps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counters."""
        self.tokens_seen = checkpoint["tokens_seen"]
        self.skipped_steps = checkpoint.get("skipped_steps", 0)  # a run from before skips were counted had none

    @property
    def _built(self) -> DeepSeek:
        assert self.model is not None, "configure_model() builds the model"
        return self.model

    @property
    def _zero(self) -> ZeRO | None:
        """The strategy, where it is ZeRO."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy if isinstance(strategy, ZeRO) else None

    @property
    def _share(self) -> int:
        """What a micro-batch's loss is multiplied by: Lightning divides by the accumulation and averages over ranks."""
        return int(self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _load_weights(self, folder: str) -> None:
        with self._zero.unsharded() if self._zero is not None else nullcontext():
            source = load_hf(folder)
        theirs, ours = asdict(source.config), asdict(self.config)
        for name in ours:
            if name not in _CHANGEABLE and theirs[name] != ours[name]:
                raise ValueError(
                    f"{folder} holds a model with {name} {theirs[name]}, the run's config has {ours[name]}, expected "
                    "equal shapes: set the config to that of the weights"
                )
        if self._zero is not None:
            self._zero.load(self._built, source.state_dict())
        else:
            self._built.load_state_dict(source.state_dict())

    def _log_optimizer_step(self, norm: Tensor | float, optimizer: Any) -> None:
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def _unless_skipped(self, after: Tensor, before: Tensor | None) -> Tensor:
        """Return what holds after the latest optimizer step."""
        if before is None or not isinstance(self.step_skipped, Tensor):
            return after
        return torch.where(self.step_skipped, before, after)

    def _now(self, value: float | Schedule) -> float:
        return value(self.progress) if isinstance(value, Schedule) else value

    @torch.no_grad()
    def _count_load(self, gates: list[Gate], counted: Tensor | None) -> None:
        """Note where tokens went: all of them, or those that are ``counted``, one truth value a token."""
        experts = self.config.n_routed_experts
        chosen = [gate.indices if counted is None else gate.indices[counted.flatten()] for gate in gates]
        load = torch.stack([expert_load(indices, experts) for indices in chosen])
        self.expert_load = load if self.expert_load is None else self.expert_load + load


def check_weights(**weights: float | Schedule) -> None:
    """Refuse negative weights of terms.

    Raises:
        ValueError: If one is.
    """
    for name, weight in weights.items():
        if not isinstance(weight, Schedule) and not weight >= 0:
            raise ValueError(f"{name} is {weight}, expected 0 or more")
