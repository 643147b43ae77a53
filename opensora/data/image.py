"""Read images, upright and as RGB."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.data.media_file import failure
from opensora.data.quarantine import UnreadableError

if TYPE_CHECKING:
    from PIL import Image

#: Images are told by their suffix.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def is_image(path: Path) -> bool:
    """Tell whether a file's name is an image's."""
    return path.suffix.lower() in SUFFIXES


def read_image(path: Path) -> Image.Image:
    """Return an image as RGB, upright.

    Raises:
        UnreadableError: the file is missing or no whole image.
        SampleError: the storage failed.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits, which RGB would clip
                grey = np.asarray(image).astype(np.float64) / 257
                return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UnreadableError("no image, or of an unknown kind") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise failure(error) from error


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image, upright, without decoding it.

    Raises:
        UnreadableError: the file is missing or no image.
        SampleError: the storage failed.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            height, width = file.height, file.width
            turned = file.getexif().get(0x0112, 1) >= 5
    except UnidentifiedImageError as error:
        raise UnreadableError("no image, or of an unknown kind") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise failure(error) from error
    return (width, height) if turned else (height, width)
