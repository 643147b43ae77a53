"""Share the memory layout of the VAE's ops: pixels with their channels next to each other."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Lay [B, C, H, W] or [B, C, T, H, W] out as [B, (T,) H, W, C]; a no-op where it is so."""
    format_ = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=format_)
