"""Draw and word clips of two moving shapes, made of two scenes on one background.

Both stay whole and apart: their colours differ, and their outlines never touch.
"""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from opensora.data.shape_captions import describe, place
from opensora.data.shapes import (
    BACKGROUNDS,
    CLIP_FRAMES,
    EXTENT,
    FPS,
    Scene,
    combinations,
    cover,
    sample_scene,
    track,
)

Pair = tuple[Scene, Scene]
_OPENINGS = (("a", 8), ("", 2), ("one", 1), ("there is a", 1))
_JOINTS = ("and", "and", "and", "with", "next to", "beside")
#: Bytes of the longest text: one fewer than the encoder of the embedded model takes.
MOST_BYTES = 118


def apart(pair: Pair, frames: int, height: int, width: int, fps: float = FPS) -> bool:
    """Tell whether two shapes never come within three pixels (of 64) of each other."""
    one, other = (track(scene, frames, height, width, fps) for scene in pair)
    reach = sum(scene.radius * EXTENT[scene.shape] for scene in pair) + 3
    return float((one - other).norm(dim=1).min()) > reach * min(height, width) / 64


def sample_pair(
    rng: random.Random,
    split: str = "seen",
    frames: int = CLIP_FRAMES,
    height: int = 64,
    width: int = 64,
    fps: float = FPS,
) -> Pair:
    """Draw two scenes of a split that stay apart at a size; small and medium shapes fit."""
    triples = combinations(split)
    if frames == 1:
        triples = [triple for triple in triples if triple[2] == "still"]
    background = rng.choice(list(BACKGROUNDS))
    while True:
        first = rng.choice(triples)
        second = rng.choice([triple for triple in triples if triple[1] != first[1]])
        scenes = (sample_scene(rng, first), sample_scene(rng, second))
        if any(scene.size == "large" or scene.speed == "fast" for scene in scenes):
            continue
        rgb = scenes[0].background_rgb
        pair = tuple(
            dataclasses.replace(scene, background=background, background_rgb=rgb)
            for scene in scenes
        )
        if scenes[0].background != background:
            continue
        if apart((pair[0], pair[1]), frames, height, width, fps):
            return pair[0], pair[1]


def render_pair(
    pair: Pair, frames: int = CLIP_FRAMES, height: int = 64, width: int = 64, fps: float = FPS
) -> Tensor:
    """Draw two scenes: uint8 [frames, height, width, 3]."""
    pixels = torch.tensor(pair[0].background_rgb).expand(frames, height, width, 3)
    for scene in pair:
        position = track(scene, frames, height, width, fps)
        alpha = cover(scene, position, height, width, (0, 0, height, width))
        pixels = pixels + alpha * (torch.tensor(scene.rgb) - pixels)
    return (pixels + 0.5).to(torch.uint8)


def caption_pair(
    pair: Pair, rng: random.Random, size_share: float = 0.2
) -> tuple[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Word two scenes in at most `MOST_BYTES` bytes.

    Returns:
        (text, names of the attributes that it states of each scene).
    """
    while True:
        one, names = describe(pair[0], rng, size_share, finite=False, openings=_OPENINGS)
        other, others = describe(pair[1], rng, size_share, finite=False, openings=_OPENINGS[:2])
        text = f"{one} {rng.choice(_JOINTS)} {other}"
        if rng.random() < 0.4:
            names, others = [*names, "background"], [*others, "background"]
            text = place(text, pair[0].background, rng)
        if len(text.encode()) <= MOST_BYTES:
            return text, (tuple(names), tuple(others))
