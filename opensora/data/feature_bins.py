"""Read feature files of Open-Sora's scripts/misc/extract_feat.py: {index:08}.bin.

Each is a pickled list of dicts {x, text, fps, height, width, num_frames[, y, mask]} of clips of one
size, and makes one batch. Pickles are read by torch's weights-only reader, which runs no code.
"""

from __future__ import annotations

import pickle
import random
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.data.batch import Entry, Sample, SampleError, Size
from opensora.data.quarantine import UnreadableError
from opensora.data.sampler import PlannedBatch
from opensora.errors import UsageError

_KEYS = ("x", "fps", "height", "width", "num_frames")


class BatchFeatureDataset:
    """Read clips of .bin files; the clips of a file always make a batch together.

    Args:
        data_path: folder of the files, or one file.
        load_text_features: give text states where they are stored; False gives captions.

    Attributes:
        problems: row -> why its file cannot be read; such a file counts as one row.

    Raises:
        UsageError: there are no files, or none can be read.
    """

    def __init__(
        self, data_path: str | Path | None = None, *, load_text_features: bool = True
    ) -> None:
        if data_path is None:
            raise UsageError("no folder of .bin files was given; set dataset.data_path")
        path = Path(data_path)
        self.files = sorted(path.glob("**/*.bin")) if path.is_dir() else [path]
        if not self.files or not self.files[0].is_file():
            raise UsageError(f"{data_path} holds no .bin files; extract_feat.py makes them")
        self.load_text_features = load_text_features
        self.problems: dict[int, str] = {}
        self._open: OrderedDict[Path, list[dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._places: list[tuple[Path, int]] = []
        self._batches: list[PlannedBatch] = []
        for file in self.files:
            self._list(file)
        if len(self.problems) == len(self._entries):
            raise UsageError(
                f"none of the .bin files can be read; {next(iter(self.problems.values()))}"
            )

    def _list(self, file: Path) -> None:
        """Add the rows of a file; tensors stay on the disk."""
        first = len(self._entries)
        try:
            clips = _read(file)
            sizes = [_size(clip) for clip in clips]
            rates = [_number(clip["fps"]) for clip in clips]
            if len(set(sizes)) != 1:
                raise SampleError(
                    f"{file.name} holds clips of {len(set(sizes))} sizes, expected one"
                )
        except SampleError as error:
            self.problems[first] = str(error)
            self._entries.append(Entry(file.name, 0, 0, 0))
            self._places.append((file, 0))
            return
        for place, (size, fps) in enumerate(zip(sizes, rates, strict=True)):
            self._entries.append(Entry(f"{file.name}:{place}", *size, fps))
            self._places.append((file, place))
        rows = tuple(range(first, len(self._entries)))
        name = f"{file.name} {sizes[0].width}x{sizes[0].height} {sizes[0].frames}"
        self._batches.append(PlannedBatch(name, sizes[0], rows))

    def entries(self) -> Sequence[Entry]:
        """List the clips of all files; a file that cannot be read is one with 0 frames."""
        return self._entries

    def sampler(self, **settings: Any) -> FileSampler:
        """Plan one batch a file; settings as for `FileSampler`."""
        return FileSampler(self._batches, **settings)

    def check(
        self,
        vae: str | None = None,
        text_encoder: str | None = None,
        clean_captions: bool | None = None,
    ) -> None:
        """Do nothing: these files do not say what made them."""

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        """Read a row; see `opensora.data.batch.Dataset`."""
        if index in self.problems:
            raise UnreadableError(self.problems[index])
        file, place = self._places[index]
        clip = self._clips(file)[place]
        if _size(clip) != Size(*size):
            raise SampleError(f"stored at {tuple(_size(clip))}, not at {tuple(size)}")
        latent = clip["x"]
        latent = (latent[0] if latent.ndim == 5 and len(latent) == 1 else latent).float().clone()
        if latent.ndim != 4 or not latent.isfinite().all():
            raise SampleError(f"x must be finite, [C, t, h, w], got {list(latent.shape)}")
        text = clip.get("text")
        text = text[0] if isinstance(text, list | tuple) and text else text
        states = None
        if self.load_text_features and isinstance(clip.get("y"), Tensor):
            states = unpack(clip["y"], clip.get("mask"))
        return Sample(latent=latent, text=str(text or ""), states=states, fps=_number(clip["fps"]))

    def _clips(self, file: Path) -> list[dict[str, Any]]:
        """Return a file's clips; the last files stay mapped, for the other rows of their batch."""
        with self._lock:
            clips = self._open.pop(file, None)
            if clips is None:
                clips = _read(file)
            self._open[file] = clips
            if len(self._open) > 4:
                self._open.popitem(last=False)
            return clips


class FileSampler:
    """Plan whole files: shuffle them by seed + epoch, give every replica equally many.

    Args:
        batches: one of every file.
        seed, replicas, shuffle, drop_last: as for `opensora.data.sampler.BatchSampler`.
        batch_size, bucket_config: accepted; a file is a batch as it is.
    """

    def __init__(
        self,
        batches: Sequence[PlannedBatch],
        *,
        batch_size: int | None = None,
        bucket_config: Mapping[Any, Any] | None = None,
        seed: int = 1024,
        replicas: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if replicas < 1:
            raise UsageError(f"replicas must be at least 1, got {replicas}")
        self.batches, self.seed, self.replicas = list(batches), seed, replicas
        self.shuffle, self.drop_last = shuffle, drop_last

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """List the batches of an epoch; see `opensora.data.sampler.Sampler`."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        planned = [self.batches[i] for i in order] if self.shuffle else self.batches
        return list(islice(cycle(planned), self.length(epoch)))

    def length(self, epoch: int) -> int:
        """Return the number of batches of an epoch: the same for all."""
        extra = len(self.batches) % self.replicas
        if not extra:
            return len(self.batches)
        return len(self.batches) - extra + (0 if self.drop_last else self.replicas)


def unpack(y: Tensor, mask: Any = None) -> Tensor:
    """Return text states [L, D] without padding.

    Args:
        y: [L, D], with axes of length 1 before.
        mask: of the L tokens, 1 where one counts; or their number, of packed states. None: all.

    Raises:
        SampleError: the two do not go together.
    """
    states = y.reshape(-1, y.shape[-1])
    if mask is None:
        return states.clone()
    seen = torch.as_tensor(mask).flatten()
    if seen.numel() == len(states) and (len(states) != 1 or int(seen[0]) == 1):
        return states[seen != 0]
    if seen.numel() == 1 and 0 <= int(seen[0]) <= len(states):
        return states[: int(seen[0])].clone()
    raise SampleError(f"text states {list(y.shape)} do not go with a mask {list(seen.shape)}")


def _read(file: Path) -> list[dict[str, Any]]:
    """Read a file's dicts, the tensors mapped.

    Raises:
        SampleError: it is damaged, holds code, or is no list of features.
    """
    try:
        with file.open("rb") as opened:
            mapped = opened.read(2) == b"PK"  # older files of torch cannot be mapped
        clips = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "nsupported" in str(error):
            raise UnreadableError(
                f"{file} holds Python objects besides tensors and numbers, which can run code and "
                "are never loaded"
            ) from error
        raise UnreadableError(f"{file} is damaged: {_first(error)}") from error
    except Exception as error:
        # Damaged bytes are instructions to the unpickler: nearly any type can come out of it.
        raise UnreadableError(f"{file} is damaged: {_first(error)}") from error
    if not isinstance(clips, list) or not clips:
        raise UnreadableError(f"{file} is no list of features")
    for clip in clips:
        missing = [key for key in _KEYS if not isinstance(clip, dict) or key not in clip]
        if missing or not isinstance(clip["x"], Tensor):
            raise UnreadableError(f"{file} lacks {', '.join(missing) or 'tensors x'}")
    return clips


def _size(clip: Mapping[str, Any]) -> Size:
    return Size(*(int(_number(clip[key])) for key in ("num_frames", "height", "width")))


def _number(value: Any) -> float:
    try:
        return float(value.flatten()[0] if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UnreadableError(f"{value!r} is no number") from error


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
