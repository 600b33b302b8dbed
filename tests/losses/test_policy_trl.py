"""Oracle: the loss and the metrics of TRL's GRPOTrainer, run on the same numbers without a model."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lightning.losses.policy import VARIANTS
from tests.losses.test_policy import MAX_TOKENS, TOTALS, draw

pytestmark = pytest.mark.slow  # importing trl takes longer than all that is tested here

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")


def trl_loss(case: dict[str, Any], loss_type: str, level: str, entropy: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss and the metrics of a trainer that is asked for nothing but them."""
    accelerator = SimpleNamespace(
        num_processes=1, is_main_process=False, reduce=lambda x, reduction: x, gather=lambda x: x
    )
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=0.04,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        args=SimpleNamespace(delta=1.6, use_bias_correction_kl=False),
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        accelerator=accelerator,
        model=SimpleNamespace(training=False),
        max_completion_length=MAX_TOKENS,
        _entropy_bonus_enabled=False,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (case["logprobs"], entropy, None),
    )
    trainer._compute_loss = partial(grpo_trainer.GRPOTrainer._compute_loss, trainer)
    mask = case["mask"].long()
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1),
        "prompt_mask": torch.ones(len(mask), 1),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": case["advantages"],
        "old_per_token_logps": case["old_logprobs"],
        "ref_per_token_logps": case["ref_logprobs"],
        "importance_sampling_ratio": (case["old_logprobs"] - case["rollout_logprobs"]).exp().clamp(max=1.5),
        "num_items_in_batch": mask.sum(),
    }
    loss = grpo_trainer.GRPOTrainer.compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics_are_those_of_trl(variant: str) -> None:
    case = draw()
    results: list[tuple[Tensor, Tensor, dict[str, float]]] = []
    metrics: dict[str, Any]
    entropy = case["logprobs"].square()
    loss_type, level = ("grpo", "sequence") if variant == "gspo" else (variant, "token")
    for ours in (True, False):
        leaf = case["logprobs"].clone().requires_grad_()
        mine = case | {"logprobs": leaf}
        if ours:
            loss, metrics = VARIANTS[variant](
                **mine, totals=TOTALS, epsilon=0.2, epsilon_high=0.28, delta=1.6, beta=0.04, rollout_cap=1.5,
                entropy=entropy,
            )  # fmt: skip
        else:
            loss, metrics = trl_loss(mine, loss_type, level, entropy)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf), {k: float(v) for k, v in metrics.items()}))
    # a sum of a few dozen terms in fp64; TRL divides in fp32 where it averages over a count
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-7, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-7, atol=1e-12)
    assert set(results[1][2]) <= set(results[0][2])
    assert {name: results[0][2][name] for name in results[1][2]} == pytest.approx(results[1][2], rel=1e-6)
