"""Test resizing, cropping and the choice of frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.data import transforms
from opensora.data.batch import Size
from opensora.errors import UsageError


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
