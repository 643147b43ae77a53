"""Measure `temporal_attention` at the models' shapes.

The forward reads q, k and v and writes y; the backward reads them and the gradient of y and writes
theirs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from bench import peers
from bench.cases import Arguments, Case
from bench.shapes import FRAMES
from bench.static import Static
from opensora.functional import qk_norm_rope, temporal_attention
from opensora.kernels import temporal_attention as triton_kernels
from opensora.nn import RotaryEmbedding
from opensora.ops import _heads
from opensora.ops import temporal_attention as op
from opensora.testing import randn


def _arguments(shape: str) -> Any:
    batch, frames, patches, heads, width = FRAMES[shape]

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        qkv = randn(batch, frames, patches, 3, heads, width, dtype=dtype, device=device, seed=seed)
        weights = randn(2, width, dtype=dtype, device=device, seed=seed + 1).unbind(0)
        return qkv, *weights, *RotaryEmbedding(width).to(device, dtype).table(frames), 1e-6

    return make


def _run(qkv: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float) -> Any:
    return temporal_attention(qkv, q_weight, k_weight, (cos, sin), eps=eps)


def _with(attend: peers.Attention) -> Any:
    """Return attention by a peer on rows of frames, behind norms and rotation of our own kernel."""

    def run(qkv: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float) -> Any:
        prepared = qk_norm_rope(qkv, q_weight, k_weight, (cos, sin), position_dim=-5, eps=eps)
        rows = prepared.transpose(1, 2).flatten(0, 1)  # [B*S, T, 3, H, D]
        y = attend(*rows.unbind(2)).unflatten(0, (qkv.shape[0], -1))
        return y.transpose(1, 2).flatten(-2).contiguous()

    return run


@cache
def _compiled_norms() -> Any:
    def prepare(qkv: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float) -> Any:
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)  # [B, S, H, T, D]
        q = _heads.prepare(q, q_weight, cos, sin, False, eps).to(qkv.dtype)
        k = _heads.prepare(k, k_weight, cos, sin, False, eps).to(qkv.dtype)
        return tuple(t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))

    return torch.compile(prepare, dynamic=False)


def _flash_behind_inductor(qkv: Any, *arguments: Any) -> Any:
    """Run SDPA behind norms and rotation that Inductor fused: what PyTorch offers without us."""
    y = peers.ATTENTION["sdpa flash"](*_compiled_norms()(qkv, *arguments))
    return y.unflatten(0, (qkv.shape[0], -1)).transpose(1, 2).flatten(-2).contiguous()


def _backward_arguments(shape: str) -> Any:
    batch, frames, patches, heads, width = FRAMES[shape]

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        sizes = (batch, frames, patches, heads * width)
        grad = randn(*sizes, dtype=dtype, device=device, seed=seed + 2)
        return grad, *_arguments(shape)(dtype, device, seed)

    return make


def _backward(*arguments: Any) -> Any:
    run = op._backward if op._backward.serves(arguments[0]) else op.reference_backward
    return run(*arguments)


def _passes(shape: str, count: int) -> Any:
    """Count passes over q, k or v alone."""
    elements = torch.Size(FRAMES[shape]).numel()
    return lambda itemsize: count * elements * itemsize


CASES: dict[str, Case] = {}
for _shape in FRAMES:
    CASES[f"forward {_shape}"] = Case(
        _arguments(_shape),
        _run,
        op.reference,
        _passes(_shape, 4),
        peers={"C++": op._forward.native, "inductor + sdpa flash": _flash_behind_inductor}
        | {name: _with(attend) for name, attend in peers.ATTENTION.items()},
    )
    CASES[f"backward {_shape}"] = Case(
        _backward_arguments(_shape), _backward, op.reference_backward, _passes(_shape, 7)
    )

#: Products of M x N x D in the text of each kernel; N is M unless it is given.
PRODUCTS = {
    "forward_kernel": 2,
    "backward_kernel": 5,
    "query_gradient_kernel": 5,  # q k' in both sweeps
    "key_gradient_kernel": 4,
}


def _useful(kernel: str, constants: dict[str, Any]) -> int:
    """Count a tile's products without the padding of D; that of T is the tile's, and not gated."""
    rows = int(constants["M"])
    return PRODUCTS[kernel] * rows * int(constants.get("N", rows)) * int(constants["D"])


def _static(shape: str, width: int = 72, dtype: torch.dtype = torch.bfloat16) -> Static:
    """Launch the kernels on meta tensors of a shape, at any width of heads."""
    batch, frames, patches, heads, _ = FRAMES[shape]
    qkv = torch.empty(batch, frames, patches, 3, heads, width, dtype=dtype, device="meta")
    dy = torch.empty(batch, frames, patches, heads * width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    table = torch.empty(frames, width, dtype=dtype, device="meta")
    arguments = (qkv, weight, weight, table, table, 1e-6)

    def launch() -> None:
        triton_kernels.forward(*arguments)
        triton_kernels.backward(dy, *arguments)

    return Static(launch, _useful)


STATIC = {
    "480p-2s": _static("480p-2s"),
    "480p-2s float32": _static("480p-2s", dtype=torch.float32),
    "480p-2s, 128 wide": _static("480p-2s", 128),
    "144p-4s": _static("144p-4s"),
    "144p-8s": _static("144p-8s"),
    "144p-16s": _static("144p-16s"),
}
