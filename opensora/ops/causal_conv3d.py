"""Convolve in space and time without a padded copy, and add the bias and the residual.

    y[n, co, t, h, w] = bias[co] + residual[n, co, t, h, w] + sum over ci and taps i, j, k of
        weight[co, ci, i, j, k] * a[n, ci, t * st + i - pt, h * sh + j - ph, w * sw + k - pw]

where a is x, or silu(group norm of x) with `norm`, and zero outside. An axis with kernel k and
stride s gets max(k - s, 0) zeros: time all of them in front, height and width half of them
(rounded down) in front and the rest behind.
Kernels: Triton on CUDA for the forward (`kernels/causal_conv3d.py`), and there, where
`OPENSORA_CUDA=c++` asks for it, `csrc/cuda/causal_conv3d.cu`; oneDNN on CPU (`_onednn`). The
backward is the library's.
For the convolutions of the temporal VAE, and of the 2D VAE: an image is a video of one frame.
Axes: B batch, I input channels, O output channels, G groups, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops._channels_last import channels_last
from opensora.ops._library import Op, define, needs_grad

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}


_Norm = Sequence[Tensor]  # mean_rstd [B, G, 2], weight [I], bias [I]; or nothing


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: _Norm,
    stride: list[int],
) -> Tensor:
    """Compute the op in plain PyTorch: normalise, pad, convolve, add; of images in 2D."""
    padded, symmetric = _pad(normalise(x, *norm) if norm else x, weight, stride)
    convolve: Any = F.conv3d if x.dim() == 5 else F.conv2d
    y: Tensor = convolve(padded, weight, bias, stride, symmetric)
    return y if residual is None else residual + y


def _reference_forward(*args: Any) -> Tensor:
    """Compute what `_forward` returns, in its layout."""
    return channels_last(reference(*args))


def normalise(x: Tensor, mean_rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply GroupNorm, whose statistics are given, and SiLU in float32; round once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    statistics = mean_rstd.to(wide).repeat_interleave(x.shape[1] // mean_rstd.shape[1], dim=1)
    ones = [1] * (x.dim() - 2)
    mean, rstd = (row.reshape(*row.shape, *ones) for row in statistics.unbind(2))  # [B, I, 1, ...]
    factor, shift = (row.to(wide).view(-1, *ones) for row in (weight, bias))
    return F.silu((x.to(wide) - mean) * (rstd * factor) + shift).to(x.dtype)


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    needed: tuple[bool, ...] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias by the library's convolutions, None where not needed.

    Time is padded by a copy of x, if it is padded: the library's own padding is symmetric.
    """
    padded, symmetric = _pad(x, weight, stride)
    axes = len(stride)
    dpadded, dweight, dbias = torch.ops.aten.convolution_backward(
        grad, padded, weight, [weight.shape[0]], stride, symmetric, [1] * axes, False, [0] * axes,
        1, needed,
    )  # fmt: skip
    if needed[0] and padded is not x:
        dpadded = dpadded[..., : x.shape[-2], : x.shape[-1]]
        if axes == 3:
            dpadded = dpadded[:, :, -x.shape[2] :]
    return dpadded, dweight, dbias


