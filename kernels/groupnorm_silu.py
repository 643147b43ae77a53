"""Run `groupnorm_silu` on CUDA; contract in `opensora/ops/groupnorm_silu.py`.

Bytes: forward reads x twice and writes y; backward reads dy and x twice and writes dx. Tiling:
channels are cut into blocks, pixels into tiles. One launch sums up tiles by channel, a small one
joins those sums to groups, and a last one maps every tile. A program of the first launch takes
every CHUNKS-th tile, so that one sample of 32 groups fills a GPU, all programs end together, and
the end of x is what a cache saw last.
Axes: B batch, G groups, C channels, P pixels of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora.kernels._tl import needs_int64, offset


@dataclass(frozen=True)
class Config:
    """Hold the launch parameters of all kernels.

    Attributes:
        block: Channels of a program.
        pixels: Of a tile of the statistics and of dx; twice as many of y, half of the gradients.
        chunks: Programs that share the sums of a sample and a block of channels.
        joined: Chunks whose sums are joined at a time.
        warps: Of every program.
    """

    block: int
    pixels: int
    chunks: int
    joined: int
    warps: int = 4

    @classmethod
    def heuristic(cls, channels: int, num_groups: int, pixels: int) -> Config:
        """Choose by width and size, from counts compiled for sm_80, 90 and 100; not timed yet.

        Statistics keep two float32 for every element of a tile: 4096 elements are 32 of a thread
        and take 96 registers on sm_90, so that an SM holds 5 programs and 132 SMs hold 660. y keeps
        none and has room for twice the elements, eight 16-byte loads in flight of every thread. The
        gradients of weight and bias keep two, of two inputs. At least four tiles a program keep
        the partial sums, 8 bytes a channel, at 3 % of the bytes of bfloat16. 4096 of them are
        joined at a time, which is all there are of a group of four channels; with twice the warps
        they take about 100 registers in place of 168. The batch is left out: a sample's sums are
        cut the same way whatever stands beside it.
        """
        block = min(channels & -channels, 128)  # the largest power of two that divides
        if block < min(channels, 32):
            block = min(triton.next_power_of_2(channels), 128)
        tile = 4096 // block
        chunks = min(640 // triton.cdiv(channels, block), triton.cdiv(pixels, 4 * tile))
        lanes = triton.next_power_of_2(channels // num_groups)
        joined = min(triton.next_power_of_2(chunks), 4096 // lanes)
        return cls(block, tile, chunks, joined)


@triton.jit
def load_channels(ptr, channels, C: tl.constexpr):
    """Load a row [C] at `channels` as float32; zero past its end."""
    return tl.load(ptr + channels, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def load_pixels(
    ptr,  # [B, P, C] dense
    batch,
    first,  # pixel of the tile's first row
    channels,  # [BLOCK]
    P,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    INT64: tl.constexpr,
):
    """Return pointers [PIXELS, BLOCK] to a tile and the mask of what lies inside x."""
    rows = tl.arange(0, PIXELS)[:, None]
    base = ptr + (offset(batch, P, INT64) + first) * C
    return base + (rows * C + channels[None, :]), (rows < P - first) & (channels[None, :] < C)


@triton.jit(do_not_specialize=["P", "CHUNKS"])
def moments_kernel(
    x_ptr,  # [B, P, C] dense
    partial_ptr,  # [B, CHUNKS, 2, C] float32: mean of a channel, sum of squared distances to it
    P,
    CHUNKS,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0)
    channels = unit % tl.cdiv(C, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    unit = unit // tl.cdiv(C, BLOCK)
    batch, chunk = unit // CHUNKS, unit % CHUNKS
    # Welford's recurrence in every lane of the tile: no two lanes meet before the end.
    mean = tl.zeros([PIXELS, BLOCK], tl.float32)
    squares = tl.zeros([PIXELS, BLOCK], tl.float32)
    steps = tl.cdiv(tl.cdiv(P, PIXELS) - chunk, CHUNKS)
    for i in range(steps):
        first = (i * CHUNKS + chunk) * PIXELS
        at, inside = load_pixels(x_ptr, batch, first, channels, P, C, PIXELS, INT64)
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, x - mean, 0.0)
        mean += distance * (1.0 / (i + 1))
        squares += distance * (x - mean)
    # Lanes past the end of the last tile have one pixel less.
    last = ((steps - 1) * CHUNKS + chunk) * PIXELS
    rows = tl.arange(0, PIXELS)[:, None]
    count = (steps - (rows >= P - last).to(tl.int32)).to(tl.float32)
    total = tl.sum(count)
    # A mean of means, then the mean of what it misses: else a large mean is rounded thrice.
    centre = tl.sum(mean * count, axis=0) / total
    centre += tl.sum((mean - centre[None, :]) * count, axis=0) / total
    mean -= centre[None, :]
    squares += mean * mean * count
    row = partial_ptr + offset(unit, 2 * C, INT64)
    tl.store(row + channels, centre, mask=channels < C)
    tl.store(row + C + channels, tl.sum(squares, axis=0), mask=channels < C)


@triton.jit(do_not_specialize=["P", "CHUNKS"])
def join_kernel(
    partial_ptr,  # [B, CHUNKS, 2, C] float32, as `moments_kernel` leaves it
    mean_rstd_ptr,  # [B, G, 2] float32
    P,
    CHUNKS,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    WIDE: tl.constexpr,  # WIDTH, rounded up to a power of two
    JOINED: tl.constexpr,  # chunks at a time
    PIXELS: tl.constexpr,  # of a tile of `moments_kernel`
    INT64: tl.constexpr,
):
    unit = tl.program_id(0)
    batch, group = unit // GROUPS, unit % GROUPS
    lanes = tl.arange(0, WIDE)[None, :]
    tiles = tl.cdiv(P, PIXELS)
    mean = 0.0
    squares = 0.0
    count = 0.0
    for i in range(tl.cdiv(CHUNKS, JOINED)):
        chunks = i * JOINED + tl.arange(0, JOINED)[:, None]
        inside = (chunks < CHUNKS) & (lanes < WIDTH)
        at = offset(batch * CHUNKS + chunks, 2 * C, INT64) + group * WIDTH + lanes
        means = tl.load(partial_ptr + at, mask=inside, other=0.0)
        # Pixels of each chunk: whole tiles, but for the one that holds the last tile.
        pixels = (tiles // CHUNKS + (chunks < tiles % CHUNKS).to(tl.int32)) * PIXELS
        pixels -= tl.where(chunks == (tiles - 1) % CHUNKS, tiles * PIXELS - P, 0)
        weight = tl.where(inside, pixels.to(tl.float32), 0.0)
        total = tl.sum(weight)
        centre = tl.sum(means * weight) / total
        means = tl.where(inside, means - centre, 0.0)
        spread = tl.load(partial_ptr + at + C, mask=inside, other=0.0) + means * means * weight
        # Chan's rule for two sets of which mean and squares are known.
        step = centre - mean
        squares += tl.sum(spread) + step * step * (count * total / (count + total))
        mean += step * (total / (count + total))
        count += total
    tl.store(mean_rstd_ptr + unit * 2, mean)
    tl.store(mean_rstd_ptr + unit * 2 + 1, tl.rsqrt(squares / count + eps))


@triton.jit
def load_affine(
    mean_rstd_ptr,  # [B, G, 2] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    batch,
    channels,  # [BLOCK]
    C: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return mean, 1 / deviation, weight and bias of channels, each [1, BLOCK]."""
    at = mean_rstd_ptr + (batch * GROUPS + channels // (C // GROUPS)) * 2
    mean = tl.load(at, mask=channels < C, other=0.0)
    rstd = tl.load(at + 1, mask=channels < C, other=0.0)
    weight = load_channels(weight_ptr, channels, C)
    bias = load_channels(bias_ptr, channels, C)
    return mean[None, :], rstd[None, :], weight[None, :], bias[None, :]


@triton.jit
def gradient_of_silu(dy, u, SILU: tl.constexpr):
    """Return the gradient of u, given that of silu(u)."""
    if SILU:
        s = tl.sigmoid(u)
        return dy * s * (1 + u * (1 - s))
    else:
        return dy


@triton.jit(do_not_specialize=["P"])
def forward_kernel(
    x_ptr,  # [B, P, C] dense
    mean_rstd_ptr,  # [B, G, 2] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [B, P, C] dense
    P,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    SILU: tl.constexpr,
    INT64: tl.constexpr,
):
    # From the end of x, which the sums read last and a cache may still hold.
    unit = tl.num_programs(0) - 1 - tl.program_id(0)
    channels = unit % tl.cdiv(C, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    tile = unit // tl.cdiv(C, BLOCK)
    batch, first = tile // tl.cdiv(P, PIXELS), tile % tl.cdiv(P, PIXELS) * PIXELS
    at, inside = load_pixels(x_ptr, batch, first, channels, P, C, PIXELS, INT64)
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mean, rstd, weight, bias = load_affine(
        mean_rstd_ptr, weight_ptr, bias_ptr, batch, channels, C, GROUPS
    )
    # The mean comes off first: x * scale - mean * scale would cancel where the mean is large.
    y = (x - mean) * (rstd * weight) + bias
    if SILU:
        y = y * tl.sigmoid(y)
    to, _ = load_pixels(y_ptr, batch, first, channels, P, C, PIXELS, INT64)
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P", "CHUNKS"])
def gradients_kernel(
    dy_ptr,  # [B, P, C] dense
    x_ptr,  # [B, P, C] dense
    mean_rstd_ptr,  # [B, G, 2] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    partial_ptr,  # [B, CHUNKS, 2, C] float32: each program's dweight and dbias
    P,
    CHUNKS,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    SILU: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.program_id(0)
    channels = unit % tl.cdiv(C, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    unit = unit // tl.cdiv(C, BLOCK)
    batch, chunk = unit // CHUNKS, unit % CHUNKS
    mean, rstd, weight, bias = load_affine(
        mean_rstd_ptr, weight_ptr, bias_ptr, batch, channels, C, GROUPS
    )
    dweight = tl.zeros([PIXELS, BLOCK], tl.float32)
    dbias = tl.zeros([PIXELS, BLOCK], tl.float32)
    for i in range(tl.cdiv(tl.cdiv(P, PIXELS) - chunk, CHUNKS)):
        first = (i * CHUNKS + chunk) * PIXELS
        at, inside = load_pixels(x_ptr, batch, first, channels, P, C, PIXELS, INT64)
        from_, _ = load_pixels(dy_ptr, batch, first, channels, P, C, PIXELS, INT64)
        dy = tl.load(from_, mask=inside, other=0.0).to(tl.float32)
        n = (tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        du = gradient_of_silu(dy, n * weight + bias, SILU)
        dweight += du * n  # zero past the end, as dy is
        dbias += du
    row = partial_ptr + offset(unit, 2 * C, INT64)
    tl.store(row + channels, tl.sum(dweight, axis=0), mask=channels < C)
    tl.store(row + C + channels, tl.sum(dbias, axis=0), mask=channels < C)


@triton.jit(do_not_specialize=["P"])
def backward_kernel(
    dy_ptr,  # [B, P, C] dense
    x_ptr,  # [B, P, C] dense
    mean_rstd_ptr,  # [B, G, 2] float32
    means_ptr,  # [B, 2, G] float32: means of g * n and of g, where g = du * weight
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    dx_ptr,  # [B, P, C] dense
    P,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    SILU: tl.constexpr,
    INT64: tl.constexpr,
):
    unit = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end, as in `forward_kernel`
    channels = unit % tl.cdiv(C, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    tile = unit // tl.cdiv(C, BLOCK)
    batch, first = tile // tl.cdiv(P, PIXELS), tile % tl.cdiv(P, PIXELS) * PIXELS
    at, inside = load_pixels(x_ptr, batch, first, channels, P, C, PIXELS, INT64)
    from_, _ = load_pixels(dy_ptr, batch, first, channels, P, C, PIXELS, INT64)
    dy = tl.load(from_, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mean, rstd, weight, bias = load_affine(
        mean_rstd_ptr, weight_ptr, bias_ptr, batch, channels, C, GROUPS
    )
    row = means_ptr + batch * 2 * GROUPS + channels // (C // GROUPS)
    mean_gn = tl.load(row, mask=channels < C, other=0.0)[None, :]
    mean_g = tl.load(row + GROUPS, mask=channels < C, other=0.0)[None, :]
    n = (x - mean) * rstd
    g = gradient_of_silu(dy, n * weight + bias, SILU) * weight
    dx = rstd * (g - mean_g - n * mean_gn)
    to, _ = load_pixels(dx_ptr, batch, first, channels, P, C, PIXELS, INT64)
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """Launch moments, join and forward on channels_last x; returns y and mean_rstd [B, G, 2]."""
    y = torch.empty_like(x)
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
    mean_rstd = x.new_empty(batch, num_groups, 2, dtype=torch.float32)
    if x.numel() == 0:
        return y, mean_rstd.zero_()
    config = Config.heuristic(channels, num_groups, pixels)
    blocks = triton.cdiv(channels, config.block)
    partial = x.new_empty(batch, config.chunks, 2, channels, dtype=torch.float32)
    width = channels // num_groups
    int64 = needs_int64(x, partial)
    with torch.cuda.device_of(x):
        moments_kernel[(batch * config.chunks * blocks,)](
            x,
            partial,
            pixels,
            config.chunks,
            C=channels,
            BLOCK=config.block,
            PIXELS=config.pixels,
            INT64=int64,
            num_warps=config.warps,
        )
        join_kernel[(batch * num_groups,)](
            partial,
            mean_rstd,
            pixels,
            config.chunks,
            eps,
            C=channels,
            GROUPS=num_groups,
            WIDTH=width,
            WIDE=triton.next_power_of_2(width),
            JOINED=config.joined,
            PIXELS=config.pixels,
            INT64=int64,
            num_warps=2 * config.warps,
        )
        forward_kernel[(batch * triton.cdiv(pixels, 2 * config.pixels) * blocks,)](
            x,
            mean_rstd,
            weight,
            bias,
            y,
            pixels,
            C=channels,
            GROUPS=num_groups,
            BLOCK=config.block,
            PIXELS=2 * config.pixels,
            SILU=silu,
            INT64=int64,
            num_warps=config.warps,
        )
    return y, mean_rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean_rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch gradients and backward on channels_last dy and x; returns dx, dweight, dbias."""
    dx = torch.empty_like(x)
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
    if x.numel() == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    groups = mean_rstd.shape[1]
    config = Config.heuristic(channels, groups, pixels)
    blocks = triton.cdiv(channels, config.block)
    partial = x.new_empty(batch, config.chunks, 2, channels, dtype=torch.float32)
    int64 = needs_int64(x, partial)
    constants = {
        "C": channels,
        "GROUPS": groups,
        "BLOCK": config.block,
        "SILU": silu,
        "INT64": int64,
        "num_warps": config.warps,
    }
    with torch.cuda.device_of(x):
        gradients_kernel[(batch * config.chunks * blocks,)](
            dy,
            x,
            mean_rstd,
            weight,
            bias,
            partial,
            pixels,
            config.chunks,
            PIXELS=config.pixels // 2,
            **constants,
        )
        sums = partial.sum(1)  # [B, 2, C]
        # The mean over a group of g = du * weight follows from what du sums up to by channel.
        means = (sums * weight.float()).unflatten(2, (groups, -1)).sum(-1)
        means = (means / (channels // groups * pixels)).contiguous()
        backward_kernel[(batch * triton.cdiv(pixels, config.pixels) * blocks,)](
            dy,
            x,
            mean_rstd,
            means,
            weight,
            bias,
            dx,
            pixels,
            PIXELS=config.pixels,
            **constants,
        )
    # Two sums, because results of an op must not share memory.
    return dx, sums[:, 0].sum(0).to(weight.dtype), sums[:, 1].sum(0).to(bias.dtype)
