"""Measure `residual_layernorm_modulate` at the models' shapes.

The forward reads x and y and writes the sum and the norm; the backward reads the gradients of both,
the sum and y and writes dx and dy.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import peers
from bench.cases import Arguments, Case
from bench.shapes import TOKENS
from bench.static import Static
from opensora.functional import gate_residual, layernorm_modulate, residual_layernorm_modulate
from opensora.kernels import residual_layernorm_modulate as triton_kernels
from opensora.ops import residual_layernorm_modulate as op
from opensora.testing import randn

DTYPES = (torch.bfloat16, torch.float32)
KINDS = {"": (True, False), " per frame": (True, True), " without gate": (False, False)}


def _arguments(shape: str, gated: bool, selected: bool) -> Any:
    batch, frames, _, channels = TOKENS[shape]

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x = randn(*TOKENS[shape], dtype=dtype, device=device, seed=seed)
        y = randn(*TOKENS[shape], dtype=dtype, device=device, seed=seed + 1)
        rows = randn(batch, 6, channels, dtype=dtype, device=device, seed=seed + 2).unbind(1)
        chosen = (rows[0] if gated else None, *rows[1:3])
        if not selected:
            return x, y, *chosen, None, None, None, None, 1e-6
        select = randn(batch, frames, device=device, seed=seed + 3) > 0
        return x, y, *chosen, select, rows[3] if gated else None, *rows[4:], 1e-6

    return make


def _run(*arguments: Any) -> Any:
    names = ("select", "gate0", "shift0", "scale0", "eps")
    return residual_layernorm_modulate(
        *arguments[:5], **dict(zip(names, arguments[5:], strict=True))
    )


def _unfused(x: Any, y: Any, gate: Any, shift: Any, scale: Any, *others: Any) -> Any:
    select, gate0, shift0, scale0, eps = others
    total = x + y if gate is None else gate_residual(x, y, gate, select=select, gate0=gate0)
    return total, layernorm_modulate(
        total, shift, scale, select=select, shift0=shift0, scale0=scale0, eps=eps
    )


def _apex(x: Any, y: Any, gate: Any, shift: Any, scale: Any, *others: Any) -> Any:
    total = torch.addcmul(x, gate[:, None, None], y)
    normed = peers.apex_layer_norm(total, others[-1])
    return total, normed * (1 + scale)[:, None, None] + shift[:, None, None]


def _backward_arguments(shape: str) -> Any:
    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        dsum, dnormed, gate, _, scale, *_ = _arguments(shape, True, False)(dtype, device, seed)
        total, y, *_ = _arguments(shape, True, False)(dtype, device, seed + 4)
        return dsum, dnormed, total, y, gate, scale, None, None, None, 1e-6

    return make


def _backward(*arguments: Any) -> Any:
    run = op._backward if op._backward.serves(arguments[1]) else op.reference_backward
    return run(*arguments)


def _passes(shape: str, count: int) -> Any:
    elements = torch.Size(TOKENS[shape]).numel()
    return lambda itemsize: count * elements * itemsize


CASES: dict[str, Case] = {}
for _shape in TOKENS:
    for _kind, _choice in KINDS.items():
        CASES[f"forward {_shape}{_kind}"] = Case(
            _arguments(_shape, *_choice),
            _run,
            op.reference,
            _passes(_shape, 4),
            peers={"unfused": _unfused} | ({} if _kind else {"apex": _apex}),
            dtypes=DTYPES,
        )
    CASES[f"backward {_shape}"] = Case(
        _backward_arguments(_shape),
        _backward,
        op.reference_backward,
        _passes(_shape, 6),
        dtypes=DTYPES,
    )


def _static(
    channels: int,
    gated: bool,
    selected: bool,
    dtype: torch.dtype = torch.bfloat16,
    longer: int = 1,
) -> Static:
    """Launch both kernels on meta tensors of 480p-2s, at any width and as long as asked."""
    batch, frames, patches, _ = TOKENS["480p-2s"]
    patches *= longer
    x = torch.empty(batch, frames, patches, channels, dtype=dtype, device="meta")
    row = torch.empty(batch, 6, channels, dtype=dtype, device="meta")[:, 0]
    gate, y = (row, x) if gated else (None, None)
    select, gate0, other = None, None, None
    if selected:
        select = torch.empty(batch, frames, dtype=torch.bool, device="meta")
        gate0, other = gate, row

    def launch() -> None:
        triton_kernels.forward(x, x, gate, row, row, select, gate0, other, other, 1e-6)
        triton_kernels.backward(x, x, x, y, gate, row, select, gate0, other, 1e-6)

    return Static(launch)


STATIC = {
    "480p-2s": _static(1152, True, False),
    "480p-2s per frame": _static(1152, True, True),
    "480p-2s without gate": _static(1152, False, True),
    "480p-2s float32": _static(1152, True, False, torch.float32),
    "2048 wide": _static(2048, True, True),
    "64-bit offsets": _static(1152, True, True, longer=40),
}
