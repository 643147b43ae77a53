"""Share the rules of adaLN modulation between its ops: shapes, and the choice made per frame.

A modulation is a row [B, C] for each sample. With `select` [B, T], frames where it is True take
that row and the others take a second one (Open-Sora's frames at timestep zero).
Axes: B batch, T frames, S patches per frame, N = T*S tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check(x: Tensor, select: Tensor | None, **rows: Tensor | None) -> None:
    """Raise ValueError, with what was expected and what came, where shapes do not fit together."""
    if x.dim() not in (3, 4) or not x.is_floating_point():
        raise ValueError(f"x must be float [B, N, C] or [B, T, S, C], got {_describe(x)}")
    expected = (x.shape[0], x.shape[-1])
    for name, row in rows.items():
        if (row is None) is not (select is None and name.endswith("0")):
            raise ValueError("select and the second modulation come together: pass all or none")
        if row is not None and (row.shape != expected or row.device != x.device):
            raise ValueError(
                f"{name} must be [B, C] = {list(expected)} on {x.device}, got {_describe(row)}"
            )
    if select is None:
        return
    if select.dtype != torch.bool or select.dim() != 2 or select.shape[0] != x.shape[0]:
        raise ValueError(f"select must be bool [B = {x.shape[0]}, T], got {_describe(select)}")
    frames, tokens = select.shape[1], x.shape[1]
    if frames != tokens if x.dim() == 4 else (frames == 0 or tokens % frames != 0):
        raise ValueError(f"select has {frames} frames, which does not fit x {list(x.shape)}")


def dense_rows(row: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a modulation and lay each row out densely; a no-op for views of [B, K, C]."""
    if row.dtype != dtype:  # asked first: an idle `to` costs 0.9 us
        row = row.to(dtype)
    return row if row.stride(-1) == 1 else row.contiguous()


def split_frames(x: Tensor, select: Tensor | None) -> Tensor:
    """View tokens as [B, T, S, C]; T = 1 without select."""
    frames = 1 if select is None else select.shape[1]
    tokens = x.shape[1:-1].numel()
    return x.reshape(x.shape[0], frames, tokens // max(frames, 1), x.shape[-1])


def per_frame(row: Tensor, row0: Tensor | None, select: Tensor | None) -> Tensor:
    """Return the modulation of every frame, [B, T, 1, C], or [B, 1, 1, C] without select."""
    row = row[:, None, None]
    if select is None or row0 is None:
        return row
    return torch.where(select[:, :, None, None], row, row0[:, None, None])


def sum_frames(sums: Tensor, select: Tensor | None) -> Tensor:
    """Add up gradients [B, T, K, C] of frames: [B, K, C], or [B, 2K, C], chosen frames first."""
    if select is None:
        return sums.sum(1)
    # where, not a product: a frame that overflowed stays out of the other modulation's sum.
    chosen = select[:, :, None, None]
    return torch.cat([sums.where(mask, 0).sum(1) for mask in (chosen, ~chosen)], dim=1)


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"
