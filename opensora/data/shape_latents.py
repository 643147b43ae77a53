"""Encode clips of moving shapes once and serve their latents with freshly worded captions.

The VAE runs once per clip; every training step then only words captions anew. Clip i of a bucket is
made from the seed and i alone, so scenes are not stored, only latents.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.data.shapes import Scene, caption, combinations, render, sample_scene
from opensora.models.vae import VideoAutoencoder


@dataclass(frozen=True)
class Bucket:
    """Describe clips of one size.

    Attributes:
        num_frames, height, width: Size in frames and pixels.
        num_clips: Clips encoded.
        batch_size: Clips a training step takes.
        weight: How often the bucket is drawn, relative to the others.
    """

    num_frames: int
    height: int
    width: int
    num_clips: int
    batch_size: int
    weight: float

    @property
    def name(self) -> str:
        """Name the bucket by its size."""
        return f"{self.num_frames}x{self.height}x{self.width}"


def scene_of(bucket: Bucket, seed: int, index: int) -> Scene:
    """Make the scene of clip `index`: the seen combinations in turn, everything else at random."""
    rng = random.Random(f"{seed}/{bucket.name}/{index}")
    seen = combinations("seen")
    if bucket.num_frames == 1:  # a picture has no motion
        seen = [triple for triple in seen if triple[2] == "still"]
    return sample_scene(rng, seen[index % len(seen)])


class ShapeLatents:
    """Serve (latents, captions) of one bucket.

    Args:
        bucket: What to encode.
        vae: Encodes the clips if `folder` does not hold their latents already.
        folder: Where the latents are kept.
        seed: Makes the scenes.
        digest: Identifies the VAE's weights; latents of other weights are encoded anew.
        size_share: Share of full captions that state the size.
    """

    def __init__(
        self,
        bucket: Bucket,
        vae: VideoAutoencoder,
        folder: Path,
        seed: int,
        digest: str,
        size_share: float = 0.4,
    ) -> None:
        self.bucket, self.seed, self.size_share = bucket, seed, size_share
        path = folder / f"latents-{bucket.name}.safetensors"
        key = json.dumps([digest, seed, bucket.num_clips])
        if path.exists():
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                known = (file.metadata() or {}).get("key") == key
            if known:
                self.latents = load_file(path)["z"]
                return
        self.latents = self._encode(vae)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"z": self.latents}, path, {"key": key})

    @torch.no_grad()
    def _encode(self, vae: VideoAutoencoder) -> Tensor:
        from opensora.train_shapes_vae import to_model

        bucket, parts, started = self.bucket, [], time.monotonic()
        size = max(1, 32 * 17 * 64 * 64 // (bucket.num_frames * bucket.height * bucket.width))
        for start in range(0, bucket.num_clips, size):
            stop = min(start + size, bucket.num_clips)
            clips = [
                render(
                    scene_of(bucket, self.seed, i), bucket.num_frames, bucket.height, bucket.width
                )
                for i in range(start, stop)
            ]
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(
                    vae.encode(to_model(torch.stack(clips)), sample=False).to(torch.float16)
                )
            if start // size % 20 == 0:
                left = (time.monotonic() - started) / stop * (bucket.num_clips - stop)
                print(
                    f"encoding {bucket.name}: {stop}/{bucket.num_clips}, {left:.0f} s left",
                    flush=True,
                )
        return torch.cat(parts).contiguous()

    def batch(self, rng: random.Random) -> tuple[Tensor, list[str]]:
        """Draw one batch: latents float32 [B, C, T', H', W'] and B captions."""
        indices: Sequence[int] = [
            rng.randrange(self.bucket.num_clips) for _ in range(self.bucket.batch_size)
        ]
        scenes = [scene_of(self.bucket, self.seed, i) for i in indices]
        captions = [word(scene, self.bucket, rng, self.size_share) for scene in scenes]
        return self.latents[indices].float(), captions


def word(scene: Scene, bucket: Bucket, rng: random.Random, size_share: float = 0.4) -> str:
    """Word a scene; one caption in twelve leaves something out, pictures leave the motion out."""
    if bucket.num_frames == 1 or rng.random() < 1 / 24:
        return f"{rng.choice(('a ', ''))}{scene.colour} {scene.shape}"
    if rng.random() < 1 / 23:
        still = scene.motion == "still"
        moving = "that does not move" if still else f"moving {scene.motion.replace('-', ' and ')}"
        return f"a {rng.choice((scene.colour + ' shape', scene.shape))} {moving}"
    return caption(scene, rng, size_share)[0]
