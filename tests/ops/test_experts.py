"""Oracles: fp64 autograd of the reference; the reference itself against a loop over tokens written in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_lightning.ops.compiled import takes
from ds_lightning.ops.experts import cpu, few_tokens, reference, routed_experts
from tests.ops.compiler import needs_compiler
from tests.ops.error_ratio import assert_as_close_as_plain, relative_error

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
NAMES = ("x", "weights", "gate_up_proj", "down_proj")


def draw(tokens: int, experts: int, topk: int, hidden: int = 5, ffn: int = 7, *, seed: int = 0) -> Inputs:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    indices = torch.stack([torch.randperm(experts, generator=rng)[:topk] for _ in range(tokens)])
    return (
        normal(tokens, hidden),
        indices,
        normal(tokens, topk),
        normal(experts, 2 * ffn, hidden),
        normal(experts, hidden, ffn),
    )


def with_indices(inputs: Inputs, indices: Tensor) -> Inputs:
    return inputs[0], indices, inputs[2], inputs[3], inputs[4]


def value_and_gradients(function: object, inputs: Inputs, cotangent: Tensor) -> list[Tensor]:
    x, indices, *others = inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *others)]
    assert callable(function)
    out = function(leaves[0], indices, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def assert_equals_reference(inputs: Inputs) -> None:
    """1e-12 is a few thousand roundings of fp64: sums here have at most some hundred terms of size one."""
    cotangent = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    actual = value_and_gradients(routed_experts, inputs, cotangent)
    expected = value_and_gradients(reference.routed_experts, inputs, cotangent)
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=f"{name} of {a} instead of {e}")


def test_the_reference_is_the_gated_sum_over_a_tokens_experts() -> None:
    x, indices, weights, gate_up, down = (tensor.numpy() for tensor in draw(tokens=6, experts=4, topk=2))
    expected = np.zeros_like(x)
    for token in range(x.shape[0]):
        for slot in range(2):
            expert = indices[token, slot]
            gate, up = gate_up[expert][:7] @ x[token], gate_up[expert][7:] @ x[token]
            expected[token] += weights[token, slot] * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    actual = reference.routed_experts(*map(torch.from_numpy, (x, indices, weights, gate_up, down)))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 1000),
)
def test_output_and_all_gradients_are_those_of_the_reference(
    experts_topk: tuple[int, int], tokens: int, hidden: int, ffn: int, seed: int
) -> None:
    experts, topk = experts_topk
    assert_equals_reference(draw(tokens, experts, topk, hidden, ffn, seed=seed))


@pytest.mark.parametrize(
    ("tokens", "experts", "topk"),
    [(1, 4, 2), (1, 1, 1), (33, 4, 4), (17, 5, 3), (2, 64, 6), (300, 3, 2)],
    ids=["one token", "one of everything", "every expert", "odd sizes", "mostly empty experts", "many rows an expert"],
)
def test_shapes_at_the_edge_equal_the_reference(tokens: int, experts: int, topk: int) -> None:
    assert_equals_reference(draw(tokens, experts, topk, hidden=13, ffn=11))


def test_all_tokens_on_one_expert_equal_the_reference() -> None:
    inputs = draw(tokens=9, experts=4, topk=1)
    for expert in (0, 2, 3):
        assert_equals_reference(with_indices(inputs, torch.full((9, 1), expert)))


@pytest.mark.parametrize("tokens", [63, 64, 65, 128, 129])
def test_rows_around_a_multiple_of_the_alignment_equal_the_reference(tokens: int) -> None:
    inputs = draw(tokens + 3, experts=4, topk=1)
    indices = torch.tensor([2] * tokens + [0, 3, 2])[:, None]
    assert_equals_reference(with_indices(inputs, indices))


@pytest.mark.parametrize("empty", [0, 1, 3])
def test_an_expert_without_tokens_gets_a_gradient_of_exact_zeros(empty: int) -> None:
    inputs = draw(tokens=8, experts=4, topk=2)
    others = torch.tensor([expert for expert in range(4) if expert != empty])
    inputs = with_indices(inputs, others[draw(tokens=8, experts=3, topk=2)[1]])
    assert_equals_reference(inputs)
    _, _, _, grad_gate_up, grad_down = value_and_gradients(routed_experts, inputs, torch.ones_like(inputs[0]))
    for gradient in (grad_gate_up, grad_down):
        assert (gradient[empty] == 0).all()
        assert gradient[others].abs().amin(0).max() > 0


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("alone", [False, True], ids=["one frozen", "all others frozen"])
def test_frozen_inputs_get_no_gradient_and_shift_none(frozen: int, *, alone: bool) -> None:
    x, indices, *others = draw(tokens=7, experts=3, topk=2)
    expected = value_and_gradients(routed_experts, (x, indices, others[0], others[1], others[2]), torch.ones_like(x))
    leaves = [tensor.clone().requires_grad_((place == frozen) == alone) for place, tensor in enumerate((x, *others))]
    routed_experts(leaves[0], indices, *leaves[1:]).sum().backward()
    for name, leaf, gradient in zip(NAMES, leaves, expected[1:], strict=True):
        if leaf.requires_grad:
            assert leaf.grad is not None, name
            assert torch.equal(leaf.grad, gradient), name
        else:
            assert leaf.grad is None, name


def test_a_token_order_and_a_slot_order_change_nothing_but_the_order() -> None:
    x, indices, weights, gate_up, down = draw(tokens=11, experts=5, topk=3)
    out = routed_experts(x, indices, weights, gate_up, down)
    tokens = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    permuted = routed_experts(x[tokens], indices[tokens], weights[tokens], gate_up, down)
    torch.testing.assert_close(permuted, out[tokens], rtol=1e-12, atol=1e-12)
    flipped = routed_experts(x, indices.flip(1), weights.flip(1), gate_up, down)
    torch.testing.assert_close(flipped, out, rtol=1e-12, atol=1e-12)


def test_two_runs_are_bitwise_equal() -> None:
    x, indices, *others = draw(tokens=64, experts=8, topk=3, hidden=24, ffn=20)
    inputs = (x.float(), indices, others[0].float(), others[1].float(), others[2].float())
    runs = [value_and_gradients(routed_experts, inputs, torch.ones_like(inputs[0])) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_a_second_backward_of_the_same_graph_gives_the_same_gradients() -> None:
    x, indices, *others = draw(tokens=7, experts=3, topk=2)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *others)]
    out = routed_experts(leaves[0], indices, *leaves[1:])
    runs = [torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_inputs_are_left_as_they_were() -> None:
    inputs = draw(tokens=7, experts=3, topk=2)
    kept = [tensor.clone() for tensor in inputs]
    value_and_gradients(routed_experts, inputs, torch.ones_like(inputs[0]))
    for tensor, copy in zip(inputs, kept, strict=True):
        assert torch.equal(tensor, copy)


def test_autocast_is_as_close_to_the_truth_as_the_plain_definition_in_bf16() -> None:
    x, indices, weights, gate_up, down = draw(tokens=96, experts=6, topk=2, hidden=40, ffn=24)
    cotangent = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    truth = value_and_gradients(reference.routed_experts, (x, indices, weights, gate_up, down), cotangent)

    def cast(dtype: torch.dtype) -> Inputs:
        return x.to(dtype), indices, weights.to(dtype), gate_up.to(dtype), down.to(dtype)

    plain = value_and_gradients(reference.routed_experts, cast(torch.bfloat16), cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        fast = value_and_gradients(routed_experts, cast(torch.float32), cotangent)
    assert fast[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in fast[1:])
    for name, f, p, t in zip(("out", *NAMES), fast, plain, truth, strict=True):
        assert_as_close_as_plain(name, f, p, t)


def test_without_autocast_fp32_inputs_stay_fp32() -> None:
    x, indices, *others = draw(tokens=12, experts=3, topk=2)
    inputs = (x.float(), indices, others[0].float(), others[1].float(), others[2].float())
    truth = reference.routed_experts(x, indices, *others)
    out = routed_experts(*inputs)
    assert out.dtype == torch.float32
    # sums of about 10 products of size up to 10: some hundred roundings of fp32
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "experts", "topk"), [(1, 4, 2), (1, 1, 1), (33, 4, 4), (17, 5, 3), (2, 64, 6), (0, 4, 2)]
)
@pytest.mark.parametrize("small", [0, 2**16], ids=["sorted where sparse", "batched"])
def test_the_form_for_few_tokens_is_the_reference(
    tokens: int, experts: int, topk: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds_lightning.ops.experts.few.SMALL", small)
    x, indices, *others = draw(max(tokens, 1), experts, topk, hidden=13, ffn=11)
    inputs = (x[:tokens], indices[:tokens], others[0][:tokens], others[1], others[2])
    with torch.inference_mode():
        actual = few_tokens(*inputs)
    torch.testing.assert_close(actual, reference.routed_experts(*inputs), rtol=1e-12, atol=1e-12)


def test_the_form_for_few_tokens_is_as_close_to_the_truth_under_autocast() -> None:
    inputs = draw(tokens=96, experts=6, topk=2, hidden=40, ffn=24)
    truth = reference.routed_experts(*inputs)
    x, indices, weights, gate_up, down = inputs
    plain = reference.routed_experts(x.bfloat16(), indices, weights.bfloat16(), gate_up.bfloat16(), down.bfloat16())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fast = few_tokens(x.float(), indices, weights.float(), gate_up.float(), down.float())
    assert fast.dtype == torch.bfloat16
    assert_as_close_as_plain("out", fast, plain, truth)


@needs_compiler
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "hidden", "ffn"),
    [(1, 1, 1, 1, 1), (1, 5, 2, 5, 3), (6, 4, 4, 17, 9), (700, 4, 3, 17, 9), (900, 16, 4, 32, 48), (40, 64, 1, 16, 16)],
    ids=lambda value: str(value),
)
def test_the_kernel_is_the_reference(tokens: int, experts: int, topk: int, hidden: int, ffn: int) -> None:
    """In fp32: sums of up to some hundred products, measured at most 5e-7 from the truth in the 2-norm."""
    inputs = draw(tokens, experts, topk, hidden, ffn)
    _assert_kernel_close(inputs)
    _assert_kernel_close(with_indices(inputs, torch.arange(topk).expand(tokens, topk).contiguous()))  # on few of them


@needs_compiler
def test_threads_and_a_second_run_of_the_kernel_change_no_bit() -> None:
    inputs, before = _in_fp32(draw(500, 6, 2)), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            runs.append(value_and_gradients(routed_experts, inputs, torch.ones(inputs[0].shape)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


def _in_fp32(inputs: Inputs) -> Inputs:
    x, indices, weights, gate_up, down = inputs
    return x.float(), indices, weights.float(), gate_up.float(), down.float()


def _assert_kernel_close(inputs: Inputs) -> None:
    low = _in_fp32(inputs)
    assert takes(cpu.SOURCE, low[0])
    assert not takes(cpu.SOURCE, inputs[0])
    cotangent = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    found = value_and_gradients(routed_experts, low, cotangent)
    truth = value_and_gradients(reference.routed_experts, inputs, cotangent)
    for name, ours, expected in zip(("out", *NAMES), found, truth, strict=True):
        assert relative_error(ours, expected) < 2e-6, name
