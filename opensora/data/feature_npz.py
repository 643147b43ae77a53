"""Read MindONE's caches: npz files of latents and of text states, one of each for every video.

    LATENTS/clips/a.npz              latent_mean, latent_std [F, C, h, w] unscaled, fps, ori_size
    LATENTS/latent_256x448/clips/a.npz    the same at several sizes
    TEXTS/clips/a.npz                mask [L], text_emb [L, D]

The files are named after the paths of a table (`video,caption`). numpy reads them without pickle.
"""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.data.batch import Entry, Sample, SampleError, Size
from opensora.data.feature_bins import unpack
from opensora.data.feature_sampler import StoredSampler
from opensora.data.features import normal
from opensora.data.quarantine import UnreadableError
from opensora.data.table import read_table
from opensora.errors import UsageError

#: MindONE stores what the 2D VAE gave; its training multiplies by this.
SCALE = 0.18215
#: Frames per second of files that do not say, and of images.
DEFAULT_FPS, IMAGE_FPS = 24.0, 120.0
_BY_SIZE = re.compile(r"latent_(\d+)x(\d+)")


class NpzFeatures:
    """Read a table's rows from npz caches.

    Args:
        data_path: csv of `video,caption`; see `opensora.data.table`.
        vae_latent_folder: of the latents; one that holds folders latent_{h}x{w} offers each row at
            each of these sizes.
        text_embed_folder: of the text states; None gives captions.
        num_frames: frames of a sample, cut out of longer latents at a random place. None: all.
        frame_interval: step between these frames.
        random_latents: draw mean + std * noise where both are stored; False takes the mean.
        vae_factor: pixels per latent pixel.

    Attributes:
        problems: row -> why it cannot be read.

    Raises:
        UsageError: a folder or the table is missing, or no row has latents.
    """

    def __init__(
        self,
        data_path: str | Path,
        vae_latent_folder: str | Path,
        *,
        text_embed_folder: str | Path | None = None,
        num_frames: int | None = None,
        frame_interval: int = 1,
        random_latents: bool = True,
        vae_factor: int = 8,
    ) -> None:
        if frame_interval < 1 or (num_frames is not None and num_frames < 1):
            raise UsageError("num_frames and frame_interval must be at least 1")
        self.num_frames, self.frame_interval = num_frames, frame_interval
        self.random_latents, self.factor = random_latents, vae_factor
        self.texts = None if text_embed_folder is None else _folder(text_embed_folder)
        latents = _folder(vae_latent_folder)
        by_size = [p for p in sorted(latents.iterdir()) if _BY_SIZE.fullmatch(p.name)]
        table = read_table(data_path, check_files=False)
        self.problems: dict[int, str] = {}
        self._rows: list[tuple[Path, str, dict[Size, Path]]] = []
        self._entries: list[Entry] = []
        for index, row in enumerate(table.rows):
            path = row.path.relative_to(table.root)
            files: dict[Size, Path] = {}
            fps = 0.0
            try:
                for folder in by_size or [latents]:
                    file = _find(folder, path)
                    if file is not None:
                        size, fps = self._size(file)
                        files[size] = file
                if not files:
                    raise UnreadableError(f"{latents} has no latents of {path}")
                if self.texts is not None and _find(self.texts, path) is None:
                    raise UnreadableError(f"{self.texts} has no text states of {path}")
            except SampleError as error:
                self.problems[index] = str(error)
                files = {}
            self._rows.append((path, row.text or "", files))
            self._entries.append(Entry(table.name(row), *max(files, default=Size(0, 0, 0)), fps))
        if len(self.problems) == len(self._rows):
            raise UsageError(f"no row can be read: {next(iter(self.problems.values()))}")

    def entries(self) -> Sequence[Entry]:
        """List the rows, with their largest size; those without files have 0 frames."""
        return self._entries

    def sizes(self) -> list[list[Size]]:
        """Return the stored sizes of every row."""
        return [list(files) for _, _, files in self._rows]

    def sampler(self, **settings: Any) -> StoredSampler:
        """Plan batches of the stored sizes; settings as for `StoredSampler`."""
        return StoredSampler(self.sizes(), **settings)

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
        path, text, files = self._rows[index]
        if Size(*size) not in files:
            raise SampleError(f"{path} is not stored at {tuple(size)}, only at {sorted(files)}")
        stored = _arrays(files[Size(*size)])
        mean = stored["latent_mean"]
        step = self.frame_interval
        start = rng.randint(0, len(mean) - 1 - (size[0] - 1) * step)
        frames = slice(start, start + (size[0] - 1) * step + 1, step)
        latent = mean[frames].float()
        if self.random_latents and "latent_std" in stored:
            noise = normal(latent.shape, rng.getrandbits(63))
            latent = latent + stored["latent_std"][frames].float() * noise
        if not latent.isfinite().all():
            raise SampleError(f"{files[Size(*size)]} holds NaN or infinity")
        return Sample(
            latent=SCALE * latent.transpose(0, 1).contiguous(),
            text=text,
            states=None if self.texts is None else read_text(_find(self.texts, path) or path),
            fps=IMAGE_FPS if size[0] == 1 else _fps(stored) // step,
        )

    def _size(self, file: Path) -> tuple[Size, float]:
        """Return the size of a row's samples, and its frame rate, from the head of its file."""
        shape = _shape(file, "latent_mean")
        if len(shape) != 4 or 0 in shape:
            raise UnreadableError(f"{file}: latent_mean must be [F, C, h, w], got {list(shape)}")
        frames = self.num_frames or (shape[0] - 1) // self.frame_interval + 1
        if (frames - 1) * self.frame_interval >= shape[0]:
            raise UnreadableError(f"{file} holds {shape[0]} frames, too few for {frames}")
        size = Size(frames, shape[2] * self.factor, shape[3] * self.factor)
        return size, _fps(_arrays(file, "fps"))


def read_text(file: Path) -> Tensor:
    """Return the text states [L, D] of an npz, without padding.

    Raises:
        SampleError: it cannot be read.
    """
    stored = _arrays(file)
    if "text_emb" not in stored:
        raise UnreadableError(f"{file} has no text_emb")
    return unpack(stored["text_emb"], stored.get("mask"))


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise UsageError(f"folder {path} does not exist")
    return Path(path)


def _find(folder: Path, path: Path) -> Path | None:
    """Return the file of a video: its path with .npz in place of its ending, or behind it."""
    candidates = (folder / path.with_suffix(".npz"), folder / f"{path}.npz")
    return next((file for file in candidates if file.is_file()), None)


def _arrays(file: Path, *names: str) -> dict[str, Tensor]:
    """Read arrays of numbers of an npz, all but the tokens if none is named.

    Raises:
        UnreadableError: it is damaged, or one holds Python objects.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            wanted = [n for n in opened.files if (n in names if names else n != "tokens")]
            found = {name: opened[name] for name in wanted}
        return {name: torch.from_numpy(a) for name, a in found.items() if a.dtype.kind in "biuf"}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UnreadableError(f"{file} cannot be read: {error}") from error


def _shape(file: Path, name: str) -> tuple[int, ...]:
    """Return the shape of an array without reading it."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as opened:
            version = np.lib.format.read_magic(opened)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(opened)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UnreadableError(f"{file} cannot be read: {error}") from error
    if dtype.kind != "f":
        raise UnreadableError(f"{file}: {name} holds {dtype}, not floats")
    return tuple(int(n) for n in shape)


def _fps(stored: dict[str, Tensor]) -> float:
    return float(stored["fps"].flatten()[0]) if "fps" in stored else DEFAULT_FPS
