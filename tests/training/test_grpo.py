"""Oracles: autograd of the textbook loss on the same batch in fp64, a run left alone, and the reward itself."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from ds_lightning.models import DeepSeek
from ds_lightning.training import GRPOModule, PretrainModule
from tests.training.toy_rollouts import MODEL, Record, plain_rows, train


class Gradients(Callback):
    """The micro-batches of the first steps, the weights before them and the gradients that they left."""

    def __init__(self) -> None:
        self.weights: list[DeepSeek] = []
        self.batches: list[list[Any]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.weights.append(copy.deepcopy(pl_module.model).double())
            self.batches.append([])
        self.batches[-1].append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        found = {name: p.grad.clone() for name, p in pl_module.model.named_parameters() if p.grad is not None}
        self.gradients.append(found)


def textbook(policy: DeepSeek, sampler: DeepSeek, batch: Any, sequences: int) -> torch.Tensor:
    """DeepSeekMath, equation 3 without clipping and KL, one token after the other, with the sampler's experts."""
    total = torch.zeros((), dtype=torch.float64)
    for row, ids in enumerate(plain_rows(batch)):
        prompt, length = batch["prompt"][row], int(batch["mask"][row].sum())
        start = int(batch["prompt_lengths"][prompt])
        ids = ids[: start + length]
        chosen = torch.cat((batch["prompt_routing"][:, prompt, :start], batch["routing"][:, row, :length]), 1)
        new, old = (
            model.logits(model(ids[None], routing=chosen[:, None])).log_softmax(-1)[0] for model in (policy, sampler)
        )
        ratios = [(new[t - 1, ids[t]] - old[t - 1, ids[t]].detach()).exp() for t in range(start, len(ids))]
        total = total - sum(ratios) * batch["advantages"][row] / length / sequences
    return total


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_of_a_step_is_that_of_the_textbook_on_the_whole_batch(tmp_path: Path, accumulate: int) -> None:
    spy = Gradients()
    # float32 on sums of a few hundred terms: 1e-4 of the largest entry of a gradient is far above its rounding.
    train(
        tmp_path,
        spy,
        accumulate=accumulate,
        rollouts=2,
        steps_per_rollout=2,
        module={"epsilon": 10.0, "epsilon_high": 10.0},
    )
    sampled_by = [0, 0, 2, 2]
    for step, (batches, found) in enumerate(zip(spy.batches, spy.gradients, strict=True)):
        policy = copy.deepcopy(spy.weights[step])
        sampler = spy.weights[sampled_by[step]]
        loss = sum(textbook(policy, sampler, batch, sequences=8) for batch in batches)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        assert any(batch["advantages"].any() for batch in batches)
        for name, parameter in policy.named_parameters():
            if parameter.grad is not None:
                scale = parameter.grad.abs().max().item()
                # Truncated importance sampling weighs a term by the sampler's rounding, within 1e-4 of 1 here.
                assert (found[name] - parameter.grad).abs().max() <= 1e-3 * scale + 1e-9, name


def test_the_letter_that_is_rewarded_is_learned(tmp_path: Path) -> None:
    _, record = train(tmp_path, rollouts=40, prompts=8, num_generations=8, module={"lr": 1e-2})
    rewards = [logged["reward"] for logged in record.logged]
    assert sum(rewards[:5]) / 5 < 0.1
    assert sum(rewards[-5:]) / 5 > 0.5


