"""Write clips as mp4 and single frames as png, with their recipe inside and beside them.

mp4: H.264, yuv420p, BT.709, exact frame rate, index in front; the recipe is JSON in the comment
tag. png: the recipe is JSON in the Comment text. Both get the same JSON as `<name>.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opensora.errors import NonFiniteError, UsageError
from opensora.files import atomic, flush, write_error, write_text

Frames = npt.NDArray[np.uint8]

#: x264 quality; 23 is its default, lower is better. Clips are small and will be judged closely.
CRF = 14


@dataclass(frozen=True)
class SavedClip:
    """Describe a written file.

    Attributes:
        path: of the mp4 or png.
        sidecar: of the JSON beside it.
        frames: how many.
        width: pixels of the file, after padding to even numbers in an mp4.
        height: pixels of the file.
        seconds: frames / fps; 0 for an image.
    """

    path: Path
    sidecar: Path
    frames: int
    width: int
    height: int
    seconds: float


def to_uint8(video: Tensor) -> Frames:
    """Convert model output to pixels: trunc((clamp(x, -1, 1) + 1) / 2 * 255 + 0.5).

    Args:
        video: floating [..., 3, T, H, W] in [-1, 1].

    Returns:
        uint8 [..., T, H, W, 3].

    Raises:
        NonFiniteError: a value is NaN or infinite; the frame is named.
    """
    check_frames(video)
    pixels = (video.float().clamp(-1, 1) + 1) / 2 * 255 + 0.5
    array: Frames = pixels.to(torch.uint8).movedim(-4, -1).cpu().contiguous().numpy()
    return array


def check_frames(video: Tensor) -> None:
    """Raise NonFiniteError with the first bad frame if a value of [..., T, H, W] is not finite."""
    if bool(video.sum(dtype=torch.float32).isfinite()):
        return
    finite = video.isfinite().movedim(-3, 0).flatten(1).all(1)
    if not bool(finite.all()):
        frame = int(finite.int().argmin())
        raise NonFiniteError(
            f"frame {frame} of {len(finite)} holds NaN or infinity; nothing was written. Try "
            "--dtype fp32, or check the weights"
        )


def frame_rate(fps: float | Fraction) -> Fraction:
    """Return the exact rate: 23.976 -> 24000/1001, 8 -> 8/1.

    Raises:
        UsageError: not a positive finite number.
    """
    if not math.isfinite(fps) or fps <= 0:
        raise UsageError(f"frames per second must be greater than 0, got {fps}")
    film = Fraction(round(fps * 1001 / 1000) * 1000, 1001)
    if isinstance(fps, float) and film > 0 and abs(float(film) - fps) < 1e-3 and fps % 1:
        return film
    return Fraction(fps).limit_denominator(1001)


def estimate_bytes(frames: int, height: int, width: int) -> int:
    """Estimate the size of a written clip, generously: 2 bits a pixel plus the recipe twice."""
    return frames * height * width // 4 + (1 << 16)


def write_clip(
    path: str | Path,
    frames: Frames | Tensor,
    fps: float | Fraction,
    recipe: Mapping[str, Any] | None = None,
) -> SavedClip:
    """Write an mp4, or a png if the path says so, and its sidecar.

    Args:
        path: ends in .mp4, or .png for a single frame. An existing file is replaced at the end.
        frames: uint8 [T, H, W, 3], or floating [3, T, H, W] in [-1, 1]. H.264 with yuv420p needs
            even sizes: the last row or column of an odd clip is written twice.
        fps: frames per second.
        recipe: JSON values; "file" with the facts of the file is added.

    Raises:
        NonFiniteError: the frames are not finite. Nothing is written.
        DoesNotFitError: the disk is full. Nothing is left under the final name.
        UsageError: wrong shape or suffix, or the folder cannot be written.
    """
    path = Path(path)
    pixels = (
        to_uint8(frames) if isinstance(frames, Tensor) and frames.is_floating_point() else frames
    )
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise UsageError(
            f"expected frames uint8 [T, H, W, 3], got {array.dtype} {list(array.shape)}"
        )
    image = path.suffix == ".png"
    if path.suffix not in (".mp4", ".png") or (image and len(array) != 1):
        raise UsageError(f"cannot write {len(array)} frames to {path}: use .mp4, or .png for one")
    rate = frame_rate(fps)
    height, width = array.shape[1:3]
    bottom, right = (0, 0) if image else (height % 2, width % 2)
    if bottom or right:
        array = np.pad(array, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
    facts = {
        "frames": len(array),
        "width": array.shape[2],
        "height": array.shape[1],
        "fps": None if image else str(rate),
        "repeated_rows": bottom,
        "repeated_columns": right,
    }
    text = json.dumps({**(recipe or {}), "file": facts}, indent=1, default=str)
    sidecar = path.with_suffix(".json")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; choose another --sample-name")
    with atomic(path) as partial:
        try:
            if image:
                _encode_png(partial, array[0], text)
            else:
                _encode_mp4(partial, array, rate, text)
        except OSError as error:
            raise write_error(path, error) from error
        # Flushed first, so that a disk that fills up shows before the sidecar has its name; inside
        # the block, so that a clip never has its name without its recipe.
        flush(partial)
        write_text(sidecar, text + "\n")
    seconds = 0.0 if image else float(len(array) / rate)
    return SavedClip(path, sidecar, len(array), array.shape[2], array.shape[1], seconds)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the recipe inside an mp4 or png.

    Raises:
        UsageError: the file cannot be read or holds no recipe.
    """
    path = Path(path)
    try:
        text = _png_comment(path) if path.suffix == ".png" else _mp4_comment(path)
        recipe = json.loads(text)
    except (OSError, ValueError, SyntaxError) as error:
        why = getattr(error, "strerror", None) or "it holds no recipe"
        raise UsageError(f"cannot read the recipe of {path}: {why}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"cannot read the recipe of {path}: it holds no recipe")
    return recipe


def _encode_mp4(path: Path, frames: Frames, rate: Fraction, comment: str) -> None:
    """Encode frames [T, H, W, 3] with even sizes."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    options = {"movflags": "+faststart"}
    container = av.open(str(path), "w", format="mp4", options=options)
    try:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        # Without these tags players guess the colour matrix from the height.
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = ColorRange.MPEG
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(
                stream.encode(
                    picture.reformat(
                        format="yuv420p",
                        dst_colorspace=Colorspace.ITU709,
                        dst_color_range=ColorRange.MPEG,
                    )
                )
            )
        container.mux(stream.encode())
    except BaseException:
        # Closing writes the index: on a full disk it fails again and would hide the first error.
        with suppress(OSError):
            container.close()
        raise
    container.close()


def _encode_png(path: Path, pixels: Frames, comment: str) -> None:
    """Encode one frame [H, W, 3]."""
    from PIL import Image, PngImagePlugin

    information = PngImagePlugin.PngInfo()
    information.add_itxt("Comment", comment)
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=information)


def _png_comment(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return str(getattr(image, "text", {}).get("Comment", ""))


def _mp4_comment(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        return str(container.metadata.get("comment", ""))