def output_size(x: Tensor, weight: Tensor, stride: list[int]) -> list[int]:
    """Return [B, O, (T',) H', W']: n + max(k - s, 0) pixels hold (that - k) // s + 1 windows."""
    sizes = zip(x.shape[2:], weight.shape[2:], stride, strict=True)
    return [x.shape[0], weight.shape[0], *[(n + max(k - s, 0) - k) // s + 1 for n, k, s in sizes]]


def _pad(x: Tensor, weight: Tensor, stride: list[int]) -> tuple[Tensor, list[int]]:
    """Pad what the library cannot; return the padded x and the symmetric padding that is left."""
    zeros = [max(k - s, 0) for k, s in zip(weight.shape[2:], stride, strict=True)]
    time, height, width = [0] * (3 - len(zeros)) + zeros
    behind = [0, width % 2, 0, height % 2]  # what has no partner in front; then there is no pair
    if time or any(behind):
        x = F.pad(x, [*behind, time, 0] if time else behind)
    return x, [*[0] * (len(zeros) - 2), height // 2, width // 2]


def _fake_forward(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    size = output_size(x, weight, others[-1])
    layout = torch.channels_last_3d
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: _Norm,
    stride: list[int],
) -> Tensor:
    """Compute the forward op by oneDNN, which pads as it reads, as much behind as in front.

    So time gets frames behind as well, which are cut off: they meet as few taps as the frames in
    front leave out. Only a stride of 2 in space, padded behind alone, makes a padded copy.
    """
    if x.shape[1:].numel() == 1:  # torch 2.11's oneDNN reads what nobody wrote there, in bfloat16
        return _reference_forward(x, weight, bias, residual, norm, stride)
    x = normalise(x, *norm) if norm else x
    axes = slice(-2, None) if x.shape[2] == weight.shape[2] == 1 else slice(None)  # an image
    zeros = [max(k - s, 0) for k, s in zip(weight.shape[2:], stride, strict=True)]
    frames, padding = x.shape[2], [zeros[0], zeros[1] // 2, zeros[2] // 2]
    if zeros[1] % 2 or zeros[2] % 2:
        x = channels_last(F.pad(x, (0, zeros[2] % 2, 0, zeros[1] % 2)))
    if axes.start is not None:
        x, weight = x.squeeze(2), weight.squeeze(2)
    ones = [1, 1, 1]
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding[axes], stride[axes], ones[axes], 1, "none", [], ""
    )
    y = y if axes.start is None else y.unsqueeze(2)
    kept = (frames + zeros[0] - weight.shape[2]) // stride[0] + 1 if axes.start is None else 1
    dense = y.shape[0] == 1 or kept == y.shape[2]
    y = y[:, :, :kept]
    if residual is not None:
        y = torch.add(residual, y, out=y if dense else torch.empty_like(residual))
    return channels_last(y)  # a copy of several samples without a residual, of which frames are cut


def _native(x: Tensor, weight: Tensor, *others: Any) -> tuple[Any, ...] | None:
    """Return the arguments of the kernel in C++, or None where it does not take them."""
    tensors = (x, weight, *others[:2], *others[2])
    fits = (
        x.dtype in (torch.bfloat16, torch.float16)
        and [*others[3]] == [1, 1, 1]
        and x.shape[1] % 32 == 0
        and weight.shape[0] % 8 == 0
        and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    )
    return (x, weight, *others) if fits else None


# x, weight and residual are channels_last_3d; norm is [mean_rstd (float32), weight, bias] or [].
_forward = Op(
    "causal_conv3d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor[] norm, int[3] stride) -> Tensor",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=_reference_forward,
    cuda="opensora.kernels.causal_conv3d:forward",
    onednn=_onednn,
    native=_native,
)


def _fake_with_statistics(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, stride, groups, _ = others
    return _fake_forward(x, weight, stride), x.new_empty(x.shape[0], groups, 2, dtype=torch.float32)


# The forward, and mean_rstd [B, groups, 2] of its result, which the next norm takes; only csrc/cuda
# has it, whose kernel sees the result before it leaves the chip.
define(
    "causal_conv3d_with_statistics(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor[] norm, int[3] stride, int groups, float eps) -> (Tensor y, Tensor mean_rstd)",
    _fake_with_statistics,
)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: list[Tensor],
    stride: list[int],
) -> Tensor:
    """Call the op, to which an image is a video of one frame."""
    y: Tensor
    if len(stride) == 3:
        y = _forward(x, weight, bias, residual, norm, stride)
        return y
    lifted = (None if t is None else t.unsqueeze(2) for t in (x, weight, residual))
    frame, kernel, added = lifted
    y = _forward(frame, kernel, bias, added, norm, [1, *stride])
    return y.squeeze(2)


class _CausalConv3d(torch.autograd.Function):
    """Save x and the weight; the residual's gradient is the gradient itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, residual: Any, stride: list[int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return _launch(x, weight, bias, residual, [], stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        *needed, residual, _ = ctx.needs_input_grad
        gradients = reference_backward(grad, x, weight, ctx.stride, tuple(needed))
        return (*gradients, grad if residual else None, None)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Convolve `x` so that a frame depends on itself and earlier frames; add bias and residual.

    Products are summed up in float32 (float64 for float64 input); Triton rounds once, after
    bias and residual, oneDNN before the residual as well. A kernel moves no padded or unfolded
    copy (but see `_onednn`) and, of any size, allocates the result alone. Deterministic in the
    forward. Differentiable once, by the library's convolutions, in all tensors; what needs a
    gradient is normalised by a pass of its own.

    Args:
        x: [B, I, T, H, W], or images [B, I, H, W]; floating point. A kernel copies what is not in
            channels_last_3d memory format (of images channels_last), and likewise for `weight`
            and `residual`.
        weight: [O, I, kt, kh, kw], for images [O, I, kh, kw], of x's dtype; each of kt, kh, kw is
            1 or 3.
        bias: [O] of x's dtype.
        stride: (st, sh, sw), for images (sh, sw), each 1 or 2; by default all 1. Zeros: kt - st in
            front of the first frame; at stride 1 half of kh - 1 above and below; at stride 2 all
            of kh - 2 below. Width like height.
        residual: Added to the result; of its shape and dtype.
        norm: (mean_rstd, weight, bias) of a GroupNorm that is applied to x, and SiLU after it:
            mean and 1 / sqrt(var + eps) of the groups, [B, G, 2] float32 (float64 for float64 x),
            as `groupnorm_silu`'s op returns them; factor and shift of the channels, [I] of x's
            dtype. The zeros around x stay zero. It saves the memory of the normalised x, not
            time: see the kernel's file.

    Returns:
        [B, O, T', H', W'], of images [B, O, H', W'], of x's dtype; of a kernel with the channels
        last in memory. At stride 1 T' = T, at stride 2 and kernel 3 it is T // 2.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes `x`.

    Source: Yu et al., 2023, Language Model Beats Diffusion (MAGVIT-v2); Open-Sora 1.2's strides.
    """
    strides = [1] * (x.dim() - 2) if stride is None else list(stride)
    _check(x, weight, bias, residual, norm or (), strides)
    if not _forward.serves(x):
        return reference(x, weight, bias, residual, norm or (), strides)
    recorded = needs_grad(x, weight, bias, residual, *(norm or ()))
    if recorded and norm is not None:
        x, norm = normalise(x, *norm), None
    x, weight = channels_last(x), channels_last(weight)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else channels_last(residual)
    if recorded:
        run: Any = _CausalConv3d.apply
        y: Tensor = run(x, weight, bias, residual, strides)
        return y
    return _launch(x, weight, bias, residual, [t.contiguous() for t in norm or ()], strides)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: _Norm,
    stride: list[int],
) -> None:
    """Raise ValueError, with what was expected and what came, where arguments do not fit."""
    if x.dim() not in (4, 5) or not x.is_floating_point():
        raise ValueError(f"x must be float [B, I, T, H, W] or [B, I, H, W], got {_describe(x)}")
    batch, inputs = x.shape[:2]
    axes = ("t", "h", "w")[5 - x.dim() :]
    if weight.dim() != x.dim() or weight.shape[1] != inputs or {*weight.shape[2:]} - {1, 3}:
        raise ValueError(
            f"weight must be [O, I = {inputs}, {', '.join('k' + a for a in axes)}] with kernels of "
            f"1 or 3, got {_describe(weight)}"
        )
    if len(stride) != len(axes) or {*stride} - {1, 2}:
        strides = ", ".join("s" + axis for axis in axes)
        raise ValueError(f"stride must be ({strides}), each 1 or 2, got {tuple(stride)}")
    size = output_size(x, weight, stride)
    if min(size[2:]) < 1:
        raise ValueError(
            f"x {list(x.shape)} has too few frames or pixels for kernel {list(weight.shape[2:])} "
            f"and stride {list(stride)}"
        )
    dtype = x.dtype
    expected = [
        ("weight", weight, [*weight.shape], dtype),
        ("bias", bias, size[1:2], dtype),
        ("residual", residual, size, dtype),
    ]
    if norm:
        groups = norm[0].shape[1] if norm[0].dim() == 3 else 0
        if groups < 1 or inputs % groups != 0:
            raise ValueError(
                f"mean_rstd must be [B, G, 2] with G that divides I = {inputs}, "
                f"got {_describe(norm[0])}"
            )
        statistics = torch.promote_types(dtype, torch.float32)
        expected += [
            ("mean_rstd", norm[0], [batch, groups, 2], statistics),
            ("norm's weight", norm[1], [inputs], dtype),
            ("norm's bias", norm[2], [inputs], dtype),
        ]
    for name, t, shape, wanted in expected:
        if t is not None and ([*t.shape] != shape or t.dtype != wanted or t.device != x.device):
            raise ValueError(f"{name} must be {wanted} {shape} on {x.device}, got {_describe(t)}")


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"
