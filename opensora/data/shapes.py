"""Draw captioned clips of one moving shape: the data of the embedded default model.

A clip shows one shape (circle, square, triangle, star) of one colour on a plain background, moving
in one of eight directions or standing still. A scene fixes all of it; `render` draws the scene at
any size and length; `opensora.data.shape_captions` words it. A few combinations of
shape, colour and motion are held out of training, so that what a model composes can be told from
what it memorised (`split`).

Run ``python -m opensora.data.shapes`` to draw a contact sheet.

Lengths are in pixels of a frame whose shorter side is 64 and scale with that side. Coordinates are
(x to the right, y downwards). One clip spans 17 frames at 8 frames per second; longer clips go on
at the same speed and turn back at the border.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 165, 60),
    "cyan": (30, 205, 225),
    "blue": (35, 70, 230),
    "purple": (150, 45, 200),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 14),
    "gray": (120, 120, 124),
    "white": (242, 242, 240),
}
SIZES: dict[str, tuple[float, float]] = {
    "small": (7.0, 7.8),
    "medium": (9.2, 10.2),
    "large": (12.0, 13.2),
}
# Displacement over one clip of 17 frames.
SPEEDS: dict[str, tuple[float, float]] = {
    "slow": (11.0, 13.0),
    "normal": (15.0, 18.0),
    "fast": (21.0, 24.0),
}
_D = math.sqrt(0.5)
MOTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-right": (_D, -_D),
    "up-left": (-_D, -_D),
    "down-right": (_D, _D),
    "down-left": (-_D, _D),
    "still": (0.0, 0.0),
}
CLIP_FRAMES = 17
FPS = 8.0


def _ring(count: int, radii: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Place vertices on rays, the first one pointing up, with alternating radii."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return tuple(
        (math.sin(a) * radii[i % len(radii)], -math.cos(a) * radii[i % len(radii)])
        for i, a in enumerate(angles)
    )


# Vertices for a shape of radius 1; the factors make the four shapes look about equally large.
POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)),
    "triangle": tuple((x, y + 0.15) for x, y in _ring(3, (1.4,))),
    "star": _ring(10, (1.42, 0.6)),
}
SHAPES = tuple(POLYGONS)
# Half the extent of a shape of radius 1, for keeping it inside the frame.
EXTENT = {"circle": 1.0, "square": 0.89, "triangle": 1.26, "star": 1.42}

Triple = tuple[str, str, str]
HELD_OUT_PAIRS = (("star", "green"), ("square", "orange"))


def split(shape: str, colour: str, motion: str) -> str:
    """Name the split of a combination: "seen", "triple" or "pair".

    "pair": the (shape, colour) pair never occurs in training. "triple": every two of the three
    attributes occur together in training, the three never do.
    """
    if (shape, colour) in HELD_OUT_PAIRS:
        return "pair"
    index = SHAPES.index(shape) + list(COLOURS).index(colour) + list(MOTIONS).index(motion)
    return "triple" if index % 6 == 0 else "seen"


def combinations(name: str) -> list[Triple]:
    """List the (shape, colour, motion) combinations of a split, in a fixed order."""
    triples = [(s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS]
    return [t for t in triples if name == "all" or split(*t) == name]


@dataclass(frozen=True)
class Scene:
    """Describe one clip: the words and the numbers that they stand for.

    Attributes:
        shape, colour, motion, size, background, speed: Keys of the tables of this module.
        radius: Radius in pixels of a 64-pixel frame.
        centre: Position at the middle of the clip as a fraction of the free room, each in [-1, 1].
        distance: Displacement over 17 frames, in pixels of a 64-pixel frame.
        rgb, background_rgb: Colours, 0 to 255.
    """

    shape: str
    colour: str
    motion: str
    size: str
    background: str
    speed: str
    radius: float
    centre: tuple[float, float]
    distance: float
    rgb: tuple[float, float, float]
    background_rgb: tuple[float, float, float]


def sample_scene(rng: random.Random, triple: Triple | None = None) -> Scene:
    """Draw a scene; shape, colour and motion come from `triple` if given."""
    shape, colour, motion = triple or rng.choice(combinations("all"))
    size, background = rng.choice(list(SIZES)), rng.choice(list(BACKGROUNDS))
    speed = rng.choice(list(SPEEDS))

    def jitter(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
        r, g, b = (min(255.0, max(0.0, v + rng.uniform(-8, 8))) for v in rgb)
        return r, g, b

    return Scene(
        shape,
        colour,
        motion,
        size,
        background,
        speed,
        radius=rng.uniform(*SIZES[size]),
        centre=(rng.uniform(-1, 1), rng.uniform(-1, 1)),
        distance=0.0 if motion == "still" else rng.uniform(*SPEEDS[speed]),
        rgb=jitter(COLOURS[colour]),
        background_rgb=jitter(BACKGROUNDS[background]),
    )


def track(scene: Scene, frames: int, height: int, width: int, fps: float = FPS) -> Tensor:
    """Compute the centre of the shape in every frame.

    Returns:
        float32 [frames, 2], pixels (x, y). The first two seconds stay inside the picture; past them
        the shape goes on at the same speed and turns back at the border.
    """
    unit = min(height, width) / 64
    extent = (scene.radius * EXTENT[scene.shape] + 1.0) * unit
    direction = torch.tensor(MOTIONS[scene.motion])
    half = direction * scene.distance * unit / 2
    size = torch.tensor([width, height], dtype=torch.float32)
    room = (size / 2 - extent - half.abs()).clamp(min=0.0)
    middle = size / 2 + room * torch.tensor(scene.centre)
    step = torch.arange(frames, dtype=torch.float32) / (CLIP_FRAMES - 1) * (FPS / fps)
    position = middle - half + step[:, None] * 2 * half
    if float(step[-1]) > 1:
        low, span = (
            torch.minimum(torch.full((2,), extent), size / 2),
            (size - 2 * extent).clamp(min=1e-3),
        )
        phase = ((position - low) / span) % 2
        position = low + span * torch.where(phase > 1, 2 - phase, phase)
    return position


def coverage(shape: str, offset_x: Tensor, offset_y: Tensor, radius: float) -> Tensor:
    """Compute how much of each pixel a shape covers, from the distance to its outline.

    Args:
        shape: Key of POLYGONS.
        offset_x: Position of the pixel centres to the right of the shape's centre, in pixels.
        offset_y: The same downwards; both broadcast together.
        radius: In pixels.

    Returns:
        float32 in [0, 1] of the broadcast shape.
    """
    if shape == "circle":
        signed = torch.sqrt(offset_x**2 + offset_y**2) - radius
        return (0.5 - signed).clamp(0, 1)
    vertices = [(x * radius, y * radius) for x, y in POLYGONS[shape]]
    nearest: Tensor | None = None
    inside: Tensor | None = None
    for (ax, ay), (bx, by) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = offset_x - ax, offset_y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = (px - along * ex) ** 2 + (py - along * ey) ** 2
        above = (offset_y >= ay) != (offset_y >= by)
        crosses = above & ((px * ey - py * ex < 0) == (ey > 0))
        nearest = squared if nearest is None else torch.minimum(nearest, squared)
        inside = crosses if inside is None else inside ^ crosses
    assert nearest is not None
    assert inside is not None
    distance = nearest.sqrt()
    return (0.5 - torch.where(inside, -distance, distance)).clamp(0, 1)


def render(
    scene: Scene,
    frames: int = CLIP_FRAMES,
    height: int = 64,
    width: int = 64,
    window: tuple[int, int, int, int] | None = None,
    only: Sequence[int] | None = None,
    fps: float = FPS,
) -> Tensor:
    """Draw a scene with anti-aliased edges.

    Args:
        scene: What to draw.
        frames: Length of the clip.
        height: Of the clip, pixels.
        width: Of the clip, pixels.
        window: (top, left, height, width) of the part to draw; None draws all of it.
        only: Indices of the frames to draw; None draws all of them.
        fps: Frames per second; at twice the rate a frame moves half as far.

    Returns:
        uint8 [frames, height, width, 3].
    """
    window = window or (0, 0, height, width)
    alpha = cover(scene, track(scene, frames, height, width, fps), height, width, window, only)
    foreground, background = torch.tensor(scene.rgb), torch.tensor(scene.background_rgb)
    return (background + alpha * (foreground - background) + 0.5).to(torch.uint8)


def cover(
    scene: Scene,
    position: Tensor,
    height: int,
    width: int,
    window: tuple[int, int, int, int],
    only: Sequence[int] | None = None,
) -> Tensor:
    """Compute how much of each pixel a shape covers on its way.

    Args:
        scene: Gives shape and radius.
        position: What `track` returns.
        height: Of the clip, pixels.
        width: Of the clip, pixels.
        window: See `render`.
        only: See `render`.

    Returns:
        float32 in [0, 1], [frames, rows, columns, 1].
    """
    top, left, rows, columns = window
    if only is not None:
        position = position[list(only)]
    x = torch.arange(left, left + columns, dtype=torch.float32) + 0.5
    y = torch.arange(top, top + rows, dtype=torch.float32) + 0.5
    dx = x[None, None, :] - position[:, 0, None, None]
    dy = y[None, :, None] - position[:, 1, None, None]
    return coverage(scene.shape, dx, dy, scene.radius * min(height, width) / 64)[..., None]


def main(argv: Sequence[str] | None = None) -> int:
    """Write a contact sheet: one clip a row, five of its frames, ordered by split and shape."""
    from opensora.data.contact_sheet import save_contact_sheet
    from opensora.data.shape_captions import caption

    parser = argparse.ArgumentParser(
        prog="python -m opensora.data.shapes", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, default=Path("samples/shapes.png"))
    parser.add_argument("--num", type=int, default=24, help="clips on the sheet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, nargs=2, default=(64, 64), metavar=("H", "W"))
    parser.add_argument("--num-frames", type=int, default=CLIP_FRAMES)
    args = parser.parse_args(argv)
    if min(args.num, args.num_frames) < 1 or min(args.image_size) < 8:
        parser.error("--num and --num-frames must be at least 1, --image-size at least 8 8")
    rng = random.Random(args.seed)
    scenes = [sample_scene(rng) for _ in range(args.num)]
    clips = [render(s, args.num_frames, *args.image_size) for s in scenes]
    labels = [f"{caption(s, rng)[0]} [{split(s.shape, s.colour, s.motion)}]" for s in scenes]
    save_contact_sheet(args.output, clips, labels)
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
