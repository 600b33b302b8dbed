"""Oracles: the free forward itself, bitwise; and shares and gaps counted by loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lightning.generation import Generator, Sample, rollout_gap, training_logprobs
from ds_lightning.models import DeepSeek
from ds_lightning.ops.topk_gate import Gate
from tests.generation.small_model import CONFIG, MOE_LAYERS, prompts, small_model


def chosen(model: DeepSeek, ids: Tensor, routing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return hidden states and the experts of every layer [moe_layers batch seq topk]."""
    gates: list[Gate] = []
    hidden = model(ids, gates=gates, routing=routing)
    return hidden, torch.stack([gate.indices.view(*ids.shape, -1) for gate in gates])


def gradients(model: DeepSeek, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.layers.parameters())))


@pytest.mark.parametrize("recompute", [False, True])
def test_replaying_a_models_own_choices_changes_no_bit(recompute: bool) -> None:
    model, ids = small_model(), torch.randint(0, CONFIG.vocab_size, (3, 11))
    model.recompute = recompute
    free, routing = chosen(model, ids)
    again, replayed = chosen(model, ids, routing.to(torch.int16))
    assert torch.equal(free, again)
    assert torch.equal(routing, replayed)
    for a, b in zip(gradients(model, free.square().sum()), gradients(model, again.square().sum()), strict=True):
        assert torch.equal(a, b)
    none = torch.full_like(routing, -1)
    assert torch.equal(chosen(model, ids, none)[0], free)


def test_replayed_experts_are_the_ones_that_run() -> None:
    model, ids = small_model(), torch.randint(0, CONFIG.vocab_size, (2, 6))
    _, routing = chosen(model, ids)
    routing = (routing + 1) % CONFIG.n_routed_experts
    routing[:, 0, 4:] = -1
    hidden, taken = chosen(model, ids, routing)
    fed = routing >= 0
    assert torch.equal(taken[fed], routing[fed])
    hidden.square().sum().backward()
    model.zero_grad()
    only = torch.tensor([0, 1, 2]).expand(MOE_LAYERS, 2, 6, 3)
    chosen(model, ids, only)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj"):
            assert parameter.grad is not None
            assert (parameter.grad[:3].flatten(1).abs().amax(1) > 0).all()
            assert (parameter.grad[3:] == 0).all()


def test_a_record_of_another_number_of_layers_is_refused() -> None:
    model, ids = small_model(), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="routing has 3 layers, expected 2: one for each layer with experts"):
        model(ids, routing=torch.zeros(3, 1, 3, 3, dtype=torch.int16))


def as_batch(asked: list[list[int]], samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pad on the right: tokens, experts [moe_layers batch seq topk], log-probabilities and their mask [batch seq-1]."""
    rows = [torch.tensor(asked[s.prompt] + s.tokens.tolist()) for s in samples]
    seq = max(len(row) for row in rows)
    ids, routing = torch.zeros(len(rows), seq, dtype=torch.long), torch.full((len(rows), seq, MOE_LAYERS, 3), -1)
    logprobs, mask = torch.zeros(len(rows), seq - 1), torch.zeros(len(rows), seq - 1, dtype=torch.bool)
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        assert sample.routing is not None
        ids[i, : len(row)], routing[i, : len(row)] = row, sample.routing.long()
        new = slice(len(row) - 1 - len(sample.tokens), len(row) - 1)
        logprobs[i, new], mask[i, new] = sample.logprobs, True
    return ids, routing.permute(2, 0, 1, 3), logprobs, mask


def rollout(model: DeepSeek) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asked = prompts(30)
    return as_batch(asked, Generator(model).generate(asked, max_new_tokens=15, stop=[1], max_batch=8))


def gap(model: DeepSeek, batch: tuple[Tensor, Tensor, Tensor, Tensor], replay: bool) -> Any:
    ids, routing, logprobs, mask = batch
    with torch.no_grad():
        training = training_logprobs(model, ids, routing=routing if replay else None)
        free = chosen(model, ids)[1]
    return rollout_gap(logprobs, training, mask, routing, free)


def test_a_rollout_and_the_training_forward_of_a_padded_batch_agree() -> None:
    model = small_model()
    found = gap(model, rollout(model), replay=True)
    assert found.max_logprob <= 1e-5  # as in test_generator.py
    assert found.mean_logprob <= found.max_logprob
    assert found.changed_routing == 0


def test_without_replay_a_small_change_of_weights_moves_choices_and_log_probabilities_jump() -> None:
    """Rollouts in bf16, training in fp32, as mixed-precision runs have it: some choices near a tie turn over.

    With replay the gap is that of rounding; without, tokens whose experts changed stand out.
    """
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        batch = rollout(model)
    with_replay, without = gap(model, batch, replay=True), gap(model, batch, replay=False)
    print(f"changed {with_replay.changed_routing:.3f}, with {with_replay}, without {without}")
    assert with_replay.changed_routing > 0.001
    assert without.max_logprob > 2 * with_replay.max_logprob
    assert without.mean_logprob > with_replay.mean_logprob


def test_figures_of_the_gap_are_those_of_loops() -> None:
    a, b, mask = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4, 5) < 0.5
    mine, theirs = torch.randint(0, 6, (2, 4, 5, 3)), torch.randint(0, 6, (2, 4, 5, 3))
    mine[0, 1, 2] = -1
    found = rollout_gap(a, b, mask, mine, theirs)
    gaps = [abs(float(a[i, j] - b[i, j])) for i in range(4) for j in range(5) if mask[i, j]]
    changed = [
        int(expert not in there)
        for own, there in zip(mine.flatten(0, 2).tolist(), theirs.flatten(0, 2).tolist(), strict=True)
        for expert in own
        if expert >= 0
    ]
    assert found.max_logprob.item() == pytest.approx(max(gaps))
    assert found.mean_logprob.item() == pytest.approx(sum(gaps) / len(gaps))
    assert found.changed_routing.item() == pytest.approx(sum(changed) / len(changed))
    nothing = rollout_gap(a, b, torch.zeros_like(mask))
    assert [float(value) for value in nothing] == [0.0, 0.0, 0.0]


def test_log_probabilities_for_training_carry_the_gradient() -> None:
    model, ids = small_model(), torch.randint(0, CONFIG.vocab_size, (2, 7))
    logprobs = training_logprobs(model, ids, temperature=0.5)
    expected = torch.log_softmax(model.logits(model(ids)) / 0.5, -1)
    for row in range(2):
        for position in range(6):
            wanted = expected[row, position, ids[row, position + 1]].item()
            assert logprobs[row, position].item() == pytest.approx(wanted, abs=1e-5)
    logprobs.sum().backward()
    assert all(weight.grad is not None for weight in model.layers.parameters())
