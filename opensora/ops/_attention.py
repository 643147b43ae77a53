"""Attend and rotate in plain PyTorch, as the references of the attention ops do.

B batch, H heads, N tokens, L keys, D head width. Source: Open-Sora 1.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Whether this processor multiplies tiles of bfloat16, which PyTorch's attention uses.
_HAS_TILES: bool = torch.cpu._is_amx_tile_supported()


def library_is_faster(x: Tensor) -> bool:
    """Tell whether PyTorch's own attention over many keys beats the C++ kernels for `x`.

    By calculation: the kernels multiply vectors, at half of what tiles reach. In other dtypes, and
    without tiles, they are 1.2 to 2 times as fast as it (docs/log.md).
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and _HAS_TILES


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x's last axis by the angles of their position.

        out[2i] = x[2i] cos - x[2i+1] sin;  out[2i+1] = x[2i+1] cos + x[2i] sin

    Args:
        x: [..., N, D].
        table: cos and sin [N, D] from `RotaryEmbedding.table`.
    """
    cos, sin = table
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k' / sqrt(D)) v, [B, H, N, D]; rows that see nothing are zero.

    On a CPU, short rows go through batched matrix products, because the flash kernel's backward
    there pays per row. Forward and backward, D = 32, bfloat16, 2 threads of an idle machine: 320 x
    4 rows of 16 tokens 7 ms against 48; 1024 x 4 rows of 5, 8 against 17; 64 x 4 rows of 80 on 120
    masked keys 10 against 34. In float32 the backward loses; of the forward, rows of 5 gain (4.5 ms
    against 7.4) and rows of 16 do not.

    Args:
        q: [B, H, N, D], as `k` and `v` of L tokens.
        k: keys.
        v: values.
        mask: bool, broadcast to [B, H, N, L]; True where a key is seen. None: all are.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    longest = 128 if v.dtype == torch.bfloat16 else (0 if needs_grad else 32)
    if v.device.type != "cpu" or k.shape[-2] > longest:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q = q * q.shape[-1] ** -0.5
    if mask is None:
        return torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)
    # The mask is a bias that the product adds: no further pass over the scores.
    rows = (*q.shape[:3], k.shape[-2])
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    scores = torch.baddbmm(
        bias.expand(rows).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2)
    )
    out = torch.matmul(scores.view(rows).softmax(-1), v)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0)
