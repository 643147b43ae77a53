"""Embed what conditions a diffusion transformer: timesteps, sizes, captions, positions.

Parameter names are the published ones. Source: Open-Sora 1.2; sinusoids after DiT (Peebles and
Xie, 2023). B batch, L text tokens, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from opensora.errors import UsageError

#: Entries of the table of 128 frequencies that the original has one step above their nearest
#: float32. Its float32 exp() rounds differently from processor to processor, and a step in a
#: frequency moves a sinusoid by up to 6e-5 at t = 1000; this is the table of its recorded runs.
_ROUNDED_UP = (13, 44)


def _frequencies(half: int, max_period: float, device: torch.device) -> Tensor:
    """Return max_period ** (-j / half), float32 [half], equal on every device."""
    steps = torch.arange(half, dtype=torch.float32, device=device)
    table = torch.exp((-math.log(max_period) * steps / half).double()).float()
    if half != 128 or max_period != 10000.0:
        return table
    up = (steps == _ROUNDED_UP[0]) | (steps == _ROUNDED_UP[1])
    return torch.where(up, table.nextafter(torch.full_like(table, 2.0)), table)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Return concat(cos(t f), sin(t f)) with f_j = max_period ** (-j / (dim // 2)).

    Args:
        t: [N], any real dtype; the angles are float32.
        dim: width; an odd one ends with a column of zeros.
        max_period: the slowest sinusoid has period 2 pi max_period.

    Returns:
        float32 [N, dim].
    """
    angles = t[:, None].float() * _frequencies(dim // 2, max_period, t.device)
    parts = [torch.cos(angles), torch.sin(angles)]
    if dim % 2:
        parts.append(torch.zeros_like(angles[:, :1]))
    return torch.cat(parts, dim=-1)


class TimestepEmbedder(nn.Module):
    """Map scalars to vectors: Linear(SiLU(Linear(timestep_embedding(t)))).

    Args:
        hidden_size: C.
        frequency_size: width of the sinusoidal embedding.
    """

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.hidden_size, self.frequency_size = hidden_size, frequency_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Return [N, C] in the weights' dtype (autocast's under autocast) for t [N]."""
        frequencies = timestep_embedding(t, self.frequency_size)
        result: Tensor = self.mlp(frequencies.to(next(self.parameters()).dtype))
        return result


class SizeEmbedder(TimestepEmbedder):
    """Embed every number of a row on its own and join the results: fps, height and width, ..."""

    def forward(self, sizes: Tensor, batch: int | None = None) -> Tensor:
        """Return [batch, dims * C].

        Args:
            sizes: [rows, dims] or [rows], any real dtype.
            batch: rows wanted; fewer given rows r0, r1 are tiled r0, r1, r0, r1, ...
                None: as many as given.

        Raises:
            UsageError: `batch` is not a multiple of the rows.
        """
        if sizes.ndim == 1:
            sizes = sizes[:, None]
        rows = sizes.shape[0]
        batch = rows if batch is None else batch
        if rows == 0 or batch % rows:
            raise UsageError(
                f"SizeEmbedder: {rows} rows cannot be tiled over a batch of {batch}; "
                f"pass 1 or {batch} values"
            )
        if rows != batch:
            sizes = sizes.repeat(batch // rows, 1)
        return super().forward(sizes.reshape(-1)).reshape(batch, -1)


class CaptionMlp(nn.Module):
    """Project caption embeddings: fc2(GELU_tanh(fc1(y)))."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Return [..., C] for [..., in_channels]."""
        hidden = nn.functional.gelu(self.fc1(y), approximate="tanh")
        result: Tensor = self.fc2(hidden)
        return result


