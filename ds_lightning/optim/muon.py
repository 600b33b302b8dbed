"""Muon for the matrices of hidden layers and AdamW for the rest, in one optimizer."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ds_lightning.optim.sharded_matrices import Matrices, Sharding, find_matrices, gather, scatter

_Layout = dict[tuple[int, int], Matrices]

_QUINTICS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
"""Factors of x, x^3 and x^5 in each iteration: the odd quintic nearest to 1 over the interval where the last one left
the singular values (The Polar Express, arXiv:2505.16932, section 3). They begin in [0.01, 1] and end within 0.27 of 1,
what five iterations of one quintic reach; smaller ones grow by at most 78 times."""


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (K. Jordan and others, 2024), beside AdamW for what is no matrix of a hidden layer.

    "Muon is Scalable for LLM Training" (arXiv:2502.16982, section 2.2): the orthogonal update is scaled by
    ``0.2 sqrt(max(rows, columns))``, which gives it the size of an AdamW update, so that one learning rate and one
    weight decay serve both. Stacked experts are stacks of matrices, each orthogonal by itself; a parameter group with
    ``parts`` 2 holds matrices of which two are joined by rows, as gate and up projections are.

    Args:
        groups: Parameter groups with ``muon`` (bool), ``weight_decay``, and ``parts`` where ``muon`` is set.
        lr: Learning rate of all groups.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        momentum: Decay rate of Muon's momentum, in Nesterov's form.

    Attributes:
        found_inf: 1 for a step that leaves weights and states as they are, 0 for one that is made, on the device: the
            contract of torch's fused optimizers, which spares the host from waiting. None: all steps are made.
        sharding: How ranks share the parameters, where these are flat tensors with a part on each rank. Momentum stays
            where it is; matrices that lie on several ranks are brought together, dealt out, and their updates
            brought back. None: every parameter is whole.
    """

    found_inf: Tensor | None = None
    sharding: Sharding | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "weight_decay": 0.0, "parts": 1}
        # By its own word for it, torch then restores AdamW's count of steps to where the fused step wants it.
        super().__init__(groups, {**defaults, "fused": True})
        self._layouts: dict[Tensor, _Layout] = {}  # of flat tensors

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pairs = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            if pairs:
                (self._step_muon if group["muon"] else self._step_adamw)(group, pairs)
        return loss

    def _step_muon(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        skip = None if self.found_inf is None else self.found_inf.bool()
        updates: list[tuple[Tensor, _Layout]] = []
        for parameter, gradient in pairs:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            if skip is not None:
                gradient = torch.where(skip, state["momentum"], gradient)  # towards which the momentum does not move
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = torch.lerp(gradient, state["momentum"], group["momentum"])
            updates.append((update.reshape(-1), self._layout(parameter, group["parts"])))
        self._orthogonalise(updates)
        for (parameter, _), (update, layout) in zip(pairs, updates, strict=True):
            moved = parameter if skip is None else parameter.clone()
            moved.mul_(1 - group["lr"] * group["weight_decay"])
            for (rows, columns), matrices in layout.items():
                for where in (*matrices.whole, *(where for where, _ in matrices.shared)):
                    moved.view(-1)[where].add_(update[where], alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)
            if skip is not None:
                parameter.copy_(torch.where(skip, parameter, moved))

    def _layout(self, parameter: Tensor, parts: int) -> _Layout:
        """Return where in a parameter its matrices lie."""
        if self.sharding is None:
            return {(parameter.shape[-2] // parts, parameter.shape[-1]): Matrices([slice(0, parameter.numel())], [])}
        if parameter not in self._layouts:
            self._layouts[parameter] = find_matrices(self.sharding.contents[parameter], parts, self.sharding.rank)
        return self._layouts[parameter]

    def _orthogonalise(self, updates: list[tuple[Tensor, _Layout]]) -> None:
        """Orthogonalise all matrices of one shape together, in place: each alone is too small to keep a device busy."""
        device = updates[0][0].device if self.sharding is None else self.sharding.device
        dtype = _working_dtype(device)
        whole: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        shared: dict[tuple[int, int], list[tuple[Tensor, int]]] = defaultdict(list)
        for update, layout in updates:
            for shape, matrices in layout.items():
                whole[shape] += [update[where].unflatten(0, (-1, *shape)) for where in matrices.whole]
                shared[shape] += [(update[where], first) for where, first in matrices.shared]
        for shape, stacks in whole.items():
            batch = [stack.to(device, dtype) for stack in stacks]
            if shared[shape]:
                assert self.sharding is not None
                batch.append(gather(shared[shape], shape, self.sharding, dtype))
            if not batch:
                continue
            results = orthogonalise(torch.cat(batch)).split([len(stack) for stack in batch])
            for stack, result in zip(stacks, results, strict=False):
                stack.copy_(result)
            if shared[shape]:
                assert self.sharding is not None
                scatter(results[-1], shared[shape], self.sharding)

    def _step_adamw(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        for parameter, _ in pairs:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                }
        states = [self.state[parameter] for parameter, _ in pairs]
        torch._fused_adamw_(
            [parameter for parameter, _ in pairs],
            [gradient for _, gradient in pairs],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"].add_(1) for state in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            for state in states:
                state["step"].sub_(self.found_inf)


def orthogonalise(matrices: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices rows columns"]:
    """Move the singular values of each matrix towards 1 by Newton-Schulz iterations, without a decomposition.

    Numerics: bfloat16 where the device multiplies it natively, else fp32.
    """
    x = matrices.to(_working_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (1.01 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # rounded, no singular value is above 1
    for a, b, c in _QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _working_dtype(device: torch.device) -> torch.dtype:
    native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32
