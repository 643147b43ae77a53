"""Draw which latent frames of a clip are given and which are to be made.

    mask_ratios = {"random": 0.05, "quarter_head": 0.005, "image_head": 0.05}

Kinds: `identity` (all frames are made; gets what the others leave of 1), `quarter_*` (up to a
quarter is given: at the head, the tail, both, or anywhere), `image_*` (one frame is), `random`
(every frame by a coin), `intepolate` (every second one; Open-Sora spells it so). Open-Sora 1.1's
names, `mask_` in front and `mask_no` for identity, mean the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from opensora.config_file import suggest
from opensora.errors import UsageError

KINDS = (
    "identity",
    "quarter_random",
    "quarter_head",
    "quarter_tail",
    "quarter_head_tail",
    "image_random",
    "image_head",
    "image_tail",
    "image_head_tail",
    "random",
    "intepolate",
)


class MaskGenerator:
    """Draw masks by their ratios.

    Args:
        ratios: kind -> probability; the rest to 1 goes to identity.

    Attributes:
        ratios: kind -> probability, in the order given, identity at its own place or last.

    Raises:
        UsageError: an unknown kind, a number outside 0 ... 1, or a sum above 1, or below 1 though
            identity is given.
    """

    def __init__(self, ratios: Mapping[str, float]) -> None:
        self.ratios: dict[str, float] = {}
        for name, ratio in ratios.items():
            kind = _kind(name)
            if kind in self.ratios:
                raise UsageError(f"mask_ratios: {kind!r} is there twice")
            number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
            if not number or not 0 <= ratio <= 1:
                raise UsageError(f"mask_ratios: {name} must lie in 0 ... 1, got {ratio!r}")
            self.ratios[kind] = float(ratio)
        total = math.fsum(self.ratios.values())
        if total > 1 + 1e-6:
            raise UsageError(
                f"mask_ratios add up to {total:g}; lower them to 1 at most (what is left of 1 "
                "goes to identity)"
            )
        if "identity" not in self.ratios:
            self.ratios["identity"] = max(0.0, 1.0 - total)
        elif total < 1 - 1e-6:
            raise UsageError(
                f"mask_ratios add up to {total:g}; leave identity out, and it gets the rest, or "
                f"set it to {self.ratios['identity'] + 1 - total:g}"
            )

    def mask(
        self, frames: int, rng: random.Random, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw the mask of one clip.

        A clip too short for a quarter (below 4 frames) gets one frame in its place; one frame
        alone is always made.

        Args:
            frames: latent frames.
            rng: draws the kind, lengths and places.
            generator: draws the coins of `random`; torch's global one if None.

        Returns:
            bool [T]: True where a frame is made, False where it is given.
        """
        mask = torch.ones(frames, dtype=torch.bool)
        kind = self._draw(rng)
        if kind == "identity" or frames <= 1:
            return mask
        if kind == "random":
            threshold = rng.random() * 0.8 + 0.1
            mask = torch.rand(frames, generator=generator) > threshold
            if not bool(mask.any()):
                mask[-1] = True  # nothing to make would be nothing to learn
            return mask
        if kind == "intepolate":
            mask[rng.randint(0, 1) :: 2] = False
            return mask
        extent, place = kind.split("_", 1)
        given = 1
        if extent == "quarter":
            given = rng.randint(1, max(1, frames // 4))
        if place == "random":
            start = rng.randint(0, frames - given)
            mask[start : start + given] = False
        if place.startswith("head"):
            mask[:given] = False
        # Of a clip of two frames, head and tail would be all of it.
        if place == "tail" or (place == "head_tail" and 2 * given < frames):
            mask[frames - given :] = False
        return mask

    def masks(
        self,
        batch_size: int,
        frames: int,
        rng: random.Random,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw the masks of a batch: bool [B, T]; see `mask`."""
        return torch.stack([self.mask(frames, rng, generator) for _ in range(batch_size)])

    def _draw(self, rng: random.Random) -> str:
        """Draw a kind: the first whose share of 0 ... 1 holds the number."""
        number, reached = rng.random(), 0.0
        for kind, ratio in self.ratios.items():
            reached += ratio
            if number < reached:
                return kind
        return "identity"


def _kind(name: str) -> str:
    """Return today's name of a kind."""
    old = {f"mask_{kind}": kind for kind in KINDS} | {"mask_no": "identity"}
    kind = old.get(name, name)
    if kind not in KINDS:
        near = suggest(str(name), [*KINDS, "interpolate"]).replace("interpolate", "intepolate")
        raise UsageError(f"mask_ratios: unknown kind {name!r}{near} (known: {', '.join(KINDS)})")
    return kind
