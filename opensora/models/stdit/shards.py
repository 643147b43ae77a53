"""Split an STDiT's tokens over ranks, by an axis that the next block does not attend along.

A spatial block attends within a frame, so a rank holds some frames, or some samples where those
divide better: images, and the two halves of guidance. A temporal block attends within a patch, so
it holds some patches. One all-to-all of the tokens lies between two blocks, and no attention ever
sees padding: a padded frame, sample or patch is a row of its own, dropped at the next exchange.
Everything else in a block works token by token.

B batch, T frames, S patches per frame, C channels; n ranks.
"""

from __future__ import annotations

from torch import Tensor

from opensora.distributed.sequence import Sequence, pad
from opensora.models.stdit.block import Modulation
from opensora.nn import PackedText

_SAMPLES, _FRAMES, _PATCHES = 0, 1, 2  # axes of tokens [B, T, S, C]


class TokenShards:
    """Follow the tokens of one forward pass over the ranks.

    Args:
        sequence: the ranks.
        grid: B, T, S.
        keep_samples: whether every rank must see all samples: branches are dropped at random, by
            one number a sample.
    """

    def __init__(
        self, sequence: Sequence, grid: tuple[int, int, int], keep_samples: bool = False
    ) -> None:
        self.sequence, self.grid = sequence, grid

        def waste(axis: int) -> float:
            return sequence.local(grid[axis]) / grid[axis]

        by_sample = not keep_samples and waste(_SAMPLES) < waste(_FRAMES)
        self._spatial = _SAMPLES if by_sample else _FRAMES
        self._now = self._spatial

    def latent(self, x: Tensor, patch: int) -> Tensor:
        """Return this rank's part of a latent [B, in, t, H, W]; `patch` frames make one of T."""
        if self._spatial == _SAMPLES:
            return self.sequence.split(x, 0)
        groups = pad(x, 2, self.grid[_FRAMES] * patch).unflatten(2, (-1, patch))
        return self.sequence.split(groups, 2).flatten(2, 3)

    def arrange(self, tokens: Tensor, temporal: bool) -> Tensor:
        """Return tokens [b, t * s, C] as the next block takes them.

        Raises:
            CollectiveError: a rank did not arrive.
        """
        before, self._now = self._now, _PATCHES if temporal else self._spatial
        if before == self._now:
            return tokens
        what = "tokens to patches" if temporal else "tokens to frames"
        grid = tokens.unflatten(1, (self._frames(before), -1))
        grid = self.sequence.switch(grid, self._now, before, self.grid[before], what)
        return grid.flatten(1, 2)

    def frames(self) -> int:
        """Return the frames that this rank's tokens have now."""
        return self._frames(self._now)

    def _frames(self, axis: int) -> int:
        frames = self.grid[_FRAMES]
        return self.sequence.local(frames) if axis == _FRAMES else frames

    def conditions(self, modulation: Modulation, text: PackedText) -> tuple[Modulation, PackedText]:
        """Return the part of a block's conditions that goes with this rank's tokens now."""
        rows, select, rows0 = modulation
        split = self.sequence.split
        if self._now == _FRAMES and select is not None:
            modulation = Modulation(rows, split(select, 1).contiguous(), rows0)
        if self._now == _SAMPLES:
            if select is not None and rows0 is not None:
                select, rows0 = split(select, 0), split(rows0, 0)
            modulation = Modulation(split(rows, 0), select, rows0)
            text = text._replace(starts=split(text.starts, 0), lengths=split(text.lengths, 0))
        return modulation, text

    def gather(self, values: Tensor) -> Tensor:
        """Return values [B, T * S, ...] of the tokens that a temporal block left, on every rank."""
        grid = values.unflatten(1, (self._frames(self._now), -1))
        length = self.grid[self._now]
        return self.sequence.gather(grid, self._now, length, "predictions").flatten(1, 2)
