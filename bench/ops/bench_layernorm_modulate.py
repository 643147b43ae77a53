"""Measure `layernorm_modulate` at the models' shapes.

The forward reads x and writes y; the backward reads dy and x and writes dx.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import peers
from bench.cases import Arguments, Case
from bench.shapes import TOKENS
from bench.static import Static
from opensora.functional import layernorm_modulate
from opensora.kernels import layernorm_modulate as triton_kernels
from opensora.ops import layernorm_modulate as op
from opensora.testing import randn

DTYPES = (torch.bfloat16, torch.float32)


def _arguments(shape: str, selected: bool) -> Any:
    batch, frames, _, channels = TOKENS[shape]

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x = randn(*TOKENS[shape], dtype=dtype, device=device, seed=seed)
        rows = randn(batch, 6, channels, dtype=dtype, device=device, seed=seed + 1).unbind(1)
        if not selected:
            return x, rows[0], rows[1], None, None, None, 1e-6
        select = randn(batch, frames, device=device, seed=seed + 2) > 0
        return x, rows[0], rows[1], select, rows[2], rows[3], 1e-6

    return make


def _run(x: Any, shift: Any, scale: Any, select: Any, shift0: Any, scale0: Any, eps: float) -> Any:
    return layernorm_modulate(x, shift, scale, select=select, shift0=shift0, scale0=scale0, eps=eps)


def _with(norm: Any) -> Any:
    def run(x: Any, shift: Any, scale: Any, *others: Any) -> Any:
        return norm(x, others[-1]) * (1 + scale)[:, None, None] + shift[:, None, None]

    return run


PEERS = {"apex": _with(peers.apex_layer_norm), "liger": _with(peers.liger_layer_norm)}


def _backward_arguments(shape: str) -> Any:
    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x, _, scale, *_ = _arguments(shape, False)(dtype, device, seed)
        grad = randn(*TOKENS[shape], dtype=dtype, device=device, seed=seed + 3)
        return grad, x, scale, None, None, 1e-6

    return make


def _passes(shape: str, count: int) -> Any:
    elements = torch.Size(TOKENS[shape]).numel()
    return lambda itemsize: count * elements * itemsize


def _backward(*arguments: Any) -> Any:
    run = op._backward if op._backward.serves(arguments[0]) else op.reference_backward
    return run(*arguments)


CASES: dict[str, Case] = {}
for _shape in TOKENS:
    for _selected in (False, True):
        CASES[f"forward {_shape}{' per frame' if _selected else ''}"] = Case(
            _arguments(_shape, _selected),
            _run,
            op.reference,
            _passes(_shape, 2),
            peers={} if _selected else PEERS,
            dtypes=DTYPES,
        )
    CASES[f"backward {_shape}"] = Case(
        _backward_arguments(_shape),
        _backward,
        op.reference_backward,
        _passes(_shape, 3),
        dtypes=DTYPES,
    )


def _static(channels: int, selected: bool) -> Static:
    """Launch both kernels on meta tensors of 480p-2s, at any width."""
    batch, frames, patches, _ = TOKENS["480p-2s"]
    x = torch.empty(batch, frames, patches, channels, dtype=torch.bfloat16, device="meta")
    row = torch.empty(batch, 6, channels, dtype=torch.bfloat16, device="meta")[:, 0]
    select, other = None, None
    if selected:
        select, other = torch.empty(batch, frames, dtype=torch.bool, device="meta"), row

    def launch() -> None:
        triton_kernels.forward(x, row, row, select, other, other, 1e-6)
        triton_kernels.backward(x, x, row, select, other, 1e-6)

    return Static(launch)


STATIC = {
    "480p-2s": _static(1152, False),
    "480p-2s per frame": _static(1152, True),
    "2048 wide": _static(2048, True),
}
