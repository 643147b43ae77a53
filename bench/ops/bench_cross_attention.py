"""Measure `cross_attention` at the models' shapes, with prompts of different lengths.

The share is of matrix speed: two products of tokens x text of D useful columns a head in the
forward, five more in the backward, though the kernels, which use no atomics, compute two twice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import peers
from bench.cases import Arguments, Case
from bench.shapes import COMPILED_HEADS, HEADS, TEXT
from bench.static import Static
from opensora.functional import cross_attention
from opensora.kernels import cross_attention as triton_kernels
from opensora.ops import cross_attention as op
from opensora.testing import randn

Function = Callable[..., Any]


def _arguments(shape: tuple[int, ...], lengths: tuple[int, ...]) -> Any:
    batch, frames, tokens, heads, width = shape

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        q = randn(batch, frames * tokens, heads, width, dtype=dtype, device=device, seed=seed)
        kv = randn(sum(lengths), 2, heads, width, dtype=dtype, device=device, seed=seed + 1)
        runs = (list(accumulate(lengths, initial=0))[:-1], lengths)
        starts, counts = (torch.tensor(n, dtype=torch.int32, device=device) for n in runs)
        return q, kv, starts, counts, max(lengths)

    return make


def _run(q: Tensor, kv: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    return cross_attention(q, kv, starts, lengths, longest=longest)


def _efficient(*arguments: Any) -> Tensor:
    """Return the reference on the one tiled backend of torch that takes a mask."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return op.reference(*arguments)


def _and_back(function: Function) -> Function:
    """Return the function followed by its gradients, of an upstream gradient like noise."""

    def run(q: Tensor, kv: Tensor, *others: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, kv)]
            y = function(*leaves, *others)
            return y.detach(), *torch.autograd.grad(y, leaves, q.detach().flatten(-2))

    return run


PEERS = {"sdpa efficient": _efficient, "flash-attn": peers.flash_attn_ragged}
CASES: dict[str, Case] = {}
for _name, _shape in HEADS.items():
    _all = _shape[1] * _shape[2] * _shape[3] * _shape[4] * sum(TEXT[_name])
    CASES[f"forward {_name}"] = Case(
        _arguments(_shape, TEXT[_name]),
        _run,
        op.reference,
        flops=2 * 2 * _all,
        peers=PEERS,
    )
    CASES[f"forward and backward {_name}"] = Case(
        _arguments(_shape, TEXT[_name]),
        _and_back(_run),
        _and_back(op.reference),
        flops=2 * 7 * _all,
        peers={name: _and_back(peer) for name, peer in PEERS.items()},
    )


def _useful(kernel: str, constants: dict[str, Any]) -> int:
    """Count the products over D in a kernel's text: scores and y; those and dp, dq; dk and dv."""
    products = {"forward_kernel": 2, "query_gradient_kernel": 3, "key_gradient_kernel": 4}[kernel]
    return int(products * constants["M"] * constants["N"] * constants["D"])


def _static(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Static:
    batch, frames, tokens, heads, width = shape
    lengths = TEXT["480p-2s"]
    q = torch.empty(batch, frames * tokens, heads, width, dtype=dtype, device="meta")
    kv = torch.empty(sum(lengths), 2, heads, width, dtype=dtype, device="meta")
    numbers = torch.empty(2, dtype=torch.int32, device="meta")

    def launch() -> None:
        y, lse = triton_kernels.forward(q, kv, numbers, numbers)
        triton_kernels.backward(y, q, kv, numbers, numbers, y, lse, max(lengths), True)

    return Static(launch, _useful)


STATIC = {
    "480p-2s": _static(HEADS["480p-2s"]),
    "128 wide": _static(COMPILED_HEADS["128 wide"]),
    "480p-2s float32": _static(HEADS["480p-2s"], torch.float32),
}
