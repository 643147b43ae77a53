"""What datasets give and what training takes: sizes, samples and batches.

B batch, T frames, H x W pixels; latents are [B, C, t, h, w]; L text tokens.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from torch import Tensor


class Size(NamedTuple):
    """Frames, height and width of a clip, in frames and pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Entry:
    """What a dataset knows of one of its rows without decoding it.

    Attributes:
        name: says which row this is to a person: the table's line and the file.
        num_frames, height, width: of the file, frames and pixels; 1 frame is an image.
        fps: of the file; 0 where it has none (images).
    """

    name: str
    num_frames: int
    height: int
    width: int
    fps: float = 0.0


@dataclass
class Sample:
    """One clip with its text, as pixels or as what models made of them.

    Attributes:
        video: float32 [3, T, H, W] in [-1, 1].
        latent: [C, t, h, w].
        text: the caption.
        states: text states [L, D], without padding.
        fps: that the model is told; 120 for images.
    """

    video: Tensor | None = None
    latent: Tensor | None = None
    text: str | None = None
    states: Tensor | None = None
    fps: float = 120.0


class SampleError(Exception):
    """A row could not be read; the text says why. The row is set aside, training goes on."""


class Dataset(Protocol):
    """Rows that can be sized without decoding them, and read one by one."""

    def entries(self) -> Sequence[Entry]:
        """List all rows."""

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        """Read a row, resized and cropped to `size`; what is random in it comes from `rng` alone.

        Raises:
            SampleError: the row cannot be read.
        """


@dataclass
class Batch:
    """Samples of one size, in the order in which the sampler named them.

    Attributes:
        number: how many batches all replicas together took before this one, from the first epoch
            on; all that is random in a training step is made from the seed and this.
        epoch: zero-based.
        bucket: name of the bucket, "240p 51 0.56".
        names: of the entries.
        size: of the clips.
        video: float32 [B, 3, T, H, W] in [-1, 1]; None where there are latents.
        latent: [B, C, t, h, w].
        text: captions; None where there are states.
        states: [B, 1, L, D], padded with zeros.
        mask: int64 [B, L], 1 where a token counts.
        conditions: name -> float32 [B]: num_frames, height, width, fps, ar (height / width).
        failed: name -> reason, rows of this batch that could not be read and are not in it.
    """

    number: int
    epoch: int
    bucket: str
    names: list[str]
    size: Size
    video: Tensor | None = None
    latent: Tensor | None = None
    text: list[str] | None = None
    states: Tensor | None = None
    mask: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def keep(self, names: Collection[str]) -> Batch:
        """Return the batch with those of its rows alone."""
        rows = [row for row, name in enumerate(self.names) if name in names]
        if len(rows) == len(self.names):
            return self
        return replace(
            self,
            names=[self.names[row] for row in rows],
            video=None if self.video is None else self.video[rows],
            latent=None if self.latent is None else self.latent[rows],
            text=None if self.text is None else [self.text[row] for row in rows],
            states=None if self.states is None else self.states[rows],
            mask=None if self.mask is None else self.mask[rows],
            conditions={name: value[rows] for name, value in self.conditions.items()},
        )
