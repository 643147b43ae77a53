"""Check clips of two shapes: drawn apart, worded in few bytes, told apart by the judge."""

from __future__ import annotations

import random

import pytest

from opensora.data.shape_pairs import MOST_BYTES, apart, caption_pair, render_pair, sample_pair
from opensora.data.shapes import COLOURS, combinations, render, sample_scene, track
from opensora.data.shapes_judge import ATTRIBUTES, judge, judge_pair

SIZES = [(17, 64, 64, 8), (17, 48, 80, 8), (34, 64, 64, 8), (17, 96, 96, 12), (2, 80, 48, 8)]


@pytest.mark.parametrize(("frames", "height", "width", "fps"), SIZES)
def test_the_judge_reads_both_shapes_of_a_rendered_pair(
    frames: int, height: int, width: int, fps: float
) -> None:
    rng = random.Random(frames + height)
    names = list(COLOURS)
    for _ in range(12):
        pair = sample_pair(rng, "seen", frames, height, width, fps)
        assert apart(pair, frames, height, width, fps)
        verdicts = judge_pair(render_pair(pair, frames, height, width, fps))
        assert verdicts is not None
        scenes = sorted(pair, key=lambda scene: names.index(scene.colour))
        read = ATTRIBUTES if frames >= 17 else ("shape", "colour", "size", "background")
        for verdict, scene in zip(verdicts, scenes, strict=True):
            assert all(verdict.right(name, getattr(scene, name)) for name in read), verdict


def test_one_shape_is_no_pair_and_two_are_not_one() -> None:
    rng = random.Random(0)
    for _ in range(10):
        assert judge_pair(render(sample_scene(rng))) is None
        assert not judge(render_pair(sample_pair(rng))).present


def test_a_text_fits_the_encoder_and_names_what_it_says() -> None:
    rng = random.Random(1)
    for _ in range(300):
        pair = sample_pair(rng)
        text, names = caption_pair(pair, rng)
        assert len(text.encode()) <= MOST_BYTES
        for scene, stated in zip(pair, names, strict=True):
            assert {"shape", "colour", "motion"} <= set(stated)
            assert ("background" in stated) == ("background" in text)
            assert (scene.shape, scene.colour, scene.motion) in combinations("seen")


def test_a_higher_frame_rate_moves_less_per_frame() -> None:
    scene = sample_scene(random.Random(2), ("circle", "red", "right"))
    slow, fast = (track(scene, 17, 64, 64, fps) for fps in (8, 16))
    step, half = slow[1] - slow[0], fast[1] - fast[0]
    assert half[0] == pytest.approx(float(step[0]) / 2, rel=1e-3)
