"""Muon: momentum with orthogonalised updates for matrices, AdamW for the rest.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The update
of a weight matrix is its Nesterov momentum with all singular values moved near 1 by five steps of a
quintic Newton-Schulz iteration. Convolution weights are taken as matrices [out, in * kernel], which
`torch.optim.Muon` refuses. Sharded parameters (DTensor) keep sharded state; a matrix's update is
gathered for the iteration, which every rank computes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from opensora.distributed.sharded import local, part_of, whole


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Move the singular values of matrices near 1.

    Args:
        matrix: [..., R, C], floating.
        steps: Newton-Schulz iterations, computed in bfloat16.

    Returns:
        [..., R, C], the dtype of `matrix`; singular values between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall: bool = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Update matrices with Muon and everything else with AdamW, in one optimizer.

    Args:
        named_parameters: (name, parameter) pairs. Parameters with two or more dimensions whose name
            has no part of `adamw_names` are updated with Muon.
        lr: Step size of the matrices; an update has root-mean-square size 0.2 * lr.
        adamw_lr: Step size of all others.
        momentum: Of the matrices.
        betas, eps: Of AdamW.
        weight_decay: Decoupled, for matrices only.
        adamw_names: Parts of names that AdamW takes: embeddings, tables and output layers.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float = 2e-3,
        adamw_lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw_names: tuple[str, ...] = (),
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.ndim >= 2 and not any(part in name for part in adamw_names)
            (matrices if is_matrix else others).append(parameter)
        groups = [
            {"params": matrices, "lr": lr, "muon": True, "weight_decay": weight_decay},
            {"params": others, "lr": adamw_lr, "muon": False, "weight_decay": 0.0},
        ]
        defaults = {"momentum": momentum, "betas": betas, "eps": eps}
        super().__init__([g for g in groups if g["params"]], defaults)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                # One batched product for all matrices of one shape: a transformer has few shapes.
                by_shape: defaultdict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
                for parameter in parameters:
                    rows, *columns = parameter.shape
                    by_shape[rows, math.prod(columns)].append(parameter)
                for same in by_shape.values():
                    self._step_matrices(same, group)
            elif parameters:
                self._step_adamw(parameters, group)
        return loss

    def _step_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        updates = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            local(state["momentum"]).lerp_(local(gradient), 1 - group["momentum"])
            updates.append(whole(gradient.lerp(state["momentum"], group["momentum"])).flatten(1))
        stacked = torch.stack(updates)
        # Size independent of the shape: root mean square 0.2, as an AdamW step has.
        size = 0.2 * max(stacked.shape[1:]) ** 0.5
        for parameter, update in zip(parameters, orthogonalise(stacked), strict=True):
            held = local(parameter)
            held.mul_(1 - group["lr"] * group["weight_decay"])
            held.add_(part_of(update.view(parameter.shape), parameter), alpha=-group["lr"] * size)

    def _step_adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state.update(
                    step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter)
                )
            state["step"] += 1
            assert parameter.grad is not None
            gradient, mean, square = map(local, (parameter.grad, state["mean"], state["square"]))
            mean.lerp_(gradient, 1 - beta1)
            square.lerp_(gradient.square(), 1 - beta2)
            mean = mean / (1 - beta1 ** state["step"])
            root = (square / (1 - beta2 ** state["step"])).sqrt().add_(group["eps"])
            local(parameter).addcdiv_(mean, root, value=-group["lr"])
