"""Measure `qk_norm_rope` at the models' shapes.

The forward reads qkv and writes it, in place q and k alone; the backward reads the gradient, q and
k and writes the gradient of qkv.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import peers
from bench.cases import Arguments, Case
from bench.shapes import HEADS
from bench.static import Static
from opensora.functional import qk_norm_rope
from opensora.kernels import qk_norm_rope as triton_kernels
from opensora.nn import RotaryEmbedding
from opensora.ops import qk_norm_rope as op
from opensora.testing import randn

FRAMES = -5  # the position axis of [B, T, S, 3, H, D]: frames of a temporal block


def _arguments(shape: str, rotary: bool) -> Any:
    batch, frames, patches, heads, width = HEADS[shape]

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        qkv = randn(batch, frames, patches, 3, heads, width, dtype=dtype, device=device, seed=seed)
        weights = randn(2, width, dtype=dtype, device=device, seed=seed + 1).unbind(0)
        table = RotaryEmbedding(width).to(device, dtype).table(frames) if rotary else (None, None)
        return qkv, *weights, *table, FRAMES, False, 1e-6

    return make


def _run(*arguments: Any, inplace: bool = False) -> Any:
    qkv, q_weight, k_weight, cos, sin, position_dim, legacy, eps = arguments
    rotary = None if cos is None else (cos, sin)
    options = {"position_dim": position_dim, "legacy": legacy, "eps": eps, "inplace": inplace}
    return qk_norm_rope(qkv, q_weight, k_weight, rotary, **options)


def _inplace(qkv: Any, *arguments: Any) -> Any:
    """Write into qkv; results of repeats differ, so this is timed and not compared."""
    with torch.no_grad():
        return _run(qkv, *arguments, inplace=True)


def _others(qkv: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, *rest: Any) -> Any:
    """Call apex for the norm and flash-attn for the rotation, which wants frames beside heads."""
    rows = qkv.transpose(1, 2).flatten(0, 1)  # [B*S, T, 3, H, D]
    parts = zip(rows.unbind(2), (q_weight, k_weight), strict=False)
    return [peers.norm_and_rotate(x, weight, cos, sin, rest[-1]) for x, weight in parts]


def _backward_arguments(shape: str) -> Any:
    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        arguments = _arguments(shape, True)(dtype, device, seed)
        return randn(*arguments[0].shape, dtype=dtype, device=device, seed=seed + 2), *arguments

    return make


def _backward(*arguments: Any) -> Any:
    run = op._backward if op._backward.serves(arguments[0]) else op.reference_backward
    return run(*arguments)


def _passes(shape: str, count: int) -> Any:
    """Count passes over q, k or v alone."""
    elements = torch.Size(HEADS[shape]).numel()
    return lambda itemsize: count * elements * itemsize


CASES: dict[str, Case] = {}
for _shape in HEADS:
    for _name, _rotary in (("norm", False), ("norm, rotary", True)):
        CASES[f"forward {_shape} {_name}"] = Case(
            _arguments(_shape, _rotary),
            _run,
            op.reference,
            _passes(_shape, 6),
            peers={"inplace": _inplace, "C++": op._forward.native, "apex, flash-attn": _others},
        )
    CASES[f"backward {_shape}"] = Case(
        _backward_arguments(_shape), _backward, op.reference_backward, _passes(_shape, 8)
    )


def _static(
    heads: int, width: int, rotary: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Static:
    """Launch all kernels on meta tensors of 480p-2s, at any number and width of heads."""
    batch, frames, patches, *_ = HEADS["480p-2s"]
    qkv = torch.empty(batch, frames, patches, 3, heads, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    table = torch.empty(frames, width, device="meta") if rotary else None
    arguments = (qkv, weight, weight, table, table, FRAMES, False, 1e-6)

    def launch() -> None:
        triton_kernels.forward(*arguments)
        triton_kernels.inplace(*arguments)
        triton_kernels.backward(qkv, *arguments)

    return Static(launch)


STATIC = {
    "480p-2s": _static(16, 72),
    "480p-2s norm": _static(16, 72, rotary=False),
    "480p-2s float32": _static(16, 72, dtype=torch.float32),
    "18 heads of 64": _static(18, 64),
    "9 heads of 128": _static(9, 128),
    "12 heads of 96": _static(12, 96),
}
