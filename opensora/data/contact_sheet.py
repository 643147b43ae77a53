"""Lay clips out as one picture: a row per clip, a few of its frames, its caption above."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from opensora.errors import UsageError


def save_contact_sheet(
    path: Path,
    clips: Sequence[Tensor],
    labels: Sequence[str],
    *,
    columns: int = 2,
    frames: int = 6,
    scale: int = 1,
) -> None:
    """Write a contact sheet as png.

    Args:
        path: File to write; its folder is made.
        clips: uint8 [T, H, W, 3] each; sizes may differ.
        labels: One caption a clip.
        columns: Clips side by side.
        frames: Frames shown of each clip, evenly spaced from first to last.
        scale: Whole-number magnification.

    Raises:
        UsageError: `clips` is empty or the file cannot be written.
    """
    from PIL import Image, ImageDraw

    if not clips or len(clips) != len(labels):
        raise UsageError(
            f"a contact sheet needs one label a clip: got {len(clips)} clips, {len(labels)} labels"
        )
    height = max(int(c.shape[1]) for c in clips) * scale
    width = max(int(c.shape[2]) for c in clips) * scale
    text, gap = 14, 4
    cell_width, cell_height = frames * (width + gap) + gap * 2, height + text + gap
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        left, top = (index % columns) * cell_width + gap, (index // columns) * cell_height
        draw.text((left, top + 1), label[: cell_width // 6], fill=(0, 0, 0))
        for k in range(frames):
            t = round(k * (clip.shape[0] - 1) / max(1, frames - 1))
            picture = Image.fromarray(clip[t].numpy())
            picture = picture.resize(
                (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
            )
            sheet.paste(picture, (left + k * (width + gap), top + text))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, optimize=True)
    except OSError as error:
        raise UsageError(
            f"cannot write the contact sheet {path}: {error.strerror or error}"
        ) from error
