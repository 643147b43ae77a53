"""Call other implementations for comparison. None of them is required; a missing one is reported.

The attention peers take q, k and v as [rows, N, H, D] views of what an op reads, already normalised
and rotated, and return [rows, N, H, D]; whatever they must copy for their own layout is their time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _torch(backend: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return y.transpose(1, 2)

    return attend


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    result: Tensor = flash_attn_func(q, k, v)
    return result


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    result: Tensor = memory_efficient_attention(q, k, v)
    return result


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cuda":
        raise NotImplementedError("compiles for a minute on a CPU")
    return _compiled_flex()(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


ATTENTION: dict[str, Attention] = {
    "sdpa flash": _torch(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": _torch(SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": _torch(SDPBackend.EFFICIENT_ATTENTION),
    "flash-attn": _flash_attn,
    "xformers": _xformers,
    "flex": _flex,
}


def flash_attn_ragged(
    q: Tensor, kv: Tensor, starts: Tensor, lengths: Tensor, longest: int
) -> Tensor:
    """Attend as `cross_attention` does, texts packed without gaps, by flash-attn."""
    from flash_attn import flash_attn_varlen_func

    batch, tokens = q.shape[:2]
    queries = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
    offsets = torch.cat((starts, starts[-1:] + lengths[-1:]))
    y: Tensor = flash_attn_varlen_func(
        q.flatten(0, 1), kv[:, 0], kv[:, 1], queries, offsets, tokens, longest
    )
    return y.view(batch, tokens, -1)


def norm_and_rotate(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """Normalise heads [rows, N, H, D] by apex and rotate them in place by flash-attn."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    from flash_attn.layers.rotary import apply_rotary_emb

    normed: Tensor = fused_rms_norm_affine(x, weight, x.shape[-1:], eps)
    if cos is None or sin is None:
        return normed
    half = (table[:, ::2].contiguous() for table in (cos, sin))
    rotated: Tensor = apply_rotary_emb(normed, *half, interleaved=True, inplace=True)
    return rotated


def apex_layer_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise the last axis by apex, without weights."""
    from apex.normalization.fused_layer_norm import fused_layer_norm

    result: Tensor = fused_layer_norm(x, x.shape[-1:], eps)
    return result


def liger_layer_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise the last axis by Liger-Kernel, which insists on weights: ones and zeros."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    weight = x.new_ones(x.shape[-1])
    result: Tensor = LigerLayerNormFunction.apply(x, weight, torch.zeros_like(weight), eps)
    return result


@cache
def _apex_group_norm(groups: int, channels: int, eps: float, act: str) -> nn.Module:
    from apex.contrib.group_norm import GroupNorm

    module: nn.Module = GroupNorm(groups, channels, eps=eps, act=act)
    return module


def apex_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Normalise groups of channels of [B, C, H, W] in channels_last by apex, SiLU included."""
    module = _apex_group_norm(groups, x.shape[1], eps, "silu" if silu else "")
    result: Tensor = functional_call(module, {"weight": weight, "bias": bias}, x)
    return result
