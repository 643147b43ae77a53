"""Judge from the pixels alone what a clip of one moving shape shows.

The judge segments the shape by its distance in colour from the border, follows its centre, and
reads shape, colour, motion, size and background from that. It knows the vocabulary of
`opensora.data.shapes` and nothing of the model or the caption, uses no random numbers, and can
say that there is no single steady object ("present" false), which fails every attribute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.data.shapes import BACKGROUNDS, CLIP_FRAMES, COLOURS, MOTIONS, SHAPES, SIZES, coverage

ATTRIBUTES = ("shape", "colour", "motion", "size", "background")
_GRID = 32  # side of the normalised masks that are compared with the templates
_REACH = 1.9  # half the side of the normalised masks, in square roots of the area


@dataclass(frozen=True)
class Verdict:
    """State what a clip shows.

    Attributes:
        present: One object of steady size is in every frame and moves without jumps.
        shape, colour, motion, size, background: Nearest entries of the vocabulary.
        reason: Why `present` is false, else "".
        shape_score: Overlap (intersection over union) with the best template, 0 to 1.
        displacement: (x, y) from first to last frame in pixels of a 64-pixel frame, for 17 frames.
    """

    present: bool
    shape: str
    colour: str
    motion: str
    size: str
    background: str
    reason: str
    shape_score: float
    displacement: tuple[float, float]

    def right(self, attribute: str, expected: str) -> bool:
        """Tell whether an attribute is as expected; never so without a steady object."""
        return self.present and getattr(self, attribute) == expected


def _nearest(rgb: Tensor, table: dict[str, tuple[int, int, int]]) -> str:
    names = list(table)
    distance = (torch.tensor([table[n] for n in names], dtype=torch.float32) - rgb).square().sum(1)
    return names[int(distance.argmin())]


def _normalise(mask: Tensor, centre: Tensor, area: Tensor) -> Tensor:
    """Resample masks [T, H, W] to the same centre and area: [T, grid, grid]."""
    t, h, w = mask.shape
    step = torch.linspace(-_REACH, _REACH, _GRID) / 2
    reach = area.sqrt()[:, None, None]
    x = (centre[:, 0, None, None] + step[None, None, :] * reach) / w * 2 - 1
    y = (centre[:, 1, None, None] + step[None, :, None] * reach) / h * 2 - 1
    grid = torch.stack([x.expand(t, _GRID, _GRID), y.expand(t, _GRID, _GRID)], -1)
    return F.grid_sample(mask[:, None], grid, align_corners=False)[:, 0]


def _moments(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute area [T] and centre [T, 2] (x, y in pixels) of masks [T, H, W]."""
    _, h, w = mask.shape
    area = mask.sum((1, 2))
    x = (mask.sum(1) * (torch.arange(w) + 0.5)).sum(1) / area.clamp(min=1e-6)
    y = (mask.sum(2) * (torch.arange(h) + 0.5)).sum(1) / area.clamp(min=1e-6)
    return area, torch.stack([x, y], 1)


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, dict[str, float]]:
    """Draw each shape once: normalised masks [4, grid, grid] and area over radius squared."""
    masks, ratios = [], {}
    axis = torch.arange(64) + 0.5 - 32
    for shape in SHAPES:
        mask = coverage(shape, axis[None, None, :], axis[None, :, None], 18.0)
        area, centre = _moments(mask)
        masks.append(_normalise(mask, centre, area)[0])
        ratios[shape] = float(area) / 18.0**2
    return torch.stack(masks), ratios


def judge_pair(clip: Tensor) -> tuple[Verdict, Verdict] | None:
    """Judge a clip of two shapes of different colours; None if it does not show two.

    Every pixel belongs to the nearer shape, and each is judged with the other painted over.

    Args:
        clip: uint8 [T, H, W, 3], T >= 2.

    Returns:
        The verdicts, in the order of the colours' places in their table.
    """
    pixels = clip.float()
    frames, height, width, _ = pixels.shape
    unit = min(height, width) / 64
    background = _border(pixels).median(0).values
    inside = (pixels - background).square().sum(-1).sqrt() > 60
    core = -F.max_pool2d(-inside.float()[:, None], 3, 1, 1)[:, 0]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    nearest = torch.cdist(pixels.flatten(0, 2), palette).argmin(1).view(frames, height, width)
    cores = torch.stack([core * (nearest == i) for i in range(len(palette))])  # [C, T, H, W]
    area = cores.sum((2, 3))
    # Of a colour in passing, as at an edge, there is little, or none in most frames.
    typical = area.median(1).values
    found = sorted(typical.topk(2).indices.tolist())
    if float(typical[found].min()) < 25 * unit**2:
        return None
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    distances = []
    for colour in found:
        size, centre = _moments(cores[colour])
        reach = (size / math.pi).sqrt()[:, None, None]
        dx = x[None, None, :] - centre[:, 0, None, None]
        dy = y[None, :, None] - centre[:, 1, None, None]
        distances.append((dx.square() + dy.square()).sqrt() - reach)
    first = (distances[0] < distances[1])[..., None]
    one = torch.where(first, pixels, background).to(torch.uint8)
    other = torch.where(first, background, pixels).to(torch.uint8)
    return judge(one), judge(other)


