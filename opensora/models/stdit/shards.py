"""Split an STDiT's tokens over ranks, by the axis that the next block does not attend along.

A spatial block attends within a frame, so a rank holds some frames; a temporal block attends within
a patch, so it holds some patches. One all-to-all of the tokens lies between two blocks, and no
attention ever sees padding: a padded frame or patch is a row of its own, dropped at the next
exchange. Everything else in a block works token by token.

B batch, T frames, S patches per frame, C channels; n ranks.
"""

from __future__ import annotations

from torch import Tensor

from opensora.distributed.sequence import Sequence, pad


class TokenShards:
    """Follow the tokens of one forward pass over the ranks.

    Args:
        sequence: the ranks.
        frames: T.
        patches: S.
        x_mask: bool [B, T], or None.
    """

    def __init__(
        self, sequence: Sequence, frames: int, patches: int, x_mask: Tensor | None
    ) -> None:
        self.sequence, self.frames, self.patches = sequence, frames, patches
        self._by_patch = False
        own = None if x_mask is None else sequence.split(x_mask, 1).contiguous()
        self._x_masks = (own, x_mask)

    def latent(self, x: Tensor, patch: int) -> Tensor:
        """Return this rank's frames of a latent [B, in, T, H, W]; `patch` frames make one of T."""
        groups = pad(x, 2, self.frames * patch).unflatten(2, (-1, patch))
        return self.sequence.split(groups, 2).flatten(2, 3)

    def arrange(self, tokens: Tensor, by_patch: bool) -> Tensor:
        """Return tokens [B, T * S / n, C] as a temporal (by patch) or a spatial block takes them.

        Raises:
            CollectiveError: a rank did not arrive.
        """
        if by_patch == self._by_patch:
            return tokens
        grid = tokens.unflatten(1, (self.local_frames(self._by_patch), -1))
        self._by_patch = by_patch
        if by_patch:
            grid = self.sequence.switch(grid, 2, 1, self.frames, "tokens, frames to patches")
        else:
            grid = self.sequence.switch(grid, 1, 2, self.patches, "tokens, patches to frames")
        return grid.flatten(1, 2)

    def local_frames(self, by_patch: bool) -> int:
        """Return the frames of a rank's tokens in a temporal (by patch) or a spatial block."""
        return self.frames if by_patch else self.sequence.local(self.frames)

    def x_mask(self, by_patch: bool) -> Tensor | None:
        """Return the frame mask that goes with this rank's tokens in such a block."""
        return self._x_masks[by_patch]

    def gather(self, values: Tensor) -> Tensor:
        """Return values [B, T * S, ...] of tokens as they lie now, on every rank."""
        by_patch = self._by_patch
        grid = values.unflatten(1, (self.local_frames(by_patch), -1))
        dim, length = (2, self.patches) if by_patch else (1, self.frames)
        return self.sequence.gather(grid, dim, length, "predictions").flatten(1, 2)