class CaptionEmbedder(nn.Module):
    """Project captions to the model's width; drop some of them in training.

    A dropped caption is replaced by the buffer `y_embedding` before the projection, so that the
    model learns an unconditional mode for classifier-free guidance. The text mask stays.

    Args:
        in_channels: width of the text encoder.
        hidden_size: C.
        uncond_prob: chance to drop a caption in training, [0, 1].
        token_num: L of `y_embedding`; in training captions have exactly this length.
    """

    y_embedding: Tensor

    def __init__(
        self, in_channels: int, hidden_size: int, uncond_prob: float, token_num: int
    ) -> None:
        super().__init__()
        self.y_proj = CaptionMlp(in_channels, hidden_size)
        self.register_buffer("y_embedding", torch.randn(token_num, in_channels) / in_channels**0.5)
        self.uncond_prob = uncond_prob

    def drop(self, caption: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Replace captions [B, 1, L, in] by `y_embedding`: at random, or where the ids are 1."""
        if force_drop_ids is None:
            dropped = torch.rand(caption.shape[0], device=caption.device) < self.uncond_prob
        else:
            dropped = force_drop_ids.to(caption.device) == 1
        # The buffer keeps its own type where parameters are cast for the time of a call.
        null = self.y_embedding.to(caption.dtype)
        return torch.where(dropped[:, None, None, None], null, caption)

    def forward(
        self, caption: Tensor, *, train: bool = False, force_drop_ids: Tensor | None = None
    ) -> Tensor:
        """Return [B, 1, L, C].

        Args:
            caption: [B, 1, L, in_channels].
            train: drop captions at random with probability `uncond_prob`.
            force_drop_ids: [B]; 1 drops that caption, in training or not.

        Raises:
            UsageError: captions may be dropped and L is not `token_num`.
        """
        if (train and self.uncond_prob > 0) or force_drop_ids is not None:
            if caption.shape[2:] != self.y_embedding.shape:
                tokens, channels = self.y_embedding.shape
                raise UsageError(
                    f"CaptionEmbedder: expected captions [B, 1, {tokens}, {channels}], got "
                    f"{list(caption.shape)}: dropping swaps a caption with the null embedding; "
                    "pad captions to its length"
                )
            caption = self.drop(caption, force_drop_ids)
        result: Tensor = self.y_proj(caption)
        return result


class PositionEmbedding2D(nn.Module):
    """Give every patch of a frame a sinusoidal code of its column, then of its row.

    emb(p) = concat(sin(p f), cos(p f)) with f_k = 10000 ** (-4k / C), k = 0 .. C/4 - 1. There are
    no parameters; nothing is stored.

    Args:
        dim: C, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise UsageError(f"PositionEmbedding2D: the width must be a multiple of 4, got {dim}")
        self.dim = dim

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        scale: float | Tensor = 1.0,
        base_size: int | None = None,
    ) -> Tensor:
        """Return [1, height * width, C] in x's dtype and on its device, row after row.

        Args:
            x: gives dtype and device. A bfloat16 one rounds the frequencies to bfloat16, as in
                the published model cast to bfloat16; angles are float32 either way.
            height: patches per column.
            width: patches per row.
            scale: positions are divided by it; a number or a scalar tensor (no device sync).
            base_size: if given, rows are multiplied by base_size / height, columns by
                base_size / width.
        """
        half = self.dim // 2
        steps = torch.arange(0, half, 2, dtype=torch.float32, device=x.device)
        frequencies = (1.0 / 10000 ** (steps / half)).to(x.dtype).float()
        if isinstance(scale, Tensor):
            scale = scale.to(torch.float32)
        codes = []
        for size in (height, width):
            positions = torch.arange(size, dtype=torch.float32, device=x.device) / scale
            if base_size is not None:
                positions = positions * (base_size / size)
            angles = positions[:, None] * frequencies
            codes.append(torch.cat((angles.sin(), angles.cos()), dim=-1))
        rows, columns = codes
        grid = torch.cat(
            (
                columns[None].expand(height, width, half),
                rows[:, None].expand(height, width, half),
            ),
            dim=-1,
        )
        return grid.reshape(1, height * width, self.dim).to(x.dtype)
