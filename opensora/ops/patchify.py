"""Fuse what makes tokens of a latent: cast, zero padding, patch embedding, bias, position codes.

    tokens[b, (t, s)] = weight . patch(x)[b, t, s] + bias + positions[s]

Kernels: C++ on CPU (`csrc/cpu/patchify.cpp`), Triton on CUDA (`kernels/patchify.py`). Used at the
head of STDiT3. The tokens are dense, channels fastest; a Conv3d leaves them channels slowest, and
every sum along the residual stream then keeps that order, so that each norm and product downstream
copies its input.
Axes: B batch, I input channels, T frames, H x W pixels, in patches T', H', W'; S = H'*W' and
N = T'*S tokens, C channels, K = I * voxels of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora.ops._library import Op, needs_grad

#: Of weight, bias and positions; a kernel takes x in any of them.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

#: Values of a patch up to which the CPU kernel is as fast as a product of the library (2 cores).
LONGEST = 512


def reference(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Compute the op in plain PyTorch, in weight's dtype."""
    x = _pad(x.to(weight.dtype), weight)
    patches = F.conv3d(x, weight, bias, stride=weight.shape[2:])  # [B, C, T', H', W']
    tokens = patches.flatten(3).permute(0, 2, 3, 1)
    return (tokens + positions).flatten(1, 2).contiguous()


def reference_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_backward` returns: with p the patches [B * N, K] of x,

    dweight = grad^T p, dbias = sum of grad over all tokens
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = grad.to(wide).flatten(0, 1)
    patches = _split(_pad(x.to(weight.dtype), weight), weight).flatten(4).flatten(0, 3)
    dweight = (rows.mT @ patches.to(wide)).view(weight.shape)
    return dweight.to(weight.dtype), rows.sum(0).to(weight.dtype)


def reference_input_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return what `_input_backward` returns: every pixel has the gradient of its one place."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = grad.to(wide) @ weight.to(wide).flatten(1)
    padded = torch.empty_like(_pad(x, weight), dtype=wide)
    split = _split(padded, weight)
    split.copy_(rows.view(split.shape))
    _, _, frames, height, width = x.shape
    return padded[:, :, :frames, :height, :width].to(x.dtype, memory_format=torch.contiguous_format)


def _pad(x: Tensor, weight: Tensor) -> Tensor:
    """Pad the ends of x with zeros to whole patches; dense."""
    pads = [-n % p for n, p in zip(x.shape[2:], weight.shape[2:], strict=True)]
    return F.pad(x, (0, pads[2], 0, pads[1], 0, pads[0])).contiguous()


def _split(x: Tensor, weight: Tensor) -> Tensor:
    """View a padded x as [B, T', H', W', I, pt, ph, pw]."""
    for axis, patch in zip((6, 4, 2), reversed(weight.shape[2:]), strict=True):
        x = x.unflatten(axis // 2 + 1, (-1, patch))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


def counts(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Return (T', H', W'), the patches of x along each axis."""
    frames, rows, columns = (-(-n // p) for n, p in zip(x.shape[2:], weight.shape[2:], strict=True))
    return frames, rows, columns


def _fake_forward(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    frames, rows, columns = counts(x, weight)
    return weight.new_empty(x.shape[0], frames * rows * columns, weight.shape[0])


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _fake_input_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_forward = Op(
    "patchify_forward(Tensor x, Tensor weight, Tensor bias, Tensor positions) -> Tensor",
    fake=_fake_forward,
    dtypes=DTYPES,
    reference=reference,
    cuda="opensora.kernels.patchify:forward",
    decides="weight",
)

_backward = Op(
    "patchify_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor dweight, Tensor dbias)",
    fake=_fake_backward,
    dtypes=DTYPES,
    reference=reference_backward,
    cuda="opensora.kernels.patchify:backward",
)

# Apart: training a transformer needs no gradient of its latents. Of x only shape and dtype count.
_input_backward = Op(
    "patchify_input_backward(Tensor grad, Tensor x, Tensor weight) -> Tensor",
    fake=_fake_input_backward,
    dtypes=DTYPES,
    reference=reference_input_backward,
    cuda="opensora.kernels.patchify:input_backward",
)


class _Patchify(torch.autograd.Function):
    """Save the latent, a hundredth of the tokens, and gather its patches again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        tokens: Tensor = _forward(x, weight, bias, positions)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, (dx, dweight, dbias) = grad.contiguous(), (None, None, None)
        if ctx.needs_input_grad[0]:
            dx = _input_backward(grad, x, weight)
        if any(ctx.needs_input_grad[1:]):
            dweight, dbias = _backward(grad, x, weight)
        return dx, dweight, dbias, None


def patchify(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Map the patches of a latent to tokens and add the code of each one's place in its frame.

    Products are exact in float32 and accumulate there; kernels round once, at the end.
    Deterministic. Differentiable once, in x, weight and bias.

    Args:
        x: Latent [B, I, T, H, W], floating point, any strides; cast to weight's dtype. Sizes that
            are no multiple of the patch are padded with zeros at their end.
        weight: Conv3d weight [C, I, pt, ph, pw]; a kernel copies what is not contiguous.
        bias: [C] in weight's dtype.
        positions: [S, C] or [1, S, C], one code for each patch of a frame, row after row; cast to
            weight's dtype. It has no gradient.

    Returns:
        Tokens [B, N, C] in weight's dtype, frames slowest, dense.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, x has no pixels, or positions
            require a gradient.
        NotImplementedError: `OPENSORA_KERNELS=require`, and no kernel takes weight's dtype.

    Source: `PatchEmbed3D` and the position embedding of Open-Sora 1.2.
    """
    _check(x, weight, bias, positions)
    positions = positions.view(positions.shape[-2:]).to(weight.dtype)
    if not _forward.serves(weight):
        return reference(x, weight, bias, positions)
    if x.device.type == "cpu" and weight[0].numel() > LONGEST:
        patches = _split(_pad(x.to(weight.dtype), weight), weight).flatten(4).flatten(2, 3)
        return (F.linear(patches, weight.flatten(1), bias) + positions).flatten(1, 2)
    if x.dtype not in DTYPES[x.device.type]:
        x = x.to(weight.dtype)
    run = _Patchify.apply if needs_grad(x, weight, bias) else _forward
    tokens: Tensor = run(x, weight.contiguous(), bias.contiguous(), positions.contiguous())
    return tokens


def _check(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> None:
    """Raise ValueError, with what was expected and what came, where arguments do not fit."""
    if x.dim() != 5 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(f"x must be float [B, I, T, H, W] with pixels, got {_describe(x)}")
    if weight.dim() != 5 or weight.shape[1] != x.shape[1] or weight.device != x.device:
        expected = f"[C, {x.shape[1]}, pt, ph, pw] on {x.device}"
        raise ValueError(f"weight must be {expected}, got {_describe(weight)}")
    channels = weight.shape[0]
    if bias.shape != (channels,) or bias.dtype != weight.dtype or bias.device != x.device:
        raise ValueError(
            f"bias must be {weight.dtype} [{channels}] on {x.device}, got {_describe(bias)}"
        )
    _, rows, columns = counts(x, weight)
    place = (rows * columns, channels)
    if positions.shape not in (place, (1, *place)) or positions.device != x.device:
        raise ValueError(
            f"positions must be [S, C] = {list(place)} on {x.device}, got {_describe(positions)}"
        )
    if needs_grad(positions):
        raise ValueError("positions must not require a gradient: patchify returns none for them")


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"
