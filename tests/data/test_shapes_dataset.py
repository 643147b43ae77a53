"""Check clips of shapes as a dataset: made from their number, encoded once, worded anew."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from opensora.data.batch import Size
from opensora.data.dataset import build_dataset
from opensora.data.shapes import combinations
from opensora.data.shapes_dataset import ShapesDataset, to_model
from opensora.errors import UsageError
from opensora.models.vae.loading import build_vae

CLIPS = [(17, 64, 64, 5), (1, 48, 80, 4)]


def test_entries_state_what_load_gives() -> None:
    dataset = ShapesDataset(CLIPS, pair_share=0.5, fps=(8, 12))
    entries = dataset.entries()
    assert len(entries) == 9
    for index, entry in enumerate(entries):
        size = Size(entry.num_frames, entry.height, entry.width)
        sample = dataset.load(index, size, random.Random(index))
        assert sample.video is not None
        assert sample.video.shape == (3, *size)
        assert sample.fps == (120 if size.frames == 1 else entry.fps)
        assert sample.text
    assert {entry.fps for entry in entries[:5]} <= {8.0, 12.0}


def test_a_clip_depends_on_its_number_and_its_words_on_the_draw() -> None:
    one, other = (ShapesDataset(CLIPS, pair_share=0.5) for _ in range(2))
    size = Size(17, 64, 64)
    first = one.load(3, size, random.Random(0))
    again = other.load(3, size, random.Random(1))
    assert first.video is not None
    assert again.video is not None
    assert torch.equal(first.video, again.video)
    assert len({one.load(3, size, random.Random(i)).text for i in range(20)}) > 10
    assert not torch.equal(first.video, one.load(4, size, random.Random(0)).video)


def test_held_out_combinations_stay_held_out() -> None:
    dataset = ShapesDataset([(17, 64, 64, 400)], pair_share=0.5)
    seen = set(combinations("seen"))
    pairs = 0
    for index in range(400):
        found = dataset.scene(index)
        scenes = found if isinstance(found, tuple) else (found,)
        pairs += len(scenes) - 1
        assert all((s.shape, s.colour, s.motion) in seen for s in scenes)
    assert 150 < pairs < 250


@pytest.mark.parametrize("alone", [False, True])
def test_latents_are_encoded_once_and_kept(tmp_path: Path, alone: bool) -> None:
    vae, _ = build_vae({"type": "VideoAutoencoderPipeline"}, source="tiny")
    dataset = build_dataset(
        {"type": "ShapesDataset", "clips": [(17, 64, 64, 2)], "first_frame_alone": alone}
    )
    assert isinstance(dataset, ShapesDataset)
    dataset.prepare(vae, "digest", tmp_path)
    stamp = (tmp_path / "17x64x64.safetensors").stat().st_mtime_ns
    sample = dataset.load(1, Size(17, 64, 64), random.Random(0))
    assert sample.video is None
    assert sample.latent is not None
    clip = ShapesDataset([(17, 64, 64, 2)]).load(1, Size(17, 64, 64), random.Random(0)).video
    assert clip is not None
    with torch.no_grad():
        z = vae.encode(clip[None], sample=False)[0]
        first = vae.encode(clip[None, :, :1], sample=False)[0]
    near = {"atol": 0.05, "rtol": 0.05}  # encoded in bfloat16, kept in float16
    torch.testing.assert_close(sample.latent[:, 1:], z[:, 1:], **near)
    torch.testing.assert_close(sample.latent[:, :1], first if alone else z[:, :1], **near)
    again = ShapesDataset([(17, 64, 64, 2)], first_frame_alone=alone)
    again.prepare(vae, "digest", tmp_path)
    assert (tmp_path / "17x64x64.safetensors").stat().st_mtime_ns == stamp
    again = ShapesDataset([(17, 64, 64, 2)], first_frame_alone=alone)
    again.prepare(vae, "another", tmp_path)
    assert (tmp_path / "17x64x64.safetensors").stat().st_mtime_ns != stamp


def test_what_cannot_be_is_refused() -> None:
    for settings in ({"clips": []}, {"clips": [(17, 64, 64)]}, {"pair_share": 2}, {"fps": ()}):
        with pytest.raises(UsageError):
            ShapesDataset(**settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="bucket_config"):
        ShapesDataset(CLIPS).load(0, Size(17, 80, 80), random.Random(0))


def test_pixels_map_to_the_model_and_its_axes() -> None:
    clip = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    clip[..., 1] = 255
    x = to_model(clip)
    assert x.shape == (3, 2, 4, 6)
    assert x[1].unique().tolist() == [1.0]
    assert x[0].unique().tolist() == [-1.0]
