"""Serve clips of moving shapes as training data: made from their number alone, encoded once.

    dataset = dict(type="ShapesDataset", clips=[(17, 64, 64, 14336), (1, 64, 64, 1024)])

The VAE runs once a clip if `prepare` is called; every reading then only words the caption anew.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.data.batch import Entry, Sample, Size
from opensora.data.shape_captions import caption
from opensora.data.shape_pairs import Pair, caption_pair, render_pair, sample_pair
from opensora.data.shapes import FPS, Scene, combinations, render, sample_scene
from opensora.errors import UsageError
from opensora.files import atomic
from opensora.models.vae import VideoAutoencoder

#: Pixels that the VAE encodes at a time.
_PIXELS = 32 * 17 * 64 * 64


class ShapesDataset:
    """Make clips of one or two shapes; see `opensora.data.shapes` and `shape_pairs`.

    Args:
        clips: (frames, height, width, number of clips) of every size.
        pair_share: share of clips with two shapes.
        fps: frame rates, each as often.
        size_share: share of captions that state the size of the shape.
        seed: makes the scenes.
        first_frame_alone: encode the first frame of a clip by itself as well, and let the clip's
            latent begin with that: norms that span all frames tell the two apart, and a given
            frame comes by itself.

    Raises:
        UsageError: a size that is none.
    """

    #: Clips are as long as their buckets.
    strict_buckets = False

    def __init__(
        self,
        clips: Sequence[Sequence[int]] = ((17, 64, 64, 14336),),
        pair_share: float = 0.0,
        fps: Sequence[float] = (FPS,),
        size_share: float = 0.6,
        seed: int = 42,
        first_frame_alone: bool = False,
    ) -> None:
        if not clips or any(len(entry) != 4 or min(entry) < 1 for entry in clips):
            raise UsageError(
                f"dataset.clips: {clips!r} is no list of (frames, height, width, clips)"
            )
        if not 0 <= pair_share <= 1 or not fps or min(fps) <= 0:
            raise UsageError("dataset: pair_share lies in [0, 1], and every fps is above 0")
        self.sizes = [Size(*entry[:3]) for entry in clips]
        self.ends = list(accumulate(entry[3] for entry in clips))
        self.pair_share, self.fps = pair_share, tuple(float(rate) for rate in fps)
        self.size_share, self.seed = size_share, seed
        self.first_frame_alone = first_frame_alone
        self._latents: list[Tensor] = []

    def entries(self) -> list[Entry]:
        """List all clips."""
        rows = []
        for index in range(self.ends[-1]):
            size, _ = self._place(index)
            fps = 0.0 if size.frames == 1 else self._rate(index)
            rows.append(Entry(f"shapes {index}", *size, fps))
        return rows

    def prepare(self, vae: VideoAutoencoder, digest: str, folder: Path) -> None:
        """Encode all clips, or read their latents if the folder holds them already.

        Args:
            vae: encodes; its weights' device is used.
            digest: identifies the weights; latents of others are encoded anew.
            folder: where latents are kept, a file a size.
        """
        folder.mkdir(parents=True, exist_ok=True)
        start = 0
        for size, stop in zip(self.sizes, self.ends, strict=True):
            path = folder / f"{size.frames}x{size.height}x{size.width}.safetensors"
            made = (self.seed, self.pair_share, self.fps, self.first_frame_alone, start, stop)
            key = json.dumps([digest, *made])
            if not _holds(path, key):
                latents = self._encode(vae, size, start, stop)
                with atomic(path) as partial:
                    save_file({"z": latents}, partial, {"key": key})
            with safe_open(path, "pt") as file:
                self._latents.append(file.get_tensor("z"))
            start = stop

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        """Return a clip with a caption worded by `rng`.

        Raises:
            UsageError: another size than the clip's; it has no pixels to resize.
        """
        own, place = self._place(index)
        if size != own:
            raise UsageError(
                f"shapes {index} is {own.frames} x {own.width}x{own.height}, not {size.frames} x "
                f"{size.width}x{size.height}: give bucket_config the sizes of dataset.clips"
            )
        scene, rate = self.scene(index), self._rate(index)
        sample = Sample(text=self._word(scene, own, rng), fps=120.0 if own.frames == 1 else rate)
        if self._latents:
            sample.latent = self._latents[self.sizes.index(own)][place].float()
        else:
            sample.video = to_model(self._draw(scene, own, rate))
        return sample

    def scene(self, index: int) -> Scene | Pair:
        """Make the scene, or both, of a clip: seen combinations in turn, all else at random."""
        return _scene(self.seed, index, self._place(index)[0], self.pair_share, self._rate(index))

    def _rate(self, index: int) -> float:
        return self.fps[random.Random(f"{self.seed}/fps/{index}").randrange(len(self.fps))]

    def _place(self, index: int) -> tuple[Size, int]:
        """Return a clip's size and its place among the clips of that size."""
        for number, end in enumerate(self.ends):
            if index < end:
                return self.sizes[number], index - (self.ends[number - 1] if number else 0)
        raise IndexError(index)

    def _draw(self, scene: Scene | Pair, size: Size, rate: float) -> Tensor:
        if isinstance(scene, Scene):
            return render(scene, *size, fps=rate)
        return render_pair(scene, *size, fps=rate)

    @torch.no_grad()
    def _encode(self, vae: VideoAutoencoder, size: Size, start: int, stop: int) -> Tensor:
        from opensora.progress import Progress

        step = max(1, _PIXELS // (size.frames * size.height * size.width))
        place = next(vae.parameters())
        parts = []
        micro, vae.micro_batch_size = vae.micro_batch_size, None
        with Progress() as progress:
            report = progress.stage(f"encoding {size.frames}x{size.height}x{size.width}", "clip")
            for first in range(start, stop, step):
                last = min(first + step, stop)
                clips = [self._draw(self.scene(i), size, self._rate(i)) for i in range(first, last)]
                x = torch.stack([to_model(clip) for clip in clips])
                with torch.autocast(place.device.type, torch.bfloat16):
                    z = vae.encode(x.to(place.device), sample=False)
                    if self.first_frame_alone and size.frames > 1:
                        z[:, :, :1] = vae.encode(x[:, :, :1].to(place.device), sample=False)
                parts.append(z.to("cpu", torch.float16))
                report(last - start, stop - start)
        vae.micro_batch_size = micro
        return torch.cat(parts).contiguous()

    def _word(self, scene: Scene | Pair, size: Size, rng: random.Random) -> str:
        """Word a scene; one caption in twelve leaves something out, pictures leave motion out."""
        if not isinstance(scene, Scene):
            if size.frames > 1:
                return caption_pair(scene, rng, self.size_share / 3)[0]
            one, other = (f"{each.colour} {each.shape}" for each in scene)
            return f"a {one} and a {other}"
        if size.frames == 1 or rng.random() < 1 / 24:
            text = f"{rng.choice(('a ', ''))}{scene.colour} {scene.shape}"
            if rng.random() < 0.4:
                text += f" on a {scene.background} background"
            return text
        if rng.random() < 1 / 23:
            still = scene.motion == "still"
            moving = (
                "that does not move" if still else f"moving {scene.motion.replace('-', ' and ')}"
            )
            return f"a {rng.choice((scene.colour + ' shape', scene.shape))} {moving}"
        return caption(scene, rng, self.size_share)[0]


def to_model(clip: Tensor) -> Tensor:
    """Turn uint8 [..., T, H, W, 3] into float32 [..., 3, T, H, W] in [-1, 1]."""
    return clip.movedim(-1, -4).float() / 127.5 - 1


@lru_cache(maxsize=1 << 16)
def _scene(seed: int, index: int, size: Size, pair_share: float, rate: float) -> Scene | Pair:
    """Make a scene; a pair is drawn again until it fits, so it is kept."""
    rng = random.Random(f"{seed}/{size.frames}x{size.height}x{size.width}/{index}")
    if rng.random() < pair_share:
        return sample_pair(rng, "seen", *size, rate)
    seen = combinations("seen")
    if size.frames == 1:  # a picture has no motion
        seen = [triple for triple in seen if triple[2] == "still"]
    return sample_scene(rng, seen[index % len(seen)])


def _holds(path: Path, key: str) -> bool:
    """Tell whether a file of latents is there and was made so."""
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("key") == key
