"""Oracles: the loss by loops over positions in fp64 with torch's autograd, splits of one batch, and closed forms."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ds_lightning.losses.next_token import IGNORE
from ds_lightning.models import DeepSeek
from ds_lightning.ops.topk_gate import Gate
from ds_lightning.optim import Muon, Stairs, V3Schedule, WarmupStableDecay
from ds_lightning.training import PretrainModule
from tests.training.toy_pretraining import CONFIG, SEQ, Batch, Recorder, Rows, build, draw_step, fit, split, trainer

HEAVY: dict[str, Any] = {"mtp_loss_weight": 0.4, "balance_loss_alpha": 0.5}  # no term is too small to be seen


def plain_terms(model: DeepSeek, step: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy, mean over depths of that of the prediction modules, and balance loss, each a token."""
    ids, labels, segments = step["input_ids"], step["labels"].tolist(), step.get("segment_ids")
    gates: list[Gate] = []
    hidden = model(ids, segment_ids=segments, gates=gates)
    states = [hidden, *model.mtp_hidden(ids, hidden, segment_ids=segments, gates=gates)]
    sums = []
    for depth, state in enumerate(states):
        log_probabilities = model.logits(state).log_softmax(-1)
        total = torch.zeros((), dtype=torch.float64)
        for row, row_labels in enumerate(labels):
            for t in range(SEQ - depth):
                if row_labels[t + depth] != IGNORE:
                    total = total - log_probabilities[row, t, row_labels[t + depth]]
        sums.append(total)
    balance = torch.zeros((), dtype=torch.float64)
    for gate in gates:
        for scores in gate.scores.split(SEQ):  # a sequence each
            experts, topk = scores.shape[1], CONFIG.num_experts_per_tok
            visits = scores.topk(topk).indices.flatten().bincount(minlength=experts).double()
            share = (scores / scores.sum(-1, keepdim=True)).mean(0)
            balance = balance + (experts / (topk * SEQ) * visits * share).sum()
    tokens = sum(label != IGNORE for row in labels for label in row)
    return sums[0] / tokens, sum(sums[1:]) / (len(sums) - 1) / tokens, balance * SEQ / tokens


def plain_gradients(module: PretrainModule, step: Batch, mtp_weight: float, alpha: float) -> dict[str, Tensor]:
    assert module.model is not None
    model = copy.deepcopy(module.model).double()
    nll, mtp, balance = plain_terms(model, step)
    (nll + mtp_weight * mtp + alpha * balance).backward()
    return {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest distance of a parameter's gradient, relative to its norm."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name].double() - truth).norm() / truth.norm()) for name, truth in expected.items())


def stand_in(module: PretrainModule, **values: Any) -> dict[str, float]:
    """Give the module a trainer that is none; return what it will log."""
    logged: dict[str, float] = {}
    defaults = {
        "accumulate_grad_batches": 1,
        "world_size": 1,
        "gradient_clip_val": None,
        "gradient_clip_algorithm": None,
    }
    module._trainer = Mock(spec=Trainer, **{**defaults, **values})
    module.log = lambda name, value, **_: logged.__setitem__(name, float(value))  # type: ignore[method-assign]
    return logged


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_are_those_of_the_mean_over_all_tokens_of_the_step(accumulate: int, *, documents: bool) -> None:
    step, recorder = draw_step(0, documents=documents), Recorder()
    expected = plain_gradients(build(**HEAVY), step, 0.4, 0.5)
    fit(build(**HEAVY), [step], recorder, accumulate=accumulate, precision="64-true")
    # fp64 rounding of sums over a few hundred terms; a mean of means differs by more than a hundredth.
    assert worst(recorder.gradients[0], expected) < 1e-12


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_accumulation_in_fp32_changes_nothing_but_rounding(accumulate: int) -> None:
    step, recorder = draw_step(0), Recorder()
    expected = plain_gradients(build(**HEAVY), step, 0.4, 0.5)
    fit(build(**HEAVY), [step], recorder, accumulate=accumulate)
    # fp32 rounds at 6e-8; the bound leaves room for sums of some tens of terms in another order.
    assert worst(recorder.gradients[0], expected) < 5e-6


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 4), (2, 1), (2, 2), (4, 2)])
def test_ranks_and_micro_batches_share_the_step_in_any_way(ranks: int, accumulate: int) -> None:
    step = draw_step(0)
    expected = plain_gradients(build(**HEAVY), step, 0.4, 0.5)
    module, losses = build(**HEAVY).double(), list[float]()
    logged = stand_in(module, accumulate_grad_batches=accumulate, world_size=ranks)
    for index, micro in enumerate(split(step, ranks * accumulate)):
        logged.clear()
        loss = module.training_step(micro, index)  # Lightning divides by one number, DDP takes the mean over the other
        (loss / (ranks * accumulate)).backward()
        assert ("train/loss" in logged) is ((index + 1) % accumulate == 0), "once a step"
        losses += logged.values()
    assert worst({name: p.grad for name, p in module.named_parameters() if p.grad is not None}, expected) < 1e-12
    assert module.model is not None
    assert sum(losses) / ranks == pytest.approx(float(plain_terms(module.model, step)[0]), rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_logged_loss_is_the_cross_entropy_a_token_of_the_whole_step(accumulate: int) -> None:
    module, steps = build(**HEAVY, lr=1e-30), [draw_step(0), draw_step(1)]  # at this rate the weights stay
    run = fit(module, steps, accumulate=accumulate, precision="64-true")
    assert module.model is not None
    expected = float(plain_terms(module.model, steps[1])[0])
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-6)  # Lightning keeps fp32


