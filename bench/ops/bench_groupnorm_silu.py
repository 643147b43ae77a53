"""Measure `groupnorm_silu` at the VAEs' shapes.

The forward reads x twice and writes y; the backward reads dy and x twice and writes dx.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench import peers
from bench.cases import Arguments, Case
from bench.shapes import ACTIVATIONS, COMPILED_ACTIVATIONS, SMALL_ACTIVATION
from bench.static import Static
from opensora.functional import groupnorm_silu
from opensora.kernels import groupnorm_silu as triton_kernels
from opensora.ops import groupnorm_silu as op
from opensora.ops._channels_last import channels_last
from opensora.testing import randn

GROUPS = 32
DTYPES = (torch.bfloat16, torch.float32)


def _arguments(shape: tuple[int, ...]) -> Any:
    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x = channels_last(randn(*shape, dtype=dtype, device=device, seed=seed))
        weight, bias = randn(2, shape[1], dtype=dtype, device=device, seed=seed + 1).unbind(0)
        return x, weight, bias, GROUPS, 1e-6, True

    return make


def _run(x: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool) -> Any:
    return groupnorm_silu(x, weight, bias, groups, eps=eps, silu=silu)


def _aten(x: Any, weight: Any, bias: Any, groups: int, eps: float, _: bool) -> Any:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def _apex(x: Any, *others: Any) -> Any:
    return peers.apex_group_norm(x.flatten(2, -2), *others)  # a view: pixels of frames are rows


def _backward_arguments(shape: tuple[int, ...]) -> Any:
    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x, weight, bias, groups, eps, silu = _arguments(shape)(dtype, device, seed)
        grad = channels_last(randn(*shape, dtype=dtype, device=device, seed=seed + 2))
        grouped = x.float().reshape(shape[0], groups, -1)
        variance, mean = torch.var_mean(grouped, dim=-1, correction=0)
        return grad, x, weight, bias, torch.stack((mean, torch.rsqrt(variance + eps)), -1), silu

    return make


def _backward(*arguments: Any) -> Any:
    run = op._backward if op._backward.serves(arguments[0]) else op.reference_backward
    return run(*arguments)


def _passes(shape: tuple[int, ...], count: int) -> Any:
    elements = torch.Size(shape).numel()
    return lambda itemsize: count * elements * itemsize


CASES: dict[str, Case] = {}
for _name, _shape in ACTIVATIONS.items():
    CASES[f"forward {_name}"] = Case(
        _arguments(_shape),
        _run,
        op.reference,
        _passes(_shape, 3),
        peers={"aten, channels_last": _aten, "apex": _apex},
        check=_arguments(SMALL_ACTIVATION),
        dtypes=DTYPES,
    )
    CASES[f"backward {_name}"] = Case(
        _backward_arguments(_shape),
        _backward,
        op.reference_backward,
        _passes(_shape, 5),
        check=_backward_arguments(SMALL_ACTIVATION),
        dtypes=DTYPES,
    )


def _static(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Static:
    """Launch all kernels on meta tensors of any shape."""
    x = channels_last(torch.empty(shape, dtype=dtype, device="meta"))
    row = torch.empty(shape[1], dtype=dtype, device="meta")

    def launch() -> None:
        _, mean_rstd = triton_kernels.forward(x, row, row, GROUPS, 1e-6, True)
        triton_kernels.backward(x, x, row, row, mean_rstd, True)

    return Static(launch)


STATIC = {
    "128 wide": _static(ACTIVATIONS["128 wide"]),
    "512 wide": _static(ACTIVATIONS["512 wide"]),
    "128 wide float32": _static(ACTIVATIONS["128 wide"], torch.float32),
} | {name: _static(shape) for name, shape in COMPILED_ACTIVATIONS.items()}
