"""Run `causal_conv3d` on CUDA; contract in `opensora/ops/causal_conv3d.py`.

A product of matrices whose left one is never laid out: row m is an output pixel, column k a channel
of one of the taps, and the load of a tile computes where that pixel's neighbour lies. Zero padding
is a mask. Bytes: x, weight and residual are read, y is written; an element of x is loaded once a
tap and block of output channels, from the cache for all but the first. Tiling: a program computes
PIXELS output pixels, in the order of memory, of OUT output channels, and walks over the taps and,
within a tap, over blocks of IN input channels.

GroupNorm and SiLU in front are applied to what a load returns, so once a tap and block of output
channels. With one tap that is free. With 27 it saves the memory of the normalised x, not time, by
calculation: for 256 channels of 5x120x212 pixels 1.8e9 special functions take 0.49 ms on 132 SMs
that do 16 a clock at 1.7 GHz, beside 0.46 ms of products at 989 TFLOP/s; a pass of its own moves
130 MB, 0.04 ms at 3 TB/s.
Axes: B batch, I input channels, O output channels, T frames, H height, W width; T', H', W' of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora.kernels._tl import needs_int64, offset
from opensora.ops.causal_conv3d import output_size


@dataclass(frozen=True)
class Config:
    """Hold the launch parameters.

    Attributes:
        pixels: Output pixels of a program.
        outputs: Output channels of a program.
        split: Whether bias and residual are added to one half of them after the other.
        inputs: Input channels of a step.
        warps: Of a program.
        stages: Steps whose loads are in flight.
    """

    pixels: int
    outputs: int
    split: bool
    inputs: int
    warps: int
    stages: int

    @classmethod
    def heuristic(cls, inputs: int, outputs: int, dtype: torch.dtype) -> Config:
        """Choose by widths, from counts compiled for sm_80, 90 and 100 (Triton 3.7); not timed.

        A step of 64 channels is 128 bytes of every pixel. 128 pixels x 256 outputs take three
        stages of 48 KiB, which all three GPUs hold (sm_80: 163 KiB); sm_90 spills if their residual
        is added at once. 128 x 128 take 128 registers in 2D on sm_90, so that an SM holds two
        programs and one multiplies while the other stores. Float32 products are exact, so they run
        on no tensor core, and a small tile keeps them in registers.
        """
        out = min(max(triton.next_power_of_2(outputs), 16), 128)
        step = min(inputs & -inputs, 64)  # the largest power of two that divides
        if step < 32:
            step = min(max(triton.next_power_of_2(inputs), 16), 64)
        if dtype == torch.float32:
            return cls(64, min(out, 64), False, min(step, 32), warps=4, stages=2)
        if outputs % 256 == 0:
            return cls(128, 256, True, step, warps=8, stages=3)
        return cls(128, out, False, step, warps=8 if out == 128 else 4, stages=3)


@triton.jit
def finish(
    total,  # [PIXELS, OUT] float32
    m,  # [PIXELS]
    end,
    outputs,  # [OUT]
    bias_ptr,  # [O], read if BIAS
    residual_ptr,  # [M, O] dense, read if RESIDUAL
    y_ptr,  # [M, O] dense
    O: tl.constexpr,  # noqa: E741
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    INT64: tl.constexpr,
):
    """Add bias and residual to the products, and store the rows before `end`."""
    at = offset(m, O, INT64)[:, None] + outputs[None, :]
    mask = (m < end)[:, None] & (outputs < O)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + outputs, mask=outputs < O, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normalise(
    a,  # [PIXELS, IN] of one sample
    mean_rstd_ptr,  # [G, 2] float32, of the sample
    weight_ptr,  # [I]
    bias_ptr,  # [I]
    channels,  # [IN]
    I: tl.constexpr,  # noqa: E741
    GROUPS: tl.constexpr,
):
    """Apply GroupNorm and SiLU in float32; round once."""
    inside = channels < I
    at = mean_rstd_ptr + channels // (I // GROUPS) * 2
    mean = tl.load(at, mask=inside, other=0.0)[None, :]
    rstd = tl.load(at + 1, mask=inside, other=0.0)[None, :]
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    # The mean comes off first: x * scale - mean * scale would cancel where the mean is large.
    u = (a.to(tl.float32) - mean) * (rstd * weight) + bias
    return (u * tl.sigmoid(u)).to(a.dtype)


@triton.jit(do_not_specialize=["P", "T", "H", "W", "T_OUT", "H_OUT", "W_OUT"])
def forward_kernel(
    x_ptr,  # [B, T, H, W, I] dense
    weight_ptr,  # [O, KT, KH, KW, I] dense
    bias_ptr,  # [O], read if BIAS
    residual_ptr,  # like y, read if RESIDUAL
    mean_rstd_ptr,  # [B, GROUPS, 2] float32, read if GROUPS > 0
    norm_weight_ptr,  # [I], read if GROUPS > 0; norm_bias likewise
    norm_bias_ptr,
    y_ptr,  # [B, T', H', W', O] dense
    P,  # pixels that tiles are cut from: T' * H' * W' if GROUPS > 0, else B times as many
    T,
    H,
    W,
    T_OUT,
    H_OUT,
    W_OUT,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PIXELS: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    IN: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUPS: tl.constexpr,
    INT64: tl.constexpr,
):
    TAPS: tl.constexpr = KT * KH * KW
    STEPS: tl.constexpr = (I + IN - 1) // IN
    # Programs that share pixels run together: the weights of all of them fit in the cache.
    block = tl.program_id(0) % tl.cdiv(O, OUT)
    outputs = block * OUT + tl.arange(0, OUT)
    tile = tl.program_id(0) // tl.cdiv(O, OUT)
    sample, tile = tile // tl.cdiv(P, PIXELS), tile % tl.cdiv(P, PIXELS)
    end = offset(sample + 1, P, INT64)
    m = end - P + offset(tile, PIXELS, INT64) + tl.arange(0, PIXELS)
    rest = m // W_OUT
    t, h, w = rest // H_OUT % T_OUT, rest % H_OUT, m % W_OUT
    # The corner of the window, which may lie outside: its taps are told apart by bits.
    t = t * ST - max(KT - ST, 0)
    h = h * SH - max(KH - SH, 0) // 2
    w = w * SW - max(KW - SW, 0) // 2
    corner = (((rest // H_OUT // T_OUT * T + t) * H + h) * W + w) * I
    inside = tl.zeros([PIXELS], tl.int32)
    for i in tl.static_range(KT):
        for j in tl.static_range(KH):
            for k in tl.static_range(KW):
                t_h = (m < end) & (t + i >= 0) & (h + j >= 0) & (h + j < H)
                bit = (t_h & (w + k >= 0) & (w + k < W)).to(tl.int32)
                inside |= bit << ((i * KH + j) * KW + k)
    channels = tl.arange(0, IN)
    a_at = corner[:, None] + channels[None, :]
    b_at = outputs[None, :] * (TAPS * I) + channels[:, None]
    total = tl.zeros([PIXELS, OUT], tl.float32)
    for step in range(TAPS * STEPS):
        tap, first = step // STEPS, step % STEPS * IN
        shift = (tap // (KH * KW) * H + tap // KW % KH) * W + tap % KW
        a_mask = ((inside >> tap) & 1 != 0)[:, None]
        if I % IN != 0:
            a_mask &= (first + channels < I)[None, :]
        a = tl.load(x_ptr + offset(shift, I, INT64) + first + a_at, mask=a_mask, other=0.0)
        if GROUPS > 0:
            row = mean_rstd_ptr + sample * (2 * GROUPS)
            at = first + channels
            a = normalise(a, row, norm_weight_ptr, norm_bias_ptr, at, I, GROUPS)
            a = tl.where(a_mask, a, 0.0)  # the padding is not normalised
        b_ptr = weight_ptr + tap * I + first + b_at
        if (I % IN != 0) | (O % OUT != 0):  # else no mask, which the compiler would not see
            b_mask = (first + channels < I)[:, None] & (outputs < O)[None, :]
            b = tl.load(b_ptr, mask=b_mask, other=0.0)
        else:
            b = tl.load(b_ptr)
        total = tl.dot(a, b, total, input_precision="ieee")
    if SPLIT:
        halves = tl.permute(tl.reshape(total, (PIXELS, 2, OUT // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        outputs = block * OUT + tl.arange(0, OUT // 2)
        finish(left, m, end, outputs, bias_ptr, residual_ptr, y_ptr, O, BIAS, RESIDUAL, INT64)
        outputs += OUT // 2
        finish(right, m, end, outputs, bias_ptr, residual_ptr, y_ptr, O, BIAS, RESIDUAL, INT64)
    else:
        finish(total, m, end, outputs, bias_ptr, residual_ptr, y_ptr, O, BIAS, RESIDUAL, INT64)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Sequence[Tensor],
    stride: list[int],
) -> Tensor:
    """Launch the kernel; x, weight and residual are channels_last_3d."""
    size = output_size(x, weight, stride)
    layout = torch.channels_last_3d
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y
    outputs, inputs, *kernel = weight.shape
    config = Config.heuristic(inputs, outputs, x.dtype)
    rows = y.numel() // outputs
    # Pixels of a tile share the statistics that they are normalised by.
    samples = x.shape[0] if norm else 1
    pixels = rows // samples
    tiles = samples * triton.cdiv(pixels, config.pixels)
    # From the window's corner to its last tap, which lie outside x if that has few frames.
    last = [k - 1 for k in kernel]
    reach = ((last[0] * x.shape[3] + last[1]) * x.shape[4] + last[2]) * inputs
    with torch.cuda.device_of(x):
        forward_kernel[(tiles * triton.cdiv(outputs, config.outputs),)](
            x,
            weight,
            y if bias is None else bias,
            y if residual is None else residual,
            *(norm or (y, y, y)),
            y,
            pixels,
            *x.shape[2:],
            *size[2:],
            inputs,
            outputs,
            *kernel,
            *stride,
            PIXELS=config.pixels,
            OUT=config.outputs,
            SPLIT=config.split,
            IN=config.inputs,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            GROUPS=norm[0].shape[1] if norm else 0,
            INT64=needs_int64(x, weight, y) or max(reach, rows + config.pixels) >= 2**31,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return y
