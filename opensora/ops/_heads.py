"""Share the rules of packed queries, keys and values between ops: shapes, norm, rotation.

`prepare` is what the models do to queries and keys before they attend: RMSNorm over the head, then
interleaved rotary positions (the other way round in weights of Open-Sora 1.1).
Axes: N positions, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.ops import _attention

Table = tuple[Tensor, Tensor]  # cos and sin [N, D]


def check(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary: Table | None,
    positions: int,
) -> None:
    """Raise ValueError, with what was expected and what came, where shapes do not fit together."""
    width = qkv.shape[-1]
    if (q_weight is None) is not (k_weight is None):
        raise ValueError("q_weight and k_weight come together: pass both or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.shape != (width,) or weight.device != qkv.device):
            raise ValueError(
                f"{name} must be [D = {width}] on {qkv.device}, got {describe(weight)}"
            )
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise ValueError(
            f"q_weight and k_weight must share a dtype, got {q_weight.dtype} and {k_weight.dtype}"
        )
    if rotary is None:
        return
    if width % 2:
        raise ValueError(f"rotary turns pairs, so D must be even, got {describe(qkv)}")
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        if table.shape != (positions, width) or table.device != qkv.device:
            raise ValueError(
                f"rotary's {name} must be [N, D] = [{positions}, {width}] on {qkv.device}, "
                f"got {describe(table)}"
            )
        if table.requires_grad:
            raise ValueError(f"rotary gets no gradient, but its {name} asks for one: detach it")


def describe(t: Tensor) -> str:
    """Return a tensor's dtype, shape and device in words."""
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def dense_table(rotary: Table | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return cos and sin as a kernel reads them: dense and of one dtype."""
    if rotary is None:
        return None, None
    cos, sin = rotary
    return cos.contiguous(), sin.to(cos.dtype).contiguous()


def _turn(x: Tensor) -> Tensor:
    """Turn the pairs (a, b) = (2i, 2i + 1) of the last axis by a quarter: (-b, a)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) and 1 / rms(x), in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * rstd, rstd


def prepare(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    legacy: bool,
    eps: float,
) -> Tensor:
    """Normalise and rotate queries or keys, as `Attention` does with RMSNorm and `rotate`.

    Args:
        x: [..., D].
        weight: [D], or None for no norm; multiplied after the norm was rounded to x's dtype.
        cos: [..., D], broadcast against x, or None for no rotation.
        sin: like `cos`.
        legacy: rotate before the norm.
        eps: added to the mean square.

    Returns:
        Tensor of x's shape, of the widest dtype among the arguments.
    """
    if cos is not None and sin is not None and legacy:
        x = _attention.rotate(x, (cos, sin))
    if weight is not None:
        x = weight * _normalise(x, eps)[0].to(x.dtype)
    if cos is not None and sin is not None and not legacy:
        x = _attention.rotate(x, (cos, sin))
    return x


def prepare_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    legacy: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [..., D] and of the weight [D]; float32 or wider, no rounding.

    With n = x / rms(x) and g = grad * weight:

        dx = (g - n * mean(g * n)) / rms(x),  dweight = sum of grad * n

    and a rotation's gradient is the rotation by the opposite angle: g cos - turn(g sin).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    grad, x = grad.to(wide), x.to(wide)
    rotary = None if cos is None or sin is None else (cos.to(wide), sin.to(wide))
    if rotary is not None:
        if legacy:
            x = _attention.rotate(x, rotary)
        else:
            grad = grad * rotary[0] - _turn(grad * rotary[1])
    dx, dweight = grad, x.new_zeros(0)
    if weight is not None:
        n, rstd = _normalise(x, eps)
        g = grad * weight
        dx = rstd * (g - n * (g * n).mean(-1, keepdim=True))
        dweight = (grad * n).flatten(0, -2).sum(0)
    if rotary is not None and legacy:
        dx = dx * rotary[0] - _turn(dx * rotary[1])
    return dx, dweight


def takes_native(qkv: Tensor, tables: tuple[Tensor | None, ...]) -> bool:
    """Tell whether the kernels in csrc/cuda read these heads: of 64 or 72 numbers, in 16 bytes."""
    dtypes = (qkv.dtype, torch.float32)
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (qkv, *tables))
    fits = all(t is None or t.dtype in dtypes for t in tables)
    return qkv.shape[-1] in (64, 72) and qkv.dtype != torch.float64 and aligned and fits