def test_recomputation_changes_no_gradient_and_counts_no_routing_twice() -> None:
    runs = []
    for recompute in (False, True):
        module = build(**HEAVY, recompute=recompute)
        assert module.model is not None
        assert module.model.recompute is recompute
        stand_in(module)
        module.training_step(draw_step(0), 0).backward()
        assert module.expert_load is not None
        assert float(module.expert_load.sum()) == 4 * 8 * SEQ * 2  # layers, rows, positions, experts a token
        runs.append(({name: p.grad for name, p in module.named_parameters()}, module.expert_load))
    (gradients, load), (gradients_again, load_again) = runs
    assert torch.equal(load, load_again)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, gradients_again[name]), name  # type: ignore[arg-type]


def test_a_model_without_experts_or_modules_is_trained_on_cross_entropy_alone() -> None:
    dense = replace(CONFIG, num_nextn_predict_layers=0, first_k_dense_replace=3)
    module, step, recorder = build(config=dense, **HEAVY), draw_step(0), Recorder()
    assert module.model is not None
    model = copy.deepcopy(module.model).double()
    nll = torch.nn.functional.cross_entropy(
        model.logits(model(step["input_ids"])).flatten(0, 1), step["labels"].flatten(), ignore_index=IGNORE
    )
    nll.backward()
    fit(module, [step], recorder, precision="64-true")
    expected = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst(recorder.gradients[0], expected) < 1e-12
    assert module.expert_load is None
    module.step_routing_bias()
    assert module.last_expert_load is None


def test_the_weight_of_the_prediction_modules_follows_progress() -> None:
    steps, recorder = [draw_step(0), draw_step(0)], Recorder()
    module = build(steps[0]["step_tokens"] * 2, lr=1e-30, mtp_loss_weight=Stairs([0.3, 0.1], [0.5]))
    expected = [plain_gradients(module, steps[0], weight, 0.0001) for weight in (0.3, 0.1)]
    fit(module, steps, recorder, accumulate=2, precision="64-true")
    for actual, truth in zip(recorder.gradients, expected, strict=True):  # at this rate the weights stay
        assert worst(actual, truth) < 1e-12