def test_a_rollout_is_made_by_the_weights_of_the_step_before_it(tmp_path: Path) -> None:
    policy, record = train(tmp_path, rollouts=3)
    for logged in record.logged:
        # No update lies between sampling and training: what is left is rounding.
        assert logged["sampling/gap_logprob_max"] < 1e-5
        assert logged["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-5)
    assert policy.steps_done == 3


@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_run_stopped_between_and_within_rollouts_goes_on_bitwise(tmp_path: Path, stop_after: int) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == stop_after:
                trainer.should_stop = True

    settings: dict[str, Any] = {"steps_per_rollout": 2, "rollouts": 3, "module": {"beta": 0.1, "ref_update_steps": 3}}
    straight, expected = train(tmp_path / "straight", **settings)
    _, first = train(tmp_path / "stopped", Stop(), **settings)
    resumed, second = train(tmp_path / "stopped", resume=True, **settings)
    assert [step for step, _ in first.batches] == list(range(stop_after))
    assert first.batches + second.batches == expected.batches
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert (resumed.steps_done, resumed.tokens_seen) == (straight.steps_done, straight.tokens_seen)
    assert resumed.useful_samples == straight.useful_samples


def test_old_log_probabilities_are_those_of_training_in_its_precision(tmp_path: Path) -> None:
    class Compare(Callback):
        compared = 0

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % 2 == 0:  # of the two steps of a rollout, the one by the weights that sampled
                with torch.no_grad():
                    wide = pl_module.logprobs(pl_module.model, batch)[0]
                    with torch.autocast("cpu", torch.bfloat16):
                        narrow = pl_module.logprobs(pl_module.model, batch)[0]
                assert torch.equal(batch["old_logprobs"], narrow)
                assert not torch.equal(batch["old_logprobs"], wide)
                self.compared += 1

    compare = Compare()
    train(tmp_path, compare, rollouts=2, steps_per_rollout=2, trainer={"precision": "bf16-mixed"})
    assert compare.compared == 2


def test_prediction_modules_do_not_learn(tmp_path: Path) -> None:
    model = replace(MODEL, num_nextn_predict_layers=1)
    policy, _ = train(tmp_path, rollouts=2, model=model, module={"weight_decay": 0.1})
    assert policy.model is not None
    assert not any(parameter.requires_grad for parameter in policy.model.mtp.parameters())
    grouped = [parameter for group in policy.trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert len(grouped) == sum(parameter.requires_grad for parameter in policy.model.parameters())


def test_skipping_groups_without_a_gradient_changes_no_gradient(tmp_path: Path) -> None:
    def gradients(name: str, equal_groups: str) -> tuple[dict[str, torch.Tensor], Record]:
        spy = Gradients()
        _, record = train(
            tmp_path / name, spy, rollouts=1, prompts=8, max_completion_length=2, equal_groups=equal_groups
        )
        return spy.gradients[0], record

    (kept, whole), (skipped, fewer) = gradients("kept", "keep"), gradients("skipped", "skip")
    assert 0 < len(fewer.batches[0][1]) < len(whole.batches[0][1])
    assert whole.logged[0]["frac_reward_zero_std"] == fewer.logged[0]["frac_reward_zero_std"] > 0
    for name, gradient in kept.items():
        assert torch.allclose(gradient, skipped[name], atol=1e-6), name  # float32, summed in another order


def test_the_reference_stays_until_it_is_due(tmp_path: Path) -> None:
    policy, record = train(tmp_path, rollouts=4, module={"beta": 0.5, "ref_update_steps": 3})
    kl = [logged["kl"] for logged in record.logged]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[2] > 1e-7  # the first step of a warm-up is none
    assert kl[3] == pytest.approx(0, abs=1e-9)
    assert policy.reference is not None
    assert not any(parameter.requires_grad for parameter in policy.reference.parameters())


def test_metrics_have_the_names_that_trl_gives_them(tmp_path: Path) -> None:
    _, record = train(tmp_path, rollouts=1)
    expected = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/share_of_letter/mean",
        "rewards/share_of_letter/std",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "sampling/sampling_logp_difference/mean",
        "sampling/gap_routing",
    }
    assert expected <= record.logged[0].keys()
    assert record.logged[0]["entropy"] == pytest.approx(math.log(MODEL.vocab_size), rel=0.05)  # random weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations is 1, expected at least 2: a group is its own baseline"),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0: exploration needs chance"),
        ({"rollouts": 0}, "rollouts is 0, expected at least 1"),
        ({"steps_per_rollout": 3}, "steps_per_rollout is 3, expected a divisor of prompts times num_generations, 16"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0, expected more than 0 or null"),
        ({"beta": -1.0}, "beta is -1.0, expected 0 or more"),
        ({"ref_update_steps": 0}, "ref_update_steps is 0, expected at least 1 or null"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOModule(MODEL, **settings)


def test_an_uneven_split_over_micro_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 ranks times accumulate_grad_batches 3 share evenly"):
        train(tmp_path, accumulate=3)


def test_the_two_modules_share_what_they_can() -> None:
    assert GRPOModule(MODEL).configure_optimizers.__func__ is PretrainModule.configure_optimizers  # type: ignore[attr-defined]
