"""Measure `patchify` at the heads of whole requests: the batch that guidance doubles.

The forward reads a float32 latent and writes the tokens; the backward reads their gradient and the
latent and writes two small tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Arguments, Case
from bench.shapes import CPU, LATENTS
from bench.static import Static
from opensora.functional import patchify
from opensora.kernels import patchify as triton_kernels
from opensora.ops import patchify as op
from opensora.testing import randn

DTYPES = (torch.bfloat16, torch.float32)
PATCH = (1, 2, 2)


def _arguments(shape: str) -> Any:
    size, channels = LATENTS[shape], 128 if shape == "tiny" else 1152

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x = randn(2, *size, device=device, seed=seed)
        weight = randn(channels, size[0], *PATCH, dtype=dtype, device=device, seed=seed + 1)
        bias = randn(channels, dtype=dtype, device=device, seed=seed + 2)
        _, rows, columns = op.counts(x, weight)
        place = (rows * columns, channels)
        # Rounded, so that float64 sees the x that the product sees.
        return x.to(dtype).float(), weight, bias, randn(*place, dtype=dtype, device=device, seed=3)

    return make


def _backward_arguments(shape: str) -> Any:
    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x, weight, *_ = _arguments(shape)(dtype, device, seed)
        frames, rows, columns = op.counts(x, weight)
        tokens = (2, frames * rows * columns, weight.shape[0])
        return randn(*tokens, dtype=dtype, device=device, seed=seed + 4), x, weight

    return make


def _backward(*arguments: Any) -> Any:
    run = op._backward if op._backward.serves(arguments[0]) else op.reference_backward
    return run(*arguments)


def _moved(shape: str) -> Any:
    grad, x, _ = _backward_arguments(shape)(torch.float32, "meta", 0)
    return lambda itemsize: grad.numel() * itemsize + x.numel() * 4


# The longest request is left to the static counts: its float64 tokens take 8 GB.
CASES: dict[str, Case] = {}
for _shape in (f"{CPU} 480p", "tiny", "480p-2s"):
    CASES[f"forward {_shape}"] = Case(
        _arguments(_shape), patchify, op.reference, _moved(_shape), dtypes=DTYPES
    )
    CASES[f"backward {_shape}"] = Case(
        _backward_arguments(_shape),
        _backward,
        op.reference_backward,
        _moved(_shape),
        dtypes=DTYPES,
    )


def _static(shape: str, dtype: torch.dtype) -> Static:
    """Launch all three kernels on meta tensors."""
    grad, x, weight = _backward_arguments(shape)(dtype, "meta", 0)
    _, _, bias, positions = _arguments(shape)(dtype, "meta", 0)

    def launch() -> None:
        triton_kernels.forward(x, weight, bias, positions)
        triton_kernels.backward(grad, x, weight)
        triton_kernels.input_backward(grad, x, weight)

    def useful(kernel: str, constants: dict[str, Any]) -> int:
        # A tile's products without the padding of K; 1152 channels are whole tiles.
        return int(constants["M"] * constants["N"] * constants["K"])

    return Static(launch, useful)


STATIC = {
    "480p-2s": _static("480p-2s", torch.bfloat16),
    "480p-2s float32": _static("480p-2s", torch.float32),
    "720p-16s": _static("720p-16s", torch.bfloat16),
}