def test_the_learning_rate_follows_the_tokens_of_completed_steps() -> None:
    steps, recorder = [draw_step(seed) for seed in range(5)], Recorder()
    tokens = [step["step_tokens"] for step in steps]
    assert len(set(tokens)) > 1
    schedule = WarmupStableDecay(warmup=0.3, decay=0.4)
    module = build(sum(tokens), lr=0.01, lr_schedule=schedule)
    run = fit(module, steps, recorder, accumulate=2)
    assert module.tokens_seen == sum(tokens)
    assert module.progress == 1.0
    expected = [0.01 * schedule(sum(tokens[:done]) / sum(tokens)) for done in range(5)]
    assert recorder.rates == pytest.approx(expected, rel=1e-12)
    assert float(run.callback_metrics["train/lr"]) == pytest.approx(expected[-1])
    assert 0 < expected[1] < 0.01 < 0.01 + expected[4] < 0.02, "the run sees the rise and the fall"


def test_progress_is_the_larger_of_tokens_and_budget_and_at_most_one() -> None:
    module = build(1000)
    assert module.progress == 0.0
    for tokens, budget, expected in ((250, 0.1, 0.25), (250, 0.4, 0.4), (1500, 0.4, 1.0), (250, 1.7, 1.0)):
        module.tokens_seen, module.budget_progress = tokens, budget
        assert module.progress == expected


def test_tokens_are_counted_once_a_step_where_the_strategy_accumulates_itself() -> None:
    module = build()
    stand_in(module, accumulate_grad_batches=3)
    seen = []
    for batch_idx in range(7):  # such a strategy calls this for every micro-batch
        module._step_tokens = 100
        module.optimizer_step(0, batch_idx, Mock(), lambda: None)
        seen.append(module.tokens_seen)
    assert seen == [0, 0, 100, 100, 100, 200, 200]


def test_tokens_seen_come_back_from_a_checkpoint() -> None:
    module, other, checkpoint = build(), build(), dict[str, Any]()
    module.tokens_seen, module.skipped_steps = 123, torch.tensor(4)
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert (other.tokens_seen, other.skipped_steps) == (123, 4)


@pytest.mark.parametrize("limit", [None, 0, 0.25, 1e6])
def test_the_norm_is_logged_before_clipping_and_clipped_over_all_gradients_together(limit: float | None) -> None:
    module = build()
    logged = stand_in(module)
    module.training_step(draw_step(0), 0).backward()
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in before))
    assert norm > 0.25
    module.configure_gradient_clipping(SimpleNamespace(param_groups=[{"lr": 0.5}]), limit, "norm")
    assert logged["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert logged["train/lr"] == 0.5
    factor = 0.25 / norm if limit == 0.25 else 1.0
    after = [p.grad for p in module.parameters() if p.grad is not None]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one * factor, other, rtol=1e-5, atol=0)


def test_validation_measures_every_counted_token_and_trains_nothing() -> None:
    first, second = (draw_step(seed, documents=True) for seed in (5, 6))
    module = build().double()
    assert module.model is not None
    model, run = copy.deepcopy(module.model), trainer(precision="64-true")
    # What one measurement has summed is not in the next.
    for measure, batches in ((run.validate, [first]), (run.test, [second]), (run.validate, [first, second])):
        nats = tokens = num_bytes = 0.0
        for batch in batches:
            counted = [label for row in batch["labels"].tolist() for label in row if label != IGNORE]
            nats += float(plain_terms(model, batch)[0]) * len(counted)
            tokens += len(counted)
            num_bytes += sum(label % 5 for label in counted)
        (metrics,) = measure(module, datamodule=Rows([], batches), verbose=False)
        assert metrics["val/loss"] == pytest.approx(nats / tokens, rel=1e-6)
        assert metrics["val/ppl"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
        assert metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert module.expert_load is None
    assert module.tokens_seen == 0
    assert all(torch.equal(model.state_dict()[name], value) for name, value in module.model.state_dict().items())


def test_prediction_returns_hidden_states() -> None:
    module, batch = build(), draw_step(0, documents=True)
    predicted = trainer().predict(module, datamodule=Rows([], [batch]))
    assert predicted is not None
    assert module.model is not None
    with torch.no_grad():
        expected = module.model.eval()(batch["input_ids"], segment_ids=batch["segment_ids"])
    torch.testing.assert_close(predicted[0], expected, rtol=0, atol=0)


def test_the_model_is_built_once() -> None:
    module = PretrainModule(CONFIG, 100)
    assert module.model is None
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model


def test_the_optimizer_gets_the_modules_settings() -> None:
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    for kind, expected in (("adamw", torch.optim.AdamW), ("muon", Muon)):
        module = build(optimizer=kind, lr_schedule=V3Schedule(warmup=0.0), **settings)
        optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[call-overload,index]
        assert isinstance(optimizer, expected)
        for group in optimizer.param_groups:
            assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.9), 1e-6)
            assert group["weight_decay"] in (0.0, 0.3)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}


