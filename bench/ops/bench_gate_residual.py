"""Measure `gate_residual` at the models' shapes.

The forward reads x and y and writes their sum; the backward reads the gradient and y and writes dy.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Arguments, Case
from bench.shapes import TOKENS
from bench.static import Static
from opensora.functional import gate_residual
from opensora.kernels import gate_residual as triton_kernels
from opensora.ops import gate_residual as op
from opensora.testing import randn

DTYPES = (torch.bfloat16, torch.float32)


def _arguments(shape: str, selected: bool) -> Any:
    batch, frames, _, channels = TOKENS[shape]

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x = randn(*TOKENS[shape], dtype=dtype, device=device, seed=seed)
        y = randn(*TOKENS[shape], dtype=dtype, device=device, seed=seed + 1)
        rows = randn(batch, 6, channels, dtype=dtype, device=device, seed=seed + 2).unbind(1)
        if not selected:
            return x, y, rows[0], None, None
        return x, y, rows[0], randn(batch, frames, device=device, seed=seed + 3) > 0, rows[1]

    return make


def _run(x: Any, y: Any, gate: Any, select: Any, gate0: Any) -> Any:
    return gate_residual(x, y, gate, select=select, gate0=gate0)


def _backward(*arguments: Any) -> Any:
    run = op._backward if op._backward.serves(arguments[0]) else op.reference_backward
    return run(*arguments)


def _passes(shape: str, count: int) -> Any:
    elements = torch.Size(TOKENS[shape]).numel()
    return lambda itemsize: count * elements * itemsize


CASES: dict[str, Case] = {}
for _shape in TOKENS:
    for _selected in (False, True):
        CASES[f"forward {_shape}{' per frame' if _selected else ''}"] = Case(
            _arguments(_shape, _selected), _run, op.reference, _passes(_shape, 3), dtypes=DTYPES
        )
    CASES[f"backward {_shape}"] = Case(
        _arguments(_shape, False),
        _backward,
        op.reference_backward,
        _passes(_shape, 3),
        dtypes=DTYPES,
    )


def _static(
    channels: int, selected: bool, dtype: torch.dtype = torch.bfloat16, longer: int = 1
) -> Static:
    """Launch both kernels on meta tensors of 480p-2s, at any width and as long as asked."""
    batch, frames, patches, _ = TOKENS["480p-2s"]
    patches *= longer
    x = torch.empty(batch, frames, patches, channels, dtype=dtype, device="meta")
    gate = torch.empty(batch, 6, channels, dtype=dtype, device="meta")[:, 0]
    select, other = None, None
    if selected:
        select, other = torch.empty(batch, frames, dtype=torch.bool, device="meta"), gate

    def launch() -> None:
        triton_kernels.forward(x, x, gate, select, other)
        triton_kernels.backward(x, x, gate, select, other)

    return Static(launch)


STATIC = {
    "480p-2s": _static(1152, False),
    "480p-2s per frame": _static(1152, True),
    "480p-2s float32": _static(1152, False, torch.float32),
    "2048 wide": _static(2048, True),
    "64-bit offsets": _static(1152, True, longer=40),
}
