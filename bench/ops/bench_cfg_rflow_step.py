"""Measure `cfg_rflow_step` at the latents of whole requests.

A guided step reads z and both halves of the velocity's first 4 of 8 channels, and writes the next
step's batch of two. The model's velocity is float32; bfloat16 is measured for other models.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Arguments, Case
from bench.shapes import LATENTS
from bench.static import Static
from opensora.functional import cfg_rflow_step
from opensora.kernels import cfg_rflow_step as triton_kernels
from opensora.ops import cfg_rflow_step as op
from opensora.testing import randn

DTYPES = (torch.float32, torch.bfloat16)


def _arguments(shape: str, masked: bool) -> Any:
    """Return what makes the arguments of a guided step; the dtype is the velocity's."""
    size = LATENTS[shape]

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        z = randn(1, *size, device=device, seed=seed)
        velocity = randn(2, 2 * size[0], *size[1:], dtype=dtype, device=device, seed=seed + 1)
        mask = randn(1, size[1], device=device, seed=seed + 2) > 0 if masked else None
        return z, velocity, 7.0, torch.full((1,), 1 / 30, device=device), mask, 2

    return make


def _run(z: Any, velocity: Any, guidance: Any, dt: Any, mask: Any, copies: int) -> Any:
    return cfg_rflow_step(z, velocity, guidance, dt, mask=mask, copies=copies)


def _moved(shape: str) -> Any:
    elements = torch.Size(LATENTS[shape]).numel()
    return lambda itemsize: elements * (2 * itemsize + 3 * 4)


CASES = {
    f"{shape}{' masked' if masked else ''}": Case(
        _arguments(shape, masked), _run, op.reference, _moved(shape), dtypes=DTYPES
    )
    for shape in LATENTS
    for masked in (False, True)
}


def _static(shape: str, dtype: torch.dtype, masked: bool, cropped: bool = False) -> Static:
    z, velocity, scale, dt, mask, copies = _arguments(shape, masked)(dtype, "meta", 0)
    if cropped:
        velocity = torch.nn.functional.pad(velocity, (0, 1, 0, 1))[..., :-1, :-1]
    return Static(lambda: triton_kernels.forward(z, velocity, None, scale, dt, mask, copies))


STATIC = {
    "480p-2s": _static("480p-2s", torch.float32, False),
    "480p-2s bfloat16": _static("480p-2s", torch.bfloat16, False),
    "480p-2s masked": _static("480p-2s", torch.float32, True),
    "480p-2s cropped": _static("480p-2s", torch.float32, False, cropped=True),
}