def test_the_embeddings_learning_rate_follows_the_schedule() -> None:
    module = build(lr=0.02, embedding_lr=0.06, lr_schedule=WarmupStableDecay(warmup=0.5))
    configured: Any = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for progress in (0.25, 1.0):
        module.budget_progress = progress
        schedule.step()
        rates = sorted({group["lr"] for group in optimizer.param_groups})
        assert rates == pytest.approx([0.02 * module.lr_schedule(progress), 0.06 * module.lr_schedule(progress)])


def test_a_loss_goes_down() -> None:
    module, step = build(lr=0.02, lr_schedule=WarmupStableDecay(warmup=0.0, decay=0.0)), draw_step(0)
    assert module.model is not None
    first = float(plain_terms(copy.deepcopy(module.model).double(), step)[0])
    fit(module, [step] * 8)
    assert float(plain_terms(module.model.double(), step)[0]) < first - 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_tokens": 0}, "total_tokens is 0, expected more than 0"),
        ({"total_tokens": -5}, "total_tokens is -5, expected more than 0"),
        ({"lr": 0.0}, "lr is 0.0, expected more than 0"),
        ({"lr": -1e-3}, "lr is -0.001, expected more than 0"),
        ({"lr": math.nan}, "lr is nan, expected more than 0"),
        ({"embedding_lr": 0.0}, "embedding_lr is 0.0, expected more than 0"),
        ({"eps": 0.0}, "eps is 0.0, expected more than 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \[0.9, 1.0\], expected two numbers from 0 to below 1"),
        ({"betas": (-0.1, 0.9)}, r"betas is \[-0.1, 0.9\], expected two numbers from 0 to below 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected 0 or more"),
        ({"mtp_loss_weight": -0.3}, "mtp_loss_weight is -0.3, expected 0 or more"),
        ({"balance_loss_alpha": -1.0}, "balance_loss_alpha is -1.0, expected 0 or more"),
        ({"bias_update_speed": math.nan}, "bias_update_speed is nan, expected 0 or more"),
    ],
)
def test_a_number_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        PretrainModule(CONFIG, **{"total_tokens": 100, **settings})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val is -1.0, expected 0 or more"),
        (
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            "trainer.gradient_clip_algorithm is 'value', expected 'norm'",
        ),
    ],
)
def test_clipping_that_would_not_be_done_is_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        fit(build(), [draw_step(0)], **options)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    module = build()
    shards = SimpleNamespace(manifest=SimpleNamespace(vocab_size=33))
    stand_in(module, datamodule=SimpleNamespace(shards=shards, folder="corpus"))
    message = "^the tokenizer in corpus has 33 ids, the model's vocab_size is 32, expected at least as many: set the "
    with pytest.raises(ValueError, match=message):
        module.setup("fit")
    shards.manifest.vocab_size = 32
    module.setup("fit")
