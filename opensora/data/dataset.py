"""Datasets by the names of configurations: tables of videos and images with their captions.

dataset = dict(type="VariableVideoTextDataset", data_path="meta.csv", frame_interval=2)
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora.config_file import suggest
from opensora.data import transforms
from opensora.data.batch import Dataset, Entry, Sample, SampleError, Size
from opensora.data.feature_bins import BatchFeatureDataset
from opensora.data.feature_npz import NpzFeatures
from opensora.data.features import CachedFeatures, with_text_features
from opensora.data.image import is_image, read_image
from opensora.data.probe import Facts, probe_table
from opensora.data.quarantine import UnreadableError
from opensora.data.shapes_dataset import ShapesDataset
from opensora.data.table import read_table
from opensora.data.video import read_frames
from opensora.data.video_index import index_of
from opensora.errors import UsageError
from opensora.sizes import get_num_frames

#: Frames per second that an image is said to have, and a video of which nothing is known.
IMAGE_FPS, DEFAULT_FPS = 120.0, 24.0


class VariableVideoTextDataset:
    """Read clips of a table at whatever size a bucket asks for.

    Args:
        data_path: csv or parquet; see `opensora.data.table`.
        root: folder of relative paths; the table's if None.
        transform_name: "resize_crop".
        frame_interval: step between the frames that are read.
        strict_buckets: sort clips into buckets exactly as Open-Sora does; see
            `opensora.data.buckets`.
        probe_cache: file that remembers what was found in media files, for tables that do not say.

    Raises:
        UsageError: the table or a setting cannot be used.
    """

    #: The one size of all clips, where there is one.
    size: Size | None = None
    _transforms: tuple[str, ...] = ("resize_crop",)

    def __init__(
        self,
        data_path: str | Path | None = None,
        *,
        root: str | Path | None = None,
        transform_name: str | None = "resize_crop",
        frame_interval: int = 1,
        strict_buckets: bool = True,
        probe_cache: str | Path | None = None,
    ) -> None:
        if data_path is None:
            raise UsageError(
                "no table of clips was given; set dataset.data_path or use --data-path meta.csv"
            )
        self.frame_interval = _positive("frame_interval", frame_interval)
        self.transform = transforms.check_name(transform_name or "resize_crop", self._transforms)
        self.strict_buckets = strict_buckets
        self.table = read_table(data_path, root)
        self.facts, self.problems = probe_table(self.table, probe_cache)
        self._entries = [
            Entry(self.table.name(row), *(facts or Facts(0, 0, 0, 0.0)))
            for row, facts in zip(self.table.rows, self.facts, strict=True)
        ]

    def entries(self) -> Sequence[Entry]:
        """List all rows; those that could not be probed have 0 frames."""
        return self._entries

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        """Read a row; see `opensora.data.batch.Dataset`."""
        row, entry = self.table.rows[index], self._entries[index]
        if index in self.problems:
            raise UnreadableError(self.problems[index])
        text = row.text or ""
        if is_image(row.path):
            image = read_image(row.path)
            return Sample(
                video=transforms.clip_of_image(image, size, self.transform),
                text=text,
                fps=IMAGE_FPS,
            )
        known = index_of(row.path)
        if known.count < 0.9 * entry.num_frames - 2:
            # Tables count by duration x fps: a few frames more or less are no sign of damage.
            raise UnreadableError(
                f"the table says {entry.num_frames} frames, the file holds {known.count}"
            )
        if known.count < size.frames:
            raise SampleError(f"{size.frames} frames are wanted, the file holds {known.count}")
        interval = self.frame_interval
        start = rng.randint(0, transforms.last_start(known.count, size.frames, interval))
        wanted = transforms.frame_indices(known.count, size.frames, interval, start)
        return Sample(
            video=transforms.clip_of_frames(read_frames(row.path, wanted), size, self.transform),
            text=text,
            fps=(entry.fps or known.fps or DEFAULT_FPS) // interval,
        )


class VideoTextDataset(VariableVideoTextDataset):
    """Read clips of a table at one size; images are repeated to the length of a clip.

    Args:
        num_frames: a number, or a name such as "2s".
        image_size: (height, width) in pixels.
        transform_name: "center" (squares) or "resize_crop".
        data_path, root, frame_interval, probe_cache: as for `VariableVideoTextDataset`.
    """

    _transforms = transforms.NAMES

    def __init__(
        self,
        data_path: str | Path | None = None,
        *,
        num_frames: int | str | None = None,
        image_size: Sequence[int] | None = None,
        root: str | Path | None = None,
        transform_name: str | None = "center",
        frame_interval: int = 1,
        probe_cache: str | Path | None = None,
    ) -> None:
        if num_frames is None or image_size is None:
            raise UsageError(
                "VideoTextDataset needs num_frames and image_size, as in num_frames=16, "
                "image_size=(256, 256); VariableVideoTextDataset takes them from bucket_config"
            )
        sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        if len(sides) != 2:
            raise UsageError(f"image_size must be (height, width), got {image_size!r}")
        height, width = (_positive("image_size", side) for side in sides)
        self.size = Size(get_num_frames(num_frames), height, width)
        super().__init__(
            data_path,
            root=root,
            transform_name=transform_name or "center",
            frame_interval=frame_interval,
            probe_cache=probe_cache,
        )
        if self.transform == "center" and height != width:
            raise UsageError(
                f"transform_name 'center' makes squares, image_size is {height}x{width} (height x "
                "width); use transform_name='resize_crop'"
            )


#: Name of a configuration's `dataset.type` -> what builds it of the other keys.
DATASETS: dict[str, Callable[..., Dataset]] = {
    "VariableVideoTextDataset": VariableVideoTextDataset,
    "VideoTextDataset": VideoTextDataset,
    "ShapesDataset": ShapesDataset,
    "CachedFeatures": CachedFeatures,
    "BatchFeatureDataset": BatchFeatureDataset,
    "NpzFeatures": NpzFeatures,
    "WithTextFeatures": with_text_features,
}


def build_dataset(settings: Mapping[str, Any]) -> Dataset:
    """Build the dataset of a configuration's `dataset` section.

    Raises:
        UsageError: an unknown type or key, or a value that cannot be used.
    """
    rest = dict(settings)
    name = rest.pop("type", "VariableVideoTextDataset")
    build = DATASETS.get(name) if isinstance(name, str) else None
    if build is None:
        raise UsageError(
            f"unknown dataset type {name!r}{suggest(str(name), DATASETS)} (known: "
            f"{', '.join(DATASETS)})"
        )
    keys = [key for key in inspect.signature(build).parameters if key != "self"]
    for key in rest:
        if key not in keys:
            raise UsageError(
                f"dataset {name} has no setting {key!r}{suggest(str(key), keys)} (known: "
                f"{', '.join(keys)})"
            )
    return build(**rest)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"dataset: {name} must be a whole number of at least 1, got {value!r}")
    return value