def _border(pixels: Tensor) -> Tensor:
    """Return the pixels [*, 3] at the border of [T, H, W, 3]."""
    sides = [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]]
    return torch.cat(sides, dim=1).reshape(-1, 3)


def judge(clip: Tensor) -> Verdict:
    """Judge one clip.

    Args:
        clip: uint8 [T, H, W, 3], T >= 2.

    Returns:
        The verdict; its texts are keys of the tables of `opensora.data.shapes`.
    """
    pixels = clip.float()
    frames, height, width, _ = pixels.shape
    unit = min(height, width) / 64
    background_rgb = _border(pixels).median(0).values
    distance = (pixels - background_rgb).square().sum(-1).sqrt()  # [T, H, W]
    # The object's own contrast sets the scale, so that its edge lies where it is half covered.
    contrast = distance.flatten(1).topk(max(1, int(60 * unit**2)), dim=1).values.median()
    soft = ((distance / contrast.clamp(min=60.0) - 0.2) / 0.6).clamp(0, 1)
    # Drop specks: whatever a 3x3 opening removes.
    hard = (soft > 0.5).float()[:, None]
    core = -F.max_pool2d(-hard, 3, 1, 1)
    mask = soft * F.max_pool2d(core, 5, 1, 2)[:, 0]
    area, centre = _moments(mask)

    steps = (centre[1:] - centre[:-1]).norm(dim=1)
    typical = area.median()
    reason = ""
    if float(area.min()) < 50 * unit**2:
        reason = f"no object in frame {int(area.argmin())}"
    elif float((area / typical).min()) < 0.6 or float((area / typical).max()) > 1.67:
        reason = "the object changes its size"
    elif float(steps.max()) > 8 * unit:
        reason = f"the object jumps after frame {int(steps.argmax())}"

    weight = core[:, 0] if float(core.sum()) > 0 else mask
    rgb = (pixels * weight[..., None]).sum((0, 1, 2)) / weight.sum().clamp(min=1e-6)

    masks = _normalise(mask, centre, area.clamp(min=1.0)).mean(0)
    templates, ratios = _templates()
    overlap = torch.minimum(masks, templates).sum((1, 2)) / torch.maximum(masks, templates).sum(
        (1, 2)
    )
    shape = SHAPES[int(overlap.argmax())]
    if not reason and float(overlap.max()) < 0.6:
        reason = "the object has none of the known shapes"

    # Least-squares line through the track: one bad frame does not decide the direction.
    # Longer clips turn back at the border: the direction is the first 17 frames'.
    steady = min(frames, CLIP_FRAMES)
    time = torch.arange(steady, dtype=torch.float32) - (steady - 1) / 2
    slope = (centre[:steady] * time[:, None]).sum(0) / time.square().sum()
    move = slope * (CLIP_FRAMES - 1) / unit
    motion = "still"
    if float(move.norm()) > 5.5:
        angle = math.atan2(float(move[1]), float(move[0]))
        moving = [m for m in MOTIONS if m != "still"]
        motion = min(
            moving,
            key=lambda m: abs(
                math.remainder(angle - math.atan2(MOTIONS[m][1], MOTIONS[m][0]), math.tau)
            ),
        )
    radius = math.sqrt(float(typical) / ratios[shape]) / unit
    middles = {name: sum(limits) / 2 for name, limits in SIZES.items()}
    return Verdict(
        present=not reason,
        shape=shape,
        colour=_nearest(rgb, COLOURS),
        motion=motion,
        size=min(middles, key=lambda name: abs(math.log(max(radius, 1e-3) / middles[name]))),
        background=_nearest(background_rgb, BACKGROUNDS),
        reason=reason,
        shape_score=float(overlap.max()),
        displacement=(float(move[0]), float(move[1])),
    )
