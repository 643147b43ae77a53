"""Check the procedural clips, their captions, their splits, and the judge that reads them."""

from __future__ import annotations

import random

import pytest
import torch

from opensora.data import shape_captions, shapes
from opensora.data.shapes_judge import ATTRIBUTES, judge


def scenes(num: int, seed: int = 0) -> list[shapes.Scene]:
    """Draw scenes that go through all combinations."""
    rng = random.Random(seed)
    triples = shapes.combinations("all")
    return [shapes.sample_scene(rng, triples[i * 11 % len(triples)]) for i in range(num)]


def test_splits_partition_all_combinations():
    parts = [set(shapes.combinations(name)) for name in ("seen", "triple", "pair")]
    assert [len(part) for part in parts] == [196, 38, 18]
    assert set.union(*parts) == set(shapes.combinations("all"))
    assert sum(map(len, parts)) == 4 * 7 * 9


def test_every_two_attributes_of_a_held_out_triple_are_seen_together():
    seen = shapes.combinations("seen")
    for triple in shapes.combinations("triple"):
        for left, right in ((0, 1), (0, 2), (1, 2)):
            assert any(t[left] == triple[left] and t[right] == triple[right] for t in seen)


def test_held_out_pairs_are_never_seen():
    pairs = {(shape, colour) for shape, colour, _ in shapes.combinations("seen")}
    assert not pairs & set(shapes.HELD_OUT_PAIRS)


@pytest.mark.parametrize("size", [(17, 64, 64), (17, 48, 80), (34, 96, 64), (2, 128, 128)])
def test_clip_has_the_requested_size_and_the_shape_stays_inside(size):
    frames, height, width = size
    for scene in scenes(12):
        clip = shapes.render(scene, *size)
        assert clip.shape == (frames, height, width, 3)
        assert clip.dtype == torch.uint8
        background = torch.tensor(scene.background_rgb).round().to(torch.int)
        border = torch.cat([clip[:, 0], clip[:, -1]], 1).to(torch.int)
        assert (border - background).abs().max() <= 1


def test_window_and_chosen_frames_equal_the_whole_clip():
    scene = scenes(1)[0]
    whole = shapes.render(scene)
    part = shapes.render(scene, window=(10, 20, 32, 24), only=[3, 16])
    assert torch.equal(part, whole[[3, 16], 10:42, 20:44])


def test_edges_are_anti_aliased():
    clip = shapes.render(scenes(1)[0], only=[0])
    assert len(torch.unique(clip.reshape(-1, 3), dim=0)) > 10


def test_track_moves_as_told_and_turns_back_in_long_clips():
    for scene in scenes(60):
        track = shapes.track(scene, 17, 64, 64)
        expected = torch.tensor(shapes.MOTIONS[scene.motion]) * scene.distance
        assert torch.allclose(track[-1] - track[0], expected, atol=1e-3)
        longer = shapes.track(scene, 200, 64, 64)
        assert longer.min() > 0
        assert longer.max() < 64
        assert torch.allclose(longer[:17], track, atol=1e-3)


def test_captions_name_what_they_say_they_name():
    rng = random.Random(3)
    texts = set()
    for scene in scenes(600):
        text, names = shape_captions.caption(scene, rng)
        texts.add(text)
        assert {"shape", "colour", "motion"} <= set(names)
        words = {
            "background": (scene.background, "grey"),
            "size": shape_captions._SIZE_WORDS[scene.size],
        }
        for name, options in words.items():
            assert (name in names) == any(
                option in text.replace("up-", "") for option in options
            ), text
        assert len(text.encode()) < 120
        assert text == text.lower()
    assert len(texts) > 590


def test_judge_reads_rendered_truth():
    wrong = []
    for scene in scenes(252, seed=5):
        verdict = judge(shapes.render(scene))
        if not all(verdict.right(name, getattr(scene, name)) for name in ATTRIBUTES):
            wrong.append((scene, verdict))
    assert len(wrong) <= 2, wrong  # at least 99 % right


@pytest.mark.parametrize("size", [(17, 48, 80), (34, 96, 96), (17, 128, 64)])
def test_judge_reads_other_sizes(size):
    for scene in scenes(40, seed=6):
        verdict = judge(shapes.render(scene, *size))
        assert all(verdict.right(name, getattr(scene, name)) for name in ATTRIBUTES), (
            scene,
            verdict,
        )


def test_judge_is_at_chance_on_shuffled_captions():
    drawn = scenes(252, seed=7)
    verdicts = [judge(shapes.render(scene)) for scene in drawn]
    others = drawn[83:] + drawn[:83]
    right = {
        name: sum(v.right(name, getattr(s, name)) for v, s in zip(verdicts, others, strict=True))
        / 252
        for name in ("shape", "colour", "motion")
    }
    chance = {"shape": 1 / 4, "colour": 1 / 7, "motion": 1 / 9}
    for name, rate in right.items():
        assert rate < chance[name] + 0.08, right
    together = sum(
        all(v.right(name, getattr(s, name)) for name in chance)
        for v, s in zip(verdicts, others, strict=True)
    )
    assert together <= 1  # chance: one in 252


def _spoil(clip: torch.Tensor, how: str) -> torch.Tensor:
    clip = clip.clone()
    if how == "missing":
        clip[8] = clip[8, 0, 0]
    elif how == "jump":
        clip[9:] = clip[9:].roll(24, dims=2)
    elif how == "growing":
        clip[12:, 20:60, 10:50] = 255 - clip[12:, 0, 0][:, None, None]
    elif how == "noise":
        clip = torch.randint(0, 256, clip.shape, generator=torch.Generator().manual_seed(0)).to(
            torch.uint8
        )
    elif how == "blank":
        clip[:] = 128
    elif how == "black":
        clip[:] = 0
    return clip


@pytest.mark.parametrize("how", ["missing", "jump", "growing", "noise", "blank", "black"])
def test_judge_refuses_clips_without_a_steady_object(how):
    rng = random.Random(1)
    for _ in range(8):
        scene = shapes.sample_scene(rng, ("circle", "red", "still"))
        verdict = judge(_spoil(shapes.render(scene), how))
        assert not verdict.present
        assert verdict.reason
        assert not verdict.right("colour", verdict.colour)


def test_contact_sheet_is_written(tmp_path):
    from PIL import Image

    path = tmp_path / "new" / "sheet.png"
    assert shapes.main(["--output", str(path), "--num", "4"]) == 0
    with Image.open(path) as picture:
        assert picture.width > 6 * 64
        assert picture.height >= 2 * 64
