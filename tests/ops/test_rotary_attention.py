"""Oracles: the reference in fp64, for prompts a row by itself, and autograd.

The kernel computes in fp32: a result is a sum of some hundred products of numbers of size one, each rounded to 6e-8 of
it, and measured at most 4e-7 away in the 2-norm; 2e-6 is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lightning.ops.compiled import takes
from ds_lightning.ops.rope import rope_tables
from ds_lightning.ops.rotary_attention import cpu, reference, rotary_attention
from ds_lightning.ops.shared_prompts import SharedPrompts
from tests.ops.compiler import needs_compiler
from tests.ops.error_ratio import relative_error

BOUND = 2e-6
NAMES = ("out", "query", "key_value", "k_rope")
PROMPTS = SharedPrompts(torch.tensor([0, 2, 2, 1, 2]), torch.tensor([3, 1, 4]), prompt_seq=4, seq=50)
attend: Any = partial(rotary_attention, scale=0.3)
define: Any = partial(reference.rotary_attention, scale=0.3)


@dataclass
class Case:
    """Inputs in fp64, and what stands around them."""

    inputs: list[Tensor]
    cos: Tensor
    sin: Tensor
    cotangent: Tensor

    def run(self, dtype: torch.dtype, **layout: Any) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in self.inputs]
        out = attend(*leaves, self.cos.to(dtype), self.sin.to(dtype), **layout)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.cotangent.to(dtype))]

    def truth(self, **layout: Any) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in self.inputs]
        out = define(*leaves, self.cos.double(), self.sin.double(), **layout)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.cotangent)]


def draw(batch: int, seq: int, *, heads: int = 3, nope: int = 5, rope: int = 4, v_dim: int = 7) -> Case:
    rng = torch.Generator().manual_seed(seq)
    widths = ((heads, nope + rope), (heads, nope + v_dim), (rope,), (heads, v_dim))
    *inputs, cotangent = (torch.randn(batch, seq, *width, generator=rng, dtype=torch.float64) for width in widths)
    return Case(inputs, *rope_tables(rope, seq, 1e4, None), cotangent)


def with_prompts(shared: SharedPrompts) -> Case:
    case = draw(1, len(shared.lengths) * shared.prompt_seq + len(shared.prompt) * shared.seq)
    case.cos, case.sin = case.cos[shared.positions()], case.sin[shared.positions()]
    for prompt, length in enumerate(shared.lengths.tolist()):  # what stands behind a prompt is of no use
        case.cotangent[:, prompt * shared.prompt_seq + length : (prompt + 1) * shared.prompt_seq] = 0
    return case


def row_by_row(case: Case, shared: SharedPrompts) -> list[Tensor]:
    """Attend with each completion behind a prompt of its own, and with each prompt alone."""
    leaves = [tensor.clone().requires_grad_() for tensor in case.inputs]
    out = torch.zeros_like(case.cotangent)
    begin = len(shared.lengths) * shared.prompt_seq
    spans = [(prompt, 0, 0) for prompt in range(len(shared.lengths))]
    spans += [(int(prompt), begin + row * shared.seq, shared.seq) for row, prompt in enumerate(shared.prompt)]
    for prompt, first, count in spans:
        length = int(shared.lengths[prompt])
        tokens = [*range(prompt * shared.prompt_seq, prompt * shared.prompt_seq + length), *range(first, first + count)]
        parts = [leaf[:, tokens] for leaf in leaves]
        row = define(*parts, case.cos[tokens].double(), case.sin[tokens].double())
        out[:, tokens[length:] or tokens] = row[:, length:] if count else row
    return [out.detach(), *torch.autograd.grad(out, leaves, case.cotangent)]


def assert_close(found: list[Tensor], truth: list[Tensor], bound: float) -> None:
    for name, ours, expected in zip(NAMES, found, truth, strict=True):
        if expected.norm() > 0:
            assert relative_error(ours, expected) < bound, name
        else:
            assert ours.abs().max() < bound, name


def documents(pieces: list[list[int]]) -> Tensor:
    """Return ids of rows of documents of these lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in pieces])


LAYOUTS: dict[str, tuple[Case, dict[str, Any]]] = {
    "one token": (draw(2, 1), {}),
    "rows": (draw(2, 130), {}),
    "many keys": (draw(1, 600, heads=1), {}),
    "widths of whole registers": (draw(2, 47, heads=4, nope=32, rope=16, v_dim=32), {}),
    "documents": (draw(2, 60), {"segment_ids": documents([[20, 39, 1], [1, 9, 50]])}),
}


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=needs_compiler), torch.float64], ids=str)
@pytest.mark.parametrize(("case", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_output_and_gradients_are_those_of_the_reference(
    case: Case, layout: dict[str, Any], dtype: torch.dtype
) -> None:
    assert takes(cpu.SOURCE, case.inputs[0].to(dtype)) == (dtype == torch.float32)
    assert_close(case.run(dtype, **layout), case.truth(**layout), BOUND if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=needs_compiler), torch.float64], ids=str)
def test_a_completion_sees_its_prompt_and_itself(dtype: torch.dtype) -> None:
    case = with_prompts(PROMPTS)
    found, truth = case.run(dtype, shared=PROMPTS), row_by_row(case, PROMPTS)
    found[0] *= case.cotangent != 0
    assert_close(found, truth, BOUND if dtype == torch.float32 else 1e-12)


def test_a_document_in_pieces_is_one_document() -> None:
    case, ids = draw(1, 12), torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0, 2, 2, 2]])
    assert_close(case.run(torch.float32, segment_ids=ids), case.truth(segment_ids=ids), BOUND)


@needs_compiler
def test_the_number_of_threads_and_a_second_run_change_no_bit() -> None:
    case, before = with_prompts(PROMPTS), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            runs.append(case.run(torch.float32, shared=PROMPTS))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


@needs_compiler
def test_parts_of_wider_tensors_and_turned_ones_are_read_where_they_lie() -> None:
    case = draw(2, 40)
    query, key_value, k_rope = (part.float() for part in case.inputs)
    cos, sin = case.cos, case.sin
    expected = attend(query, key_value, k_rope, cos, sin)
    wide = torch.cat((torch.full((2, 40, 3), torch.nan), k_rope), -1)[..., 3:]
    turned = key_value.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(query, turned, wide, cos, sin), expected)


@needs_compiler
def test_two_backward_passes_of_one_graph_agree_and_leave_the_inputs_alone() -> None:
    case = draw(2, 70)
    leaves = [tensor.float().requires_grad_() for tensor in case.inputs]
    out = attend(*leaves, case.cos, case.sin)
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(leaf, tensor.float()) for leaf, tensor in zip(leaves, case.inputs, strict=True))


@needs_compiler
def test_scores_of_any_size_give_finite_shares() -> None:
    case = draw(1, 33)
    case.inputs[0] *= 1e4
    found = case.run(torch.float32)
    assert all(part.isfinite().all() for part in found)
    assert relative_error(found[0], case.truth()[0]) < 1e-2  # a score of 1e4 is known to 1e-3, and so is its share
