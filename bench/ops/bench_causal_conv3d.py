"""Measure `causal_conv3d` at the VAEs' shapes, with bias and residual, and with the norm in front.

Bound by products: 2 * B * T' * H' * W' * O * I * taps operations. The peer is the library's
convolution on channels_last_3d with the copy that pads in front of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Arguments, Case
from bench.shapes import COMPILED_CONVOLUTIONS, CONVOLUTIONS, CPU, SMALL_CONVOLUTION
from bench.static import Static
from opensora import _extension
from opensora.functional import causal_conv3d, groupnorm_silu
from opensora.kernels import causal_conv3d as triton_kernels
from opensora.ops import causal_conv3d as op
from opensora.ops._channels_last import channels_last
from opensora.testing import randn

_Shape = tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int]]
GROUPS = 32


def _arguments(shape: _Shape, normed: bool = False) -> Any:
    size, (outputs, *kernel), stride = shape
    taps = torch.Size(kernel).numel()

    def make(dtype: torch.dtype, device: str, seed: int) -> Arguments:
        x = randn(*size, dtype=dtype, device=device, seed=seed)
        weight = randn(outputs, size[1], *kernel, dtype=dtype, device=device, seed=seed + 1)
        weight *= (size[1] * taps) ** -0.5
        bias = randn(outputs, dtype=dtype, device=device, seed=seed + 2)
        out = op.output_size(x, weight, list(stride))
        residual = randn(*out, dtype=dtype, device=device, seed=seed + 3)
        norm = []
        if normed:
            mean_rstd = randn(size[0], GROUPS, 2, device=device, seed=seed + 4) * 0.1
            mean_rstd[..., 1] += 1
            norm = [mean_rstd]
            norm += [randn(size[1], dtype=dtype, device=device, seed=seed + i) for i in (5, 6)]
        return channels_last(x), channels_last(weight), bias, channels_last(residual), norm, stride

    return make


def _run(x: Any, weight: Any, bias: Any, residual: Any, norm: Any, stride: Any) -> Any:
    return causal_conv3d(
        x, weight, bias, stride=stride, residual=residual, norm=tuple(norm) or None
    )


def _two_passes(x: Any, weight: Any, bias: Any, residual: Any, norm: Any, stride: Any) -> Any:
    """Normalise by a pass of its own, which also takes the statistics that `_run` is given."""
    normed = groupnorm_silu(x, norm[1], norm[2], GROUPS)
    return causal_conv3d(normed, weight, bias, stride=stride, residual=residual)


def _with_statistics(x: Any, *arguments: Any) -> Any:
    """Take the next norm's statistics too, as `_two_passes` takes this one's: a VAE's chain."""
    if not x.is_cuda or _extension.cuda_path is None:
        raise NotImplementedError("csrc/cuda alone has it")
    return torch.ops.opensora.causal_conv3d_with_statistics(x, *arguments, GROUPS, 1e-6)


def _channels_first(*arguments: Any) -> Any:
    """Run the library's convolution on its other layout, copies into it included."""
    dense = [t.contiguous() if isinstance(t, Tensor) else t for t in arguments]
    return op.reference(*dense)


def _flops(shape: _Shape) -> int:
    _, weight, _, y, *_ = _arguments(shape)(torch.float32, "meta", 0)
    return int(2 * y.numel() * weight[0].numel())


CASES: dict[str, Case] = {
    f"forward {name}": Case(
        _arguments(shape),
        _run,
        op.reference,
        flops=_flops(shape),
        peers={"C++": op._forward.native, "library, channels first": _channels_first},
        check=_arguments(SMALL_CONVOLUTION),
    )
    for name, shape in CONVOLUTIONS.items()
} | {
    "forward 256 wide, normed": Case(
        _arguments(CONVOLUTIONS["256 wide"], True),
        _run,
        op.reference,
        flops=_flops(CONVOLUTIONS["256 wide"]),
        peers={
            "C++": op._forward.native,
            "C++, with statistics": _with_statistics,
            "groupnorm_silu, then this": _two_passes,
        },
        check=_arguments(SMALL_CONVOLUTION, True),
    )
}


def _static(
    shape: _Shape,
    dtype: torch.dtype = torch.bfloat16,
    padded: bool = False,
    normed: bool = False,
) -> Static:
    """Launch the kernel; `padded` where no block of 16 is full, so that padding cannot be gated."""

    def launch() -> None:
        *tensors, stride = _arguments(shape, normed)(dtype, "meta", 0)
        triton_kernels.forward(*tensors, list(stride))

    return Static(launch, None if padded else _useful)


def _useful(_: str, constants: dict[str, Any]) -> int:
    """Count a step without padding: the mean over the steps and over the blocks of outputs."""
    steps = -(-constants["I"] // constants["IN"])
    blocks = -(-constants["O"] // constants["OUT"])
    return round(constants["PIXELS"] * constants["I"] / steps * constants["O"] / blocks)


_ON_GPUS = {name: shape for name, shape in CONVOLUTIONS.items() if not name.startswith(CPU)}
STATIC = {name: _static(shape) for name, shape in _ON_GPUS.items()} | {
    "256 wide float32": _static(CONVOLUTIONS["256 wide"], torch.float32),
    "256 wide, normed": _static(CONVOLUTIONS["256 wide"], normed=True),
    "2D, 128 wide, normed": _static(COMPILED_CONVOLUTIONS["2D, 128 wide"], normed=True),
}
for _name, _shape in COMPILED_CONVOLUTIONS.items():
    STATIC[_name] = _static(_shape, padded=_name in ("4 to 512", "128 to 3"))
