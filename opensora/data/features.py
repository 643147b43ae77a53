"""Read features of rows instead of clips: latents, text states, or text states beside pixels."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.data.batch import Dataset, Entry, Sample, SampleError, Size
from opensora.data.feature_sampler import StoredSampler
from opensora.data.feature_shards import FeatureRow, read_rows, read_settings
from opensora.errors import UsageError


class CachedFeatures:
    """Read rows of a folder that scripts/misc/extract_feat.py made.

    A clip that is stored at several sizes is one row; `sampler` draws one of them every epoch.

    Args:
        data_path: the folder.
        random_latents: draw every latent anew, mean + std * noise, from the sample's generator;
            False takes the mean. Folders of drawn latents have nothing to draw.
        load_text_features: give text states where they are stored; False gives captions.

    Raises:
        UsageError: it is no such folder, or holds no latents.
    """

    def __init__(
        self,
        data_path: str | Path | None = None,
        *,
        random_latents: bool = True,
        load_text_features: bool = True,
    ) -> None:
        if data_path is None:
            raise UsageError("no folder of features was given; set dataset.data_path")
        self.folder = Path(data_path)
        self.settings = read_settings(self.folder)
        self.random_latents, self.load_text_features = random_latents, load_text_features
        rows: dict[str, dict[Size, FeatureRow]] = {}
        for row in read_rows(self.folder):
            if row.size.frames:
                rows.setdefault(row.name, {})[row.size] = row
        if not rows:
            raise UsageError(f"{self.folder} holds no latents; make some, or remove it")
        self._rows = list(rows.values())
        self._shards = Shards(self.folder)

    def entries(self) -> Sequence[Entry]:
        """List the rows, with their largest size."""
        largest = [max(row.values(), key=lambda r: r.size) for row in self._rows]
        return [Entry(row.name, *row.size, row.fps) for row in largest]

    def sizes(self) -> list[list[Size]]:
        """Return the stored sizes of every row."""
        return [list(row) for row in self._rows]

    def sampler(self, **settings: Any) -> StoredSampler:
        """Plan batches of the stored sizes; settings as for `StoredSampler`."""
        return StoredSampler(self.sizes(), **settings)

    def check(
        self,
        vae: str | None = None,
        text_encoder: str | None = None,
        clean_captions: bool | None = None,
    ) -> None:
        """Refuse features of other models than the run's; None is not compared.

        Args:
            vae: digest of its weights, `opensora.checkpoint.weights_digest`.
            text_encoder: likewise.
            clean_captions: whether the run cleans captions.

        Raises:
            UsageError: they are of another VAE, text encoder or cleaning.
        """
        if not self.load_text_features:
            text_encoder = clean_captions = None
        check_models(self.folder, self.settings, vae=vae, text_encoder=text_encoder)
        check_cleaning(self.folder, self.settings, clean_captions)

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        """Read a row; see `opensora.data.batch.Dataset`."""
        row = self._rows[index].get(Size(*size))
        if row is None:
            held = ", ".join(f"{s.frames}x{s.height}x{s.width}" for s in self._rows[index])
            raise SampleError(
                f"stored at {held} (frames x height x width), not at {size[0]}x{size[1]}x{size[2]}"
            )
        text = ("text",) if self.load_text_features else ()
        found = self._shards.read(row, "mean", "std", "latent", *text)
        latent = found.get("mean", found.get("latent"))
        if latent is None:
            raise SampleError(f"{row.shard} has no latent for it")
        latent = latent.float()
        if "std" in found and self.random_latents:
            latent = latent + found["std"].float() * normal(latent.shape, rng.getrandbits(63))
        if not latent.isfinite().all():
            raise SampleError(f"its latent in {row.shard} holds NaN or infinity")
        return Sample(latent=latent, text=row.text, states=found.get("text"), fps=row.fps)


class TextFeatures:
    """Look captions up whose text states are stored.

    Args:
        data_path: folder that scripts/misc/extract_feat.py made.

    Raises:
        UsageError: it is no such folder, or holds no text states.
    """

    def __init__(self, data_path: str | Path) -> None:
        self.folder = Path(data_path)
        self.settings = read_settings(self.folder)
        if self.settings.get("text_encoder") is None:
            raise UsageError(f"{self.folder} holds no text states; extract with save_text_features")
        self._rows = {_digest(row.text): row for row in read_rows(self.folder)}
        self._shards = Shards(self.folder)

    def __len__(self) -> int:
        return len(self._rows)

    def states(self, text: str) -> Tensor:
        """Return the states [L, D] of a caption as it stands in the table.

        Raises:
            SampleError: it is not there.
        """
        row = self._rows.get(_digest(text))
        found = {} if row is None else self._shards.read(row, "text")
        if "text" not in found:
            raise SampleError(f"{self.folder} has no states of the text {text[:60]!r}")
        return found["text"]

    def check(
        self,
        vae: str | None = None,
        text_encoder: str | None = None,
        clean_captions: bool | None = None,
    ) -> None:
        """Refuse states of another text encoder; see `CachedFeatures.check`."""
        check_models(self.folder, self.settings, text_encoder=text_encoder)
        check_cleaning(self.folder, self.settings, clean_captions)


class WithTextFeatures:
    """Give the samples of a dataset text states from a folder, instead of their captions.

    Args:
        dataset: gives captions with pixels or latents.
        features: the folder, or what reads it.
    """

    def __init__(self, dataset: Dataset, features: str | Path | TextFeatures) -> None:
        self.dataset = dataset
        self.features = features if isinstance(features, TextFeatures) else TextFeatures(features)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def entries(self) -> Sequence[Entry]:
        """List the dataset's rows."""
        return self.dataset.entries()

    def check(
        self,
        vae: str | None = None,
        text_encoder: str | None = None,
        clean_captions: bool | None = None,
    ) -> None:
        """Refuse features of other models; see `CachedFeatures.check`."""
        self.features.check(text_encoder=text_encoder, clean_captions=clean_captions)
        inner = getattr(self.dataset, "check", None)
        if inner is not None:
            inner(vae=vae)

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        """Read a row of the dataset and look its caption up."""
        sample = self.dataset.load(index, size, rng)
        sample.states = self.features.states(sample.text or "")
        return sample


