"""Reinforcement learning on rollouts: group relative policy optimization, as a LightningModule."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ds_lightning.config import DeepSeekConfig
from ds_lightning.generation import rollout_gap
from ds_lightning.losses.policy import VARIANTS, Totals
from ds_lightning.models import DeepSeek
from ds_lightning.ops.shared_prompts import SharedPrompts
from ds_lightning.ops.token_logprobs import token_logprobs
from ds_lightning.ops.topk_gate import Gate
from ds_lightning.optim import Schedule
from ds_lightning.rl.experience import Experience
from ds_lightning.training.exchange import from_all_ranks
from ds_lightning.training.module import DeepSeekModule
from ds_lightning.training.strategy import whole_weights

GAP_ROWS = 16
"""Completions of a rollout that are run without replay, to see how far the sampler is from the training forward."""


class GRPOModule(DeepSeekModule):
    """Train a DeepSeek model on completions and their advantages, which :class:`RolloutDataModule` brings.

    DeepSeek-R1 (arXiv:2501.12948v2, section 2.1). The loss of a step is that of its whole global batch: each
    micro-batch brings its share. A batch's routing is replayed in training: where a mixture of experts would choose
    other experts than the sampler did, ratios of probabilities lose their meaning.

    Args:
        config: Shape of the model.
        loss_type: One of the losses of :data:`~ds_lightning.losses.policy.VARIANTS`.
        epsilon: How far a probability ratio may fall below 1; none: the loss's own.
        epsilon_high: How far it may rise above 1; none: the loss's own. R1: 10.
        delta: Upper bound of ratios whatever the sign of the advantage; none: none.
        beta: Weight of the KL term to the reference policy; 0: no reference is kept. R1: 0.001.
        ref_update_steps: Optimizer steps after which the reference is replaced by the policy; none: never. R1: 400.
        rollout_cap: Bound of the weight that corrects for the sampler's own rounding (truncated importance sampling);
            none: no correction.
        replay_routing: Take the experts that the sampler took.
        bias_update_speed: Step of the selection biases; 0: they stay as pretraining left them.
        options: As for :class:`~ds_lightning.training.module.DeepSeekModule`.

    Raises:
        ValueError: If a number is out of range; in ``setup``, if the data are no rollouts.

    Attributes:
        steps_done: Optimizer steps completed.
        useful_samples: Completions with a gradient that it trained on, over all ranks.
        total_tokens: The most that answers can have; for the progress bar.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        *,
        loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo"] = "grpo",
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        delta: float | None = None,
        beta: float = 0.0,
        ref_update_steps: int | None = None,
        rollout_cap: float | None = 2.0,
        replay_routing: bool = True,
        bias_update_speed: float | Schedule = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(config, bias_update_speed=bias_update_speed, **options)
        for name, value in (("epsilon", epsilon), ("epsilon_high", epsilon_high), ("rollout_cap", rollout_cap)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0 or null")
        if not beta >= 0:
            raise ValueError(f"beta is {beta}, expected 0 or more")
        if ref_update_steps is not None and ref_update_steps < 1:
            raise ValueError(f"ref_update_steps is {ref_update_steps}, expected at least 1 or null")
        self.loss_type = loss_type
        self.bounds = {"epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
        self.beta = beta
        self.ref_update_steps = ref_update_steps
        self.rollout_cap = rollout_cap
        self.replay_routing = replay_routing
        self.reference: DeepSeek | None = None
        self.steps_done = 0
        self.useful_samples = 0
        self.total_tokens = 0
        self._step_samples = 0
        self._step_metrics: dict[str, Tensor] = {}

    @property
    def planned_progress(self) -> float:
        """Optimizer steps done over optimizer steps planned."""
        return self.steps_done / int(self._rollouts.num_steps)

    def setup(self, stage: str) -> None:
        """Check that the data are rollouts.

        Raises:
            ValueError: If they are not, or gradients are to be clipped otherwise than is done here.
        """
        super().setup(stage)
        if not hasattr(self._rollouts, "num_generations"):
            raise ValueError(
                f"data is a {type(self._rollouts).__name__}, expected ds_lightning.rl.rollouts.RolloutDataModule"
            )
        rollout = self._rollouts.prompts * self._rollouts.num_generations * self._rollouts.max_completion_length
        self.total_tokens = rollout * self._rollouts.rollouts

    def configure_model(self) -> None:
        """Build the policy, and the reference where there is a KL term; prediction modules do not learn here.

        Raises:
            ValueError: If the weights to start from are damaged, or those of a model with another shape.
        """
        super().configure_model()
        self._built.mtp.requires_grad_(False)
        if self.beta > 0 and self.reference is None:
            self.reference = self._copy_of_policy().requires_grad_(False)

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the loss of the optimizer step."""
        logprobs, entropy = self.logprobs(self._built, batch)
        settings: dict[str, Any] = {name: value for name, value in self.bounds.items() if value is not None}
        if self.rollout_cap is not None:
            settings |= {"rollout_logprobs": batch["rollout_logprobs"], "rollout_cap": self.rollout_cap}
        loss, metrics = VARIANTS[self.loss_type](
            logprobs,
            batch["advantages"],
            batch["mask"],
            Totals(*batch["totals"]),
            beta=self.beta,
            old_logprobs=batch.get("old_logprobs"),
            ref_logprobs=batch.get("ref_logprobs"),
            entropy=entropy,
            **settings,
        )
        self._step_tokens, self._step_samples = int(batch["step_tokens"]), int(batch["step_samples"])
        self._log_step({"train/loss": loss.detach(), **metrics}, batch_idx)
        if batch["metrics"]:
            self.log_dict(batch["metrics"])
        return loss * self._share

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: what is measured on held-out problems, a callback measures."""

    test_step = validation_step

    def logprobs(
        self, model: DeepSeek, batch: Experience, *, replay: bool | None = None, gates: list[Gate] | None = None
    ) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
        """Return log-probability and entropy of every token of the completions, at the temperature of sampling.

        A prompt is computed once for all of its completions.

        Args:
            model: Policy or reference.
            batch: Completions.
            replay: Whether the sampler's experts are taken; none: as the run does.
            gates: Where given, the routers' decisions are appended.
        """
        gates = [] if gates is None else gates
        shared = SharedPrompts(
            batch["prompt"], batch["prompt_lengths"], batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
        )
        routing = None
        if (self.replay_routing if replay is None else replay) and "routing" in batch:
            routing = torch.cat((batch["prompt_routing"].flatten(1, 2), batch["routing"].flatten(1, 2)), 1).unsqueeze(1)
        input_ids = torch.cat((batch["prompt_ids"].flatten(), batch["completion_ids"].flatten()))
        hidden = model(input_ids.unsqueeze(0), gates=gates, routing=routing, shared=shared)
        if model is self.model and torch.is_grad_enabled() and gates:
            of_prompts = torch.zeros_like(batch["prompt_ids"], dtype=torch.bool)
            self._count_load(gates, torch.cat((of_prompts.flatten(), batch["mask"].flatten())))
        targets = batch["completion_ids"].masked_fill(~batch["mask"], -100)
        logprobs, entropy = token_logprobs(
            shared.predicting(hidden).flatten(0, 1), model.lm_head.weight, targets.flatten(), self._rollouts.temperature
        )
        return logprobs.view_as(targets), entropy.view_as(targets)

    @contextmanager
    def sampler(self) -> Iterator[DeepSeek]:
        """Hold the policy's weights in full on every rank, and run it in the precision of training."""
        with (
            whole_weights(self.trainer.strategy, self._built) as model,
            self.trainer.precision_plugin.forward_context(),
        ):
            yield model

    def from_all_ranks(self, make: Callable[[], Any]) -> list[Any]:
        """Make this rank's part of a rollout, and return those of all: :func:`exchange.from_all_ranks`."""
        return from_all_ranks(self.trainer, make)

    @torch.no_grad()
    def prepare(self, steps: list[list[Experience]], sampler: DeepSeek) -> None:
        """Add to a rollout what the loss needs of the weights that sampled, and measure the sampler.

        Strictly on-policy there is no pass for old log-probabilities: the weights are the same.

        Args:
            steps: Micro-batches of each step.
            sampler: From :meth:`sampler`.
        """
        micro_batches = [micro for step in steps for micro in step]
        for micro in micro_batches if len(steps) > 1 else ():
            micro["old_logprobs"] = self.logprobs(sampler, self._on_device(micro))[0].cpu()
        steps[0][0]["metrics"] |= self._sampler_gap(sampler, micro_batches[0])

    @torch.no_grad()
    def add_reference(self, steps: list[list[Experience]]) -> None:
        """Add to a rollout what the loss needs of the reference, where there is one."""
        if self.reference is None:
            return
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        with whole_weights(strategy, self.reference) as reference, precision.forward_context():
            for micro in (micro for step in steps for micro in step):
                micro["ref_logprobs"] = self.logprobs(reference, self._on_device(micro))[0].cpu()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, count, and let the reference follow when it is due."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        self.steps_done += 1
        self.useful_samples += self._step_samples
        if self.reference is not None and self.ref_update_steps and self.steps_done % self.ref_update_steps == 0:
            if self._zero is None:
                self.reference.load_state_dict(self._built.state_dict())
            else:
                self._zero.copy(self._built, self.reference)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counters."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["steps_done"], checkpoint["useful_samples"] = self.steps_done, self.useful_samples

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counters."""
        super().on_load_checkpoint(checkpoint)
        self.steps_done, self.useful_samples = checkpoint["steps_done"], checkpoint["useful_samples"]

    @property
    def _rollouts(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _copy_of_policy(self) -> DeepSeek:
        """Return a model of the policy's weights, sharded as they are."""
        if self._zero is None or self._zero.stage < 3:
            return copy.deepcopy(self._built)
        model = DeepSeek(self.config)
        self._zero.draw(model, self.config.initializer_range)
        self._zero.copy(self._built, model)
        return model

    def _on_device(self, micro: Experience) -> Experience:
        moved: Experience = self.trainer.strategy.batch_to_device(micro)
        return moved

    def _sampler_gap(self, sampler: DeepSeek, micro: Experience) -> dict[str, float]:
        """Compare answers to some prompts, on every rank, with the training forward where it chooses experts itself."""
        some, rows = micro.copy(), micro["prompt"].argsort(stable=True)[:GAP_ROWS]
        for name in ("prompt", "completion_ids", "mask", "rollout_logprobs"):
            some[name] = some[name][rows]
        prompts, some["prompt"] = some["prompt"].unique(return_inverse=True)
        some["prompt_ids"], some["prompt_lengths"] = some["prompt_ids"][prompts], some["prompt_lengths"][prompts]
        gates = list[Gate]()
        logprobs, _ = self.logprobs(sampler, self._on_device(some), replay=False, gates=gates)
        recorded, chosen = None, None
        if "routing" in micro:
            recorded = micro["routing"][:, rows]
            of_prompts = some["prompt_ids"].numel()
            chosen = torch.stack([gate.indices[of_prompts:].view(recorded.shape[1:]) for gate in gates])
            chosen = chosen.to("cpu", recorded.dtype)
        gap = rollout_gap(some["rollout_logprobs"], logprobs.cpu(), some["mask"], recorded, chosen)
        figures = {
            "sampling/gap_logprob_max": (gap.max_logprob, "max"),
            "sampling/gap_logprob_mean": (gap.mean_logprob, "mean"),
            "sampling/gap_routing": (gap.changed_routing, "mean"),
        }
        strategy = self.trainer.strategy
        return {
            name: float(strategy.reduce(value.to(self.device), reduce_op=operation))
            for name, (value, operation) in figures.items()
        }

    def _log_step(self, metrics: dict[str, Tensor], batch_idx: int) -> None:
        """Log the metrics of an optimizer step when its last micro-batch has come."""
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self._step_metrics = {}
        for name, value in metrics.items():
            earlier = self._step_metrics.get(name)
            if earlier is not None:
                combine = {"min": torch.minimum, "max": torch.maximum}.get(name[-3:], torch.add)
                value = combine(earlier, value)
            self._step_metrics[name] = value
        if (batch_idx + 1) % accumulate == 0:
            ranks = self.trainer.world_size
            for name, value in self._step_metrics.items():
                extreme = name[-3:] if name[-3:] in ("min", "max") else None
                self.log(name, value if extreme else value * ranks, sync_dist=True, reduce_fx=extreme or "mean")
