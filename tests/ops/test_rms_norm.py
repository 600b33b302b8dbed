"""Oracles: torch's rms_norm and fp64 autograd of the reference."""

from __future__ import annotations

import pytest
import torch

from ds_lightning.ops.compiled import takes
from ds_lightning.ops.rms_norm import cpu, reference, rms_norm
from tests.ops.compiler import needs_compiler
from tests.ops.error_ratio import assert_as_close_as_plain, relative_error


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=rng, dtype=torch.float64)
    return x, torch.randn(shape[-1], generator=rng, dtype=torch.float64)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (7,),
        (3, 5),
        (2, 3, 33),
    ],
)
def test_value_and_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    inputs = draw(*shape)
    results = []
    for function in (
        rms_norm,
        reference.rms_norm,
        lambda x, w, eps: torch.nn.functional.rms_norm(x, x.shape[-1:], w, eps),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(leaves[0], leaves[1], 1e-2)
        cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
    for actual, plain, expected in zip(*results, strict=True):
        torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_epsilon_is_added_to_the_mean_square() -> None:
    x = torch.full((4,), 3.0, dtype=torch.float64)
    out = rms_norm(x, torch.ones(4, dtype=torch.float64), 7.0)
    torch.testing.assert_close(out, x / 4, rtol=1e-14, atol=0)  # sqrt(9 + 7)


def test_a_row_of_zeros_stays_zero_with_finite_gradients() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    out = rms_norm(x, torch.ones(5), 1e-6)
    out.sum().backward()
    assert (out == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_low_precision_is_normalised_in_fp32_and_rounded_once() -> None:
    x, weight = draw(64, 96)
    low = (100 * x).bfloat16()
    out = rms_norm(low, weight.float(), 1e-6)
    assert out.dtype == torch.bfloat16
    truth = rms_norm(low.double(), weight.float().double(), 1e-6)
    # one rounding to 8 significant bits
    torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_shifts_none(frozen: int) -> None:
    inputs = draw(3, 5)
    everything = [tensor.clone().requires_grad_() for tensor in inputs]
    leaves = [tensor.clone().requires_grad_(place != frozen) for place, tensor in enumerate(inputs)]
    for x, weight in (everything, leaves):
        rms_norm(x, weight, 1e-6).square().sum().backward()
    other = leaves[1 - frozen].grad
    assert leaves[frozen].grad is None
    assert other is not None
    assert torch.equal(other, everything[1 - frozen].grad)  # type: ignore[arg-type]


def test_autocast_is_as_close_to_the_truth_as_the_plain_definition_in_bf16() -> None:
    inputs = draw(50, 96)
    cotangent = torch.randn(50, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        assert callable(function)
        out = function(*leaves, 1e-6)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]

    truth, plain = run(reference.rms_norm, torch.float64), run(reference.rms_norm, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        fast = run(rms_norm, torch.float32)
    assert [tensor.dtype for tensor in fast] == [torch.bfloat16, torch.float32, torch.float32]
    for name, f, p, t in zip(("out", "x", "weight"), fast, plain, truth, strict=True):
        assert_as_close_as_plain(name, f, p, t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_gradient_no_bit_is_different(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 7, 24).to(dtype), torch.rand(24).to(dtype)
    with torch.no_grad():
        free = rms_norm(x, weight, 1e-6)
    tracked = rms_norm(x.requires_grad_(), weight, 1e-6)
    assert tracked.requires_grad
    assert free.dtype == tracked.dtype
    assert torch.equal(free, tracked)


@needs_compiler
@pytest.mark.parametrize("shape", [(7,), (64, 5), (65, 33), (3, 200, 128)], ids=str)
def test_the_kernel_is_the_reference(shape: tuple[int, ...]) -> None:
    """In fp32: measured at most 2e-7 from the truth in the 2-norm, gradients of a gain being sums over all rows."""
    inputs, results = draw(*shape), []
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for function, dtype in ((rms_norm, torch.float32), (reference.rms_norm, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        assert takes(cpu.SOURCE, *leaves) == (dtype == torch.float32)
        out = function(leaves[0], leaves[1], 1e-2)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-6


@needs_compiler
def test_the_kernel_reads_parts_of_wider_rows_and_threads_change_no_bit() -> None:
    x, weight = (tensor.float() for tensor in draw(4000, 96))
    wide = torch.cat((torch.full((4000, 3), torch.nan), x), -1)
    before, results = torch.get_num_threads(), []
    try:
        for threads, rows in ((1, x), (2, x), (3, wide[:, 3:])):
            torch.set_num_threads(threads)
            leaves = [rows.detach().requires_grad_(), weight.clone().requires_grad_()]
            out = rms_norm(leaves[0], leaves[1], 1e-6)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for run in results[1:] for one, other in zip(results[0], run, strict=True))
