"""Oracles: each paper's loss as a Python loop in fp64 and its autograd; a bandit whose best arm is known; TRL."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lightning.losses.policy import VARIANTS, Totals, policy_loss
from ds_lightning.rl.advantages import ScaleRewards, group_advantages

LENGTHS = [5, 3, 1, 4, 2, 5]
MAX_TOKENS = 5
TOTALS = Totals(sequences=len(LENGTHS), tokens=sum(LENGTHS), max_tokens=MAX_TOKENS)
EXACT: Any = {"rtol": 1e-12, "atol": 1e-14}  # some hundred roundings of fp64

Case = dict[str, Any]


def draw(seed: int = 0, spread: float = 0.4) -> Case:
    """Log-probabilities far enough apart that ratios are clipped on both sides, and ragged completions."""
    rng = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), MAX_TOKENS)
    logprobs = -torch.rand(shape, generator=rng, dtype=torch.float64) * 2 - 0.1
    noise = [torch.randn(shape, generator=rng, dtype=torch.float64) * spread for _ in range(3)]
    return {
        "logprobs": logprobs,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.1, 0.0, 2.0], dtype=torch.float64),
        "mask": torch.arange(MAX_TOKENS) < torch.tensor(LENGTHS).unsqueeze(-1),
        "old_logprobs": logprobs + noise[0],
        "ref_logprobs": logprobs + noise[1],
        "rollout_logprobs": logprobs + noise[0] + noise[2],
    }


def textbook(variant: str, case: Case, epsilon: float, high: float, delta: float, beta: float, cap: float) -> Tensor:
    """Walk through the papers' sums: completions i, tokens t."""
    loss = torch.zeros((), dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        logp, old, ref, rollout = (
            case[name][i] for name in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
        )
        mean_log_ratio = sum(logp[t] - old[t] for t in range(n)) / n
        divisor = {
            "grpo": n * len(LENGTHS),
            "gspo": n * len(LENGTHS),
            "dapo": sum(LENGTHS),
            "dr_grpo": len(LENGTHS) * MAX_TOKENS,
        }[variant]
        for t in range(n):
            r = torch.exp(mean_log_ratio if variant == "gspo" else logp[t] - old[t])
            a = float(case["advantages"][i])
            clipped = torch.clamp(r, 1 - epsilon, 1 + high)
            surrogate = torch.minimum(torch.clamp(r, max=delta) * a, clipped * a)
            weight = min(math.exp(float(old[t] - rollout[t])), cap)
            k3 = torch.exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1
            loss = loss + (-surrogate * weight + beta * k3) / divisor
    return loss


SETTINGS: list[Case] = [
    {"epsilon": 0.2, "epsilon_high": 0.28, "delta": None, "beta": 0.04, "rollout_cap": 1.3},
    {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5, "beta": 0.0, "rollout_cap": 10.0},
    {"epsilon": 10.0, "epsilon_high": None, "delta": None, "beta": 0.001, "rollout_cap": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["clip-higher", "delta", "R1"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_the_textbook(variant: str, settings: Case) -> None:
    case = draw()
    values = []
    high = settings["epsilon"] if settings["epsilon_high"] is None else settings["epsilon_high"]
    delta = math.inf if settings["delta"] is None else settings["delta"]
    for ours in (True, False):
        leaf = case["logprobs"].clone().requires_grad_()
        if ours:
            loss, _ = VARIANTS[variant](**(case | {"logprobs": leaf}), totals=TOTALS, **settings)
        else:
            numbers = (settings["epsilon"], high, delta, settings["beta"], settings["rollout_cap"])
            loss = textbook(variant, case | {"logprobs": leaf}, *numbers)
        values.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    assert values[1][1].abs().max() > 1e-3
    for actual, expected in zip(*values, strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_ratios_are_clipped_on_both_sides_in_these_cases() -> None:
    _, metrics = VARIANTS["grpo"](**draw(), totals=TOTALS)
    assert min(metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_that_of_reinforce(variant: str) -> None:
    case = draw()
    leaf = case["logprobs"].clone().requires_grad_()
    loss, metrics = VARIANTS[variant](leaf, case["advantages"], case["mask"], TOTALS)
    leaf_again = case["logprobs"].clone().requires_grad_()
    same, _ = VARIANTS[variant](leaf_again, case["advantages"], case["mask"], TOTALS, old_logprobs=leaf.detach())
    assert torch.equal(loss, same)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(gradient, *torch.autograd.grad(same, leaf_again))
    divisor = {"dapo": sum(LENGTHS), "dr_grpo": len(LENGTHS) * MAX_TOKENS}.get(variant)
    for i, n in enumerate(LENGTHS):
        expected = -float(case["advantages"][i]) / (divisor or n * len(LENGTHS))
        assert gradient[i].tolist() == pytest.approx([expected] * n + [0.0] * (MAX_TOKENS - n), rel=1e-12)
    assert metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [[2], [1, 2, 3, 4, 5]])
def test_micro_batches_of_any_size_add_up_to_the_whole(variant: str, cuts: list[int]) -> None:
    case = draw()
    case["entropy"] = case["logprobs"].exp()
    whole = case["logprobs"].clone().requires_grad_()
    loss, metrics = VARIANTS[variant](**(case | {"logprobs": whole}), totals=TOTALS, beta=0.1)
    loss.backward()
    pieces = case["logprobs"].clone().requires_grad_()
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(LENGTHS)], strict=True):
        part = {name: tensor[start:end] for name, tensor in (case | {"logprobs": pieces}).items()}
        parts.append(VARIANTS[variant](**part, totals=TOTALS, beta=0.1))
        parts[-1][0].backward()
    torch.testing.assert_close(sum(part for part, _ in parts), loss, **EXACT)
    torch.testing.assert_close(pieces.grad, whole.grad, **EXACT)
    for name, expected in metrics.items():
        each: Any = torch.stack([part[name] for _, part in parts])
        together = {"min": each.min, "max": each.max}.get(name[-3:], each.sum)()
        torch.testing.assert_close(together, expected, msg=name)


def test_what_stands_at_positions_that_are_not_counted_has_no_influence() -> None:
    case = draw()
    spoilt = {
        name: tensor.masked_fill(~case["mask"], math.nan) if name.endswith("logprobs") else tensor
        for name, tensor in case.items()
    }
    for variant in VARIANTS.values():
        leaf = spoilt["logprobs"].clone().requires_grad_()
        loss, metrics = variant(**(spoilt | {"logprobs": leaf}), totals=TOTALS, beta=0.1)
        expected, expected_metrics = variant(**case, totals=TOTALS, beta=0.1)
        assert torch.equal(loss, expected)
        assert metrics == expected_metrics
        assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


def test_a_completion_without_a_counted_token_has_no_influence() -> None:
    case = draw()
    case["mask"][2] = False
    for variant in VARIANTS.values():
        leaf = case["logprobs"].clone().requires_grad_()
        loss, _ = variant(**(case | {"logprobs": leaf}), totals=TOTALS)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.isfinite().all()
        assert (gradient[2] == 0).all()


def test_metrics_are_those_of_loops() -> None:
    case = draw()
    _, metrics = VARIANTS["grpo"](**case, totals=TOTALS, rollout_cap=1.3, entropy=case["logprobs"].square())
    places = [(i, t) for i, n in enumerate(LENGTHS) for t in range(n)]
    ratio = (case["logprobs"] - case["old_logprobs"]).exp()
    sign = case["advantages"]
    low = {(i, t): float(ratio[i, t] < 0.8 and sign[i] < 0) for i, t in places}
    high = {(i, t): float(ratio[i, t] > 1.2 and sign[i] > 0) for i, t in places}
    gap = [float(case["old_logprobs"][p] - case["rollout_logprobs"][p]) for p in places]
    weight = [min(math.exp(value), 1.3) for value in gap]
    apart = [float(case["ref_logprobs"][p] - case["logprobs"][p]) for p in places]

    def mean(values: Any) -> float:
        return float(sum(values)) / len(places)

    def shares(hits: dict[tuple[int, int], float]) -> list[float]:
        return [sum(hits[i, t] for t in range(n)) / n for i, n in enumerate(LENGTHS)]

    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "clip_ratio/low_mean": mean(low.values()),
            "clip_ratio/low_min": min(shares(low)),
            "clip_ratio/high_mean": mean(high.values()),
            "clip_ratio/high_max": max(shares(high)),
            "clip_ratio/region_mean": mean(low.values()) + mean(high.values()),
            "sampling/sampling_logp_difference/mean": mean(map(abs, gap)),
            "sampling/sampling_logp_difference/max": max(map(abs, gap)),
            "sampling/importance_sampling_ratio/min": min(weight),
            "sampling/importance_sampling_ratio/mean": mean(weight),
            "sampling/importance_sampling_ratio/max": max(weight),
            "kl": mean(math.exp(d) - d - 1 for d in apart),
            "entropy": mean(float(case["logprobs"][p]) ** 2 for p in places),
        },
        rel=1e-6,  # shares of counts are fp32
    )


def test_shares_of_clipped_sequences_count_sequences() -> None:
    case = draw()
    _, metrics = VARIANTS["gspo"](**case, totals=TOTALS)
    means = [
        math.exp(sum(float(case["logprobs"][i, t] - case["old_logprobs"][i, t]) for t in range(n)) / n)
        for i, n in enumerate(LENGTHS)
    ]
    clipped = [
        (r < 1 - 3e-4 and a < 0) or (r > 1 + 4e-4 and a > 0) for r, a in zip(means, case["advantages"], strict=True)
    ]
    assert 0 < sum(clipped) < len(LENGTHS)
    assert float(metrics["clip_ratio/region_mean"]) == pytest.approx(sum(clipped) / len(LENGTHS))


@pytest.mark.parametrize("off_policy", [False, True], ids=["on policy", "minibatches"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_best_of_two_arms_is_found(variant: str, *, off_policy: bool) -> None:
    """Arm 1 pays 1 and ends at once, arm 0 pays nothing and takes three tokens: pulling arm 1 always is the optimum."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    rng = torch.Generator().manual_seed(1)
    for _ in range(150):
        with torch.no_grad():
            arms = torch.multinomial(logits.softmax(0), 16, replacement=True, generator=rng)
            old = logits.log_softmax(0)[arms]
        scale: ScaleRewards = "none" if variant == "dr_grpo" else "group"
        advantages, _ = group_advantages(arms.double(), 8, scale_rewards=scale)
        mask = torch.arange(3) < torch.where(arms == 1, 1, 3).unsqueeze(-1)
        for rows in (slice(0, 8), slice(8, 16)) if off_policy else (slice(0, 16),):
            logprobs = logits.log_softmax(0)[arms[rows]].unsqueeze(-1).expand(-1, 3)
            totals = Totals(len(arms[rows]), int(mask[rows].sum()), 3)
            known = old[rows].unsqueeze(-1).expand(-1, 3) if off_policy else None
            loss, _ = VARIANTS[variant](logprobs, advantages[rows], mask[rows], totals, old_logprobs=known)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert logits.softmax(0)[1] > 0.95


def test_the_kl_term_alone_pulls_the_policy_to_the_reference() -> None:
    reference = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    arms = torch.arange(3)
    for _ in range(300):
        logprobs = logits.log_softmax(0)[arms].unsqueeze(-1)
        # every arm as often as the policy pulls it: the expectation itself, by advantages of zero and exact weights
        counts = (logits.softmax(0) * 3000).round().long().clamp_min(1)
        rows = arms.repeat_interleave(counts)
        loss, _ = policy_loss(
            logprobs[rows],
            torch.zeros(len(rows), dtype=torch.float64),
            torch.ones(len(rows), 1, dtype=torch.bool),
            Totals(len(rows), len(rows), 1),
            beta=1.0,
            ref_logprobs=reference[rows].unsqueeze(-1),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # a rounded count stands for each probability: a few thousandths
    torch.testing.assert_close(logits.softmax(0), reference.exp(), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon is 0\.0, expected a number above 0"),
        ({"epsilon_high": -1.0}, r"epsilon_high is -1\.0, expected a number above 0"),
        ({"rollout_cap": math.nan}, "rollout_cap is nan, expected a number above 0"),
        ({"delta": 1.1}, r"delta is 1\.1, expected more than 1 \+ epsilon_high = 1\.2, or null"),
        ({"beta": -0.1}, r"beta is -0\.1, expected 0 or more"),
        ({"beta": 0.1}, r"beta is 0\.1 without a reference policy, expected ref_logprobs, or beta 0"),
    ],
)
def test_bounds_out_of_range_are_refused(setting: dict[str, float], message: str) -> None:
    case = draw()
    with pytest.raises(ValueError, match=message):
        policy_loss(case["logprobs"], case["advantages"], case["mask"], TOTALS, **setting)  # type: ignore[arg-type]