def with_text_features(dataset: Mapping[str, Any], features: str | Path) -> WithTextFeatures:
    """Build a `WithTextFeatures` of a configuration's `dataset` section and a folder."""
    from opensora.data.dataset import build_dataset

    return WithTextFeatures(build_dataset(dataset), features)


def check_models(folder: Path, settings: Mapping[str, Any], **digests: str | None) -> None:
    """Compare digests of weights with those that features were made with; None is not compared.

    Raises:
        UsageError: names the part, and what to do.
    """
    for part, digest in digests.items():
        made = settings.get(part)
        if digest is not None and made is not None and made != digest:
            name = part.replace("_", " ").replace("vae", "VAE")
            was = settings.get("sources", {}).get(part, "unknown")
            raise UsageError(
                f"{folder}: these features are of another {name} ({was}, {made[:19]}...) than the "
                f"run's ({digest[:19]}...); extract them again, or name that {name} in the "
                "configuration"
            )


def check_cleaning(folder: Path, settings: Mapping[str, Any], wanted: bool | None) -> None:
    """Compare how captions were cleaned with how the run cleans them; None is not compared.

    Raises:
        UsageError: prompts of the run, and later ones, would not be what the model learns from.
    """
    made = settings.get("clean_captions")
    if None not in (made, wanted) and made != wanted:
        raise UsageError(
            f"{folder}: these text states are of captions with clean_captions={made}, the run has "
            f"clean_captions={wanted}; extract them again, or set clean_captions={made}"
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class Shards:
    """Read tensors of rows; safe to use from several threads.

    A few files are mapped at a time, and what is returned is a copy: memory does not grow with
    what was read.

    Args:
        folder: of the shards.
        opened: how many files stay mapped.
    """

    def __init__(self, folder: str | Path, opened: int = 8) -> None:
        self.folder, self.limit = Path(folder), opened
        self._files: OrderedDict[str, tuple[Any, frozenset[str]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: FeatureRow, *names: str) -> dict[str, Tensor]:
        """Return those tensors of a row that are there.

        Raises:
            SampleError: the shard is gone or damaged.
        """
        try:
            with self._lock:
                file, keys = self._open(row.shard)
                found = [name for name in names if f"{row.place}.{name}" in keys]
                return {name: file.get_tensor(f"{row.place}.{name}").clone() for name in found}
        except (OSError, SafetensorError) as error:
            raise SampleError(f"{self.folder / row.shard} cannot be read: {error}") from error

    def _open(self, shard: str) -> tuple[Any, frozenset[str]]:
        entry = self._files.pop(shard, None)
        if entry is None:
            file: Any = safe_open(self.folder / shard, framework="pt")
            entry = file, frozenset(file.keys())
        self._files[shard] = entry
        if len(self._files) > self.limit:
            self._files.popitem(last=False)
        return entry


def normal(shape: torch.Size, seed: int) -> Tensor:
    """Draw standard normal values, float32, from a seed of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
