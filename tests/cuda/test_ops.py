"""The operations that run other code on a GPU than on a CPU. The oracle: the reference in fp64 on the CPU."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ds_lightning.ops.attention import causal_attention
from ds_lightning.ops.attention.reference import causal_attention as causal_definition
from ds_lightning.ops.experts import reference, routed_experts
from ds_lightning.ops.prefix_attention import prefix_attention
from ds_lightning.ops.prefix_attention.reference import prefix_attention as prefix_definition
from tests.ops.error_ratio import assert_as_close_as_plain, relative_error

Function = Callable[..., Tensor]


def draw(*shapes: Sequence[int]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes]


def value_and_gradients(function: Function, inputs: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in inputs]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(device, out.dtype))
    return [tensor.detach().cpu() for tensor in (out, *gradients)]


def check(ours: Function, plain: Function, inputs: list[Tensor]) -> None:
    """In fp32 within rounding of the truth; in bf16 no further from it than 1.5 times the plain definition."""
    truth = value_and_gradients(plain, inputs, torch.float64, "cpu")
    for number, (value, true) in enumerate(
        zip(value_and_gradients(ours, inputs, torch.float32, "cuda"), truth, strict=True)
    ):
        error = relative_error(value, true)
        print(f"fp32, {number}: {error:.1e}")
        assert error < 1e-5, "sums of some hundred terms in fp32; TF32 would be 3e-4"
    low = value_and_gradients(ours, inputs, torch.bfloat16, "cuda")
    simple = value_and_gradients(plain, inputs, torch.bfloat16, "cuda")
    for number, (value, definition, true) in enumerate(zip(low, simple, truth, strict=True)):
        assert_as_close_as_plain(f"bf16, {number}", value, definition, true)


@pytest.mark.parametrize(("hidden", "ffn"), [(64, 48), (24, 9), (30, 16)], ids=["16 bytes", "odd ffn", "odd hidden"])
def test_experts_are_those_of_the_reference_also_where_one_has_no_token(hidden: int, ffn: int) -> None:
    tokens, experts, topk = 300, 8, 3
    rng = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(experts - 1, generator=rng)[:topk] for _ in range(tokens)])
    indices += indices >= 4  # nobody chooses the fifth
    inputs = draw((tokens, hidden), (tokens, topk), (experts, 2 * ffn, hidden), (experts, hidden, ffn))

    def with_choice(form: Function) -> Function:
        return lambda x, weights, *matrices: form(x, indices.to(x.device), weights, *matrices)

    check(with_choice(routed_experts), with_choice(reference.routed_experts), inputs)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("qk", "v_dim"), [(24, 16), (16, 24), (192, 128)])
def test_causal_attention_is_that_of_the_reference(qk: int, v_dim: int, *, documents: bool) -> None:
    inputs = draw((2, 3, 200, qk), (2, 3, 200, qk), (2, 3, 200, v_dim))
    segments = (torch.arange(200) // 70).expand(2, -1) if documents else None

    def form(function: Function) -> Function:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            own = None if segments is None else segments.to(query.device)
            return function(query, key, value, scale=qk**-0.5, segment_ids=own)

        return run

    check(form(causal_attention), form(causal_definition), inputs)


def test_prefix_attention_is_that_of_the_reference() -> None:
    inputs = draw((5, 3, 40, 24), (5, 3, 40, 24), (5, 3, 40, 16), (2, 3, 17, 24), (2, 3, 17, 16))
    prefix, lengths = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([17, 9])

    def form(function: Function) -> Function:
        return lambda *parts: function(*parts, prefix.to(parts[0].device), lengths.to(parts[0].device), scale=0.2)

    check(form(prefix_attention), form(prefix_definition), inputs)
