"""Measure `spatial_attention` at the models' shapes, with the norms of STDiT3.

The share is of matrix speed: two products over S x S of D useful columns a head in the forward,
five more in the backward, though the kernels, which use no atomics, compute two of these twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.cases import Arguments, Case
from bench.shapes import COMPILED_HEADS, HEADS
from bench.static import Static
from opensora.functional import qk_norm_rope, spatial_attention
from opensora.kernels import spatial_attention as triton_kernels
from opensora.ops import spatial_attention as op
from opensora.testing import randn

EPS = 1e-6
Function = Callable[..., Any]


def _arguments(shape: tuple[int, ...]) -> Any:
    batch, frames, tokens, heads, width = shape

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        qkv = randn(batch, frames, tokens, 3, heads, width, dtype=dtype, device=device, seed=seed)
        weights = (1 + randn(width, dtype=dtype, device=device, seed=seed + i) / 8 for i in (1, 2))
        return qkv, *weights

    return make


def _run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    return spatial_attention(qkv, q_weight, k_weight, eps=EPS)


def _reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    return op.reference(qkv, q_weight, k_weight, EPS)


def _with(attend: peers.Attention) -> Function:
    """Return attention by a peer, behind the norms of our own kernel."""

    def run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        prepared = qk_norm_rope(qkv, q_weight, k_weight, eps=EPS)
        y = attend(*prepared.flatten(0, 1).unbind(2))  # [B*T, S, H, D]
        return y.reshape(*qkv.shape[:3], -1)

    return run


def _and_back(function: Function) -> Function:
    """Return the function followed by its gradients, of an upstream gradient like noise."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in arguments]
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(
                y, leaves, leaves[0].detach()[..., 1, :, :].flatten(-2)
            )

    return run


def _flops(shape: tuple[int, ...], products: int) -> int:
    batch, frames, tokens, heads, width = shape
    return products * 2 * batch * frames * heads * tokens**2 * width


CASES: dict[str, Case] = {}
for _name, _shape in HEADS.items():
    _check = _arguments((1, min(_shape[1], 2), *_shape[2:]))
    CASES[f"forward {_name}"] = Case(
        _arguments(_shape),
        _run,
        _reference,
        flops=_flops(_shape, 2),
        peers={name: _with(attend) for name, attend in peers.ATTENTION.items()},
        check=_check,
    )
    CASES[f"forward and backward {_name}"] = Case(
        _arguments(_shape),
        _and_back(_run),
        _and_back(_reference),
        flops=_flops(_shape, 7),
        peers={name: _and_back(_with(attend)) for name, attend in peers.ATTENTION.items()},
        check=_check,
    )


def _useful(kernel: str, constants: dict[str, Any]) -> int:
    """Count the products over D in a kernel's text: scores and y; those and dp, dq; dk and dv."""
    products = {"forward_kernel": 2, "query_gradient_kernel": 3, "key_gradient_kernel": 4}[kernel]
    return int(products * constants["M"] * constants["N"] * constants["D"])


def _static(
    shape: tuple[int, ...], *, norm: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Static:
    batch, frames, tokens, heads, width = shape
    qkv = torch.empty(batch, frames, tokens, 3, heads, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta") if norm else None

    def launch() -> None:
        y, stats = triton_kernels.forward(qkv, weight, weight, EPS)
        triton_kernels.backward(y, qkv, weight, weight, y, stats, 1e-6)

    return Static(launch, _useful)


STATIC = {
    "480p-2s": _static(HEADS["480p-2s"]),
    "720p-2s without norm": _static(HEADS["720p-2s"], norm=False),
    "720p-16s": _static(COMPILED_HEADS["720p-16s"]),
    "128 wide": _static(COMPILED_HEADS["128 wide"]),
    "480p-2s float32": _static(HEADS["480p-2s"], dtype=torch.float32),
}
