"""Bring frames to a size and to [-1, 1], as Open-Sora does.

`resize_crop` enlarges or reduces a frame until it covers the size, then cuts out the middle; frames
of videos bilinear, images bicubic. `center` does the same for squares the way of Open-Sora 1.0:
images are halved with a box filter first. Frames are [3, H, W] and treated one by one: a clip in
float32 at its own size would be many times the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.data.batch import Size

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]

NAMES = ("resize_crop", "center")


def resize_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Cover the size, bilinear, and cut out the middle.

    Frames are float [T, 3, H, W], the result is [T, 3, height, width].
    """
    high, wide = _covering(frames.shape[-2], frames.shape[-1], height, width)
    return _middle(
        F.interpolate(frames, (high, wide), mode="bilinear", align_corners=False), height, width
    )


def center(frames: Tensor, side: int) -> Tensor:
    """Bring the shorter side to `side`, bilinear, and cut out the middle square.

    Args:
        frames: float [T, 3, H, W].
        side: of the result.
    """
    # By factor, not by size: the positions that are sampled differ.
    factor = side / min(frames.shape[-2:])
    return _middle(
        F.interpolate(frames, scale_factor=factor, mode="bilinear", align_corners=False), side, side
    )


def resize_crop_image(image: Image.Image, height: int, width: int) -> Pixels:
    """Cover the size, bicubic, and cut out the middle: uint8 [height, width, 3]."""
    from PIL import Image

    high, wide = _covering(image.height, image.width, height, width)
    pixels = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
    top, left = round((high - height) / 2), round((wide - width) / 2)
    return pixels[top : top + height, left : left + width]


def center_image(image: Image.Image, side: int) -> Pixels:
    """Bring the shorter side to `side` and cut out the middle square: uint8 [side, side, 3]."""
    from PIL import Image

    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = side / min(image.size)
    size = round(image.width * factor), round(image.height * factor)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def clip_of_frames(frames: Iterable[Pixels], size: Size, name: str) -> Tensor:
    """Return float32 [3, T, H, W] in [-1, 1] of decoded frames, which may come one at a time.

    Args:
        frames: `size.frames` arrays uint8 [H, W, 3].
        size: of the result; square for `center`.
        name: a transform of NAMES.
    """
    clip = torch.empty(3, *size)
    with _one_thread():
        for t, pixels in enumerate(frames):
            frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None] / 255.0
            if name == "center":
                frame = center(frame, size.height)
            else:
                frame = resize_crop(frame, size.height, size.width)
            clip[:, t] = frame[0]
    return clip.sub_(0.5).div_(0.5)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Resize in one thread: interpolation rounds otherwise where several divide the rows."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


def clip_of_image(image: Image.Image, size: Size, name: str) -> Tensor:
    """Return float32 [3, T, H, W] in [-1, 1] of an RGB image, the same in every frame."""
    if name == "center":
        pixels = center_image(image, size.height)
    else:
        pixels = resize_crop_image(image, size.height, size.width)
    frame = torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255.0
    return frame.sub_(0.5).div_(0.5)[:, None].repeat(1, size.frames, 1, 1)


def frame_indices(total: int, frames: int, interval: int, start: int) -> list[int]:
    """Spread `frames` indices evenly over the frames x interval that begin at `start`.

    A clip that ends earlier is spread over what it has.

    Args:
        total: frames of the file, at least start + frames.
        frames: wanted.
        interval: step, in frames of the file.
        start: first index.

    Raises:
        ValueError: the clip has fewer frames than wanted from there on.
    """
    if total - start < frames:
        raise ValueError(f"frame_indices: expected {frames} frames from {start}, of {total}")
    end = min(start + frames * interval, total)
    return [int(i) for i in np.linspace(start, end - 1, frames).astype(np.int64)]


def last_start(total: int, frames: int, interval: int) -> int:
    """Return the last index at which `frames` at a step of `interval` may begin.

    Open-Sora stops one before it, so that the last frame of a clip is never seen.
    """
    return max(0, total - frames * interval)


def _covering(high: int, wide: int, height: int, width: int) -> tuple[int, int]:
    """Return the size of a frame that just covers height x width."""
    if height / high > width / wide:
        return height, round(wide * (height / high))
    return round(high * (width / wide)), width


def _middle(frames: Tensor, height: int, width: int) -> Tensor:
    top = round((frames.shape[-2] - height) / 2)
    left = round((frames.shape[-1] - width) / 2)
    return frames[..., top : top + height, left : left + width]


def check_name(name: Any, names: tuple[str, ...] = NAMES) -> str:
    """Return a transform's name.

    Raises:
        UsageError: there is none of this name.
    """
    from opensora.config_file import suggest
    from opensora.errors import UsageError

    if name not in names:
        raise UsageError(
            f"unknown transform_name {name!r}{suggest(str(name), names)} (known: "
            f"{', '.join(names)})"
        )
    return str(name)
