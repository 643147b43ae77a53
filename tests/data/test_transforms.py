"""Test resizing, cropping and the choice of frames against Open-Sora's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opensora.data import transforms
from opensora.data.batch import Size
from opensora.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = load_file(GOLDEN / "transforms.safetensors")
CASES = {0: (32, 56), 2: (40, 40)}


@pytest.mark.parametrize("case", CASES)
def test_video_transforms_are_those_recorded(case: int) -> None:
    frames = RECORDED[f"in.clip{case}"]
    got = transforms.resize_crop(frames, *CASES[case])
    torch.testing.assert_close(got, RECORDED[f"out.resize_crop{case}"], atol=1e-6, rtol=0)
    got = transforms.center(frames, 24)
    torch.testing.assert_close(got, RECORDED[f"out.ucf24_{case}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_image_transforms_are_those_recorded(case: int) -> None:
    image = Image.fromarray(RECORDED[f"in.img{case}"].numpy())
    # The recording's note: within 1, by the version of Pillow.
    got = transforms.resize_crop_image(image, *CASES[case])
    assert np.abs(got.astype(int) - RECORDED[f"out.pil_resize_crop{case}"].numpy()).max() <= 1
    got = transforms.center_image(image, 24)
    assert np.abs(got.astype(int) - RECORDED[f"out.pil_center24_{case}"].numpy()).max() <= 1


def test_clips_are_transformed_whole_and_normalised() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 33, 71, 3), dtype=np.uint8)
    clip = transforms.clip_of_frames(iter(frames), Size(3, 20, 40), "resize_crop")
    whole = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    expected = (transforms.resize_crop(whole, 20, 40) - 0.5) / 0.5
    assert clip.shape == (3, 3, 20, 40)
    torch.testing.assert_close(clip.transpose(0, 1), expected)
    same = transforms.clip_of_frames(iter(frames), Size(3, 33, 71), "resize_crop")
    torch.testing.assert_close(same.transpose(0, 1), whole * 2 - 1)
    image = transforms.clip_of_image(Image.fromarray(frames[0]), Size(2, 33, 71), "resize_crop")
    torch.testing.assert_close(image, (whole[:1] * 2 - 1).transpose(0, 1).expand(3, 2, 33, 71))


def test_frames_are_those_recorded() -> None:
    for case in json.loads((GOLDEN / "temporal_random_crop.json").read_text()):
        if not isinstance(case["frames"], list):
            assert case["total"] < case["num_frames"]
            continue
        total, frames, interval = (case[k] for k in ("total", "num_frames", "frame_interval"))
        # Open-Sora's last start is one before ours.
        last = max(0, total - frames * interval - 1)
        start = random.Random(case["seed"]).randint(0, last)
        assert transforms.frame_indices(total, frames, interval, start) == case["frames"]


@pytest.mark.parametrize(("total", "frames", "interval"), [(17, 17, 1), (20, 17, 1), (40, 5, 3)])
def test_every_start_is_valid_and_the_last_frame_is_reached(
    total: int, frames: int, interval: int
) -> None:
    seen = set()
    for start in range(transforms.last_start(total, frames, interval) + 1):
        indices = transforms.frame_indices(total, frames, interval, start)
        assert len(indices) == frames
        assert indices == sorted(set(indices))
        seen.update(indices)
    assert {0, total - 1} <= seen
    assert max(seen) == total - 1


def test_a_clip_of_just_the_span_is_read_at_its_step() -> None:
    assert transforms.frame_indices(33, 17, 2, 0) == list(range(0, 33, 2))


def test_unknown_names_are_errors() -> None:
    with pytest.raises(UsageError, match="did you mean resize_crop"):
        transforms.check_name("resize-crop")
