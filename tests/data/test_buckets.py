"""Test bucket decisions over tables, and the variants that differ from Open-Sora's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from opensora.data.buckets import BucketId, Buckets
from opensora.data.draws import first_two, words_of
from opensora.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_table_is_decided_over_as_its_rows_are(stage: int, strict: bool) -> None:
    config = json.loads((GOLDEN / f"bucket_stage{stage}.json").read_text())["config"]
    buckets, rng = Buckets(config, strict=strict), np.random.default_rng(stage)
    lengths, sides = [0, 1, 51, 52, 103, 205, 410, 700], [120, 144, 240, 426, 720, 1080, 1920]
    shapes = np.stack([rng.choice(lengths, 400), *rng.choice(sides, (2, 400))], 1)
    for interval, seed, epoch in ((1, 42, 0), (3, 2**33 + 5, 7)):
        expected: dict[BucketId, list[int]] = {}
        for row, shape in enumerate(shapes.tolist()):
            if shape[0] == 0:
                continue
            chosen = buckets.choose(*shape, interval, buckets.seed(seed, epoch, row))
            if chosen is not None:
                expected.setdefault(chosen, []).append(row)
        got = buckets.choose_all(shapes, interval, seed, epoch)
        assert list(got.items()) == list(expected.items())


def test_draws_are_numpys() -> None:
    rng = np.random.default_rng(0)
    for limit in (10, 2**32, 2**62):
        seeds = rng.integers(0, limit, 50)
        first, second = first_two(words_of(seeds, 50))
        for row, seed in enumerate(seeds.tolist()):
            draws = np.random.default_rng(seed)
            assert (draws.random(), draws.random()) == (first[row], second[row])
    with pytest.raises(ValueError, match="at most 4 words"):
        first_two(words_of(seeds, 50) * 3)


def test_a_clip_of_exactly_the_frames_fits_only_if_not_strict() -> None:
    config = {"144p": {51: (1.0, 8)}}
    strict, fixed = Buckets(config), Buckets(config, strict=False)
    assert strict.choose(51, 144, 256) is None
    assert strict.choose(52, 144, 256) == ("144p", 51, "0.56")
    assert fixed.choose(51, 144, 256) == ("144p", 51, "0.56")
    assert fixed.choose(50, 144, 256) is None
    # 51 frames at a step of 3 span 151.
    assert strict.choose(153, 144, 256, 3) is None
    assert strict.choose(154, 144, 256, 3) is not None
    assert fixed.choose(151, 144, 256, 3) is not None
    assert fixed.choose(150, 144, 256, 3) is None


def test_every_bucket_takes_what_it_says_it_needs() -> None:
    for strict in (True, False):
        buckets = Buckets({"144p": {17: (1.0, 8)}}, strict=strict)
        for interval in (1, 2, 5):
            needed = buckets.needed(17, interval)
            assert buckets.choose(needed, 144, 256, interval) is not None
            assert buckets.choose(needed - 1, 144, 256, interval) is None


def test_draws_of_epochs_are_independent_if_not_strict() -> None:
    config = {"240p": {51: (0.5, 1)}, "144p": {51: (0.5, 1)}}
    strict, fixed = Buckets(config), Buckets(config, strict=False)

    def places(buckets: Buckets, epoch: int) -> list[str | None]:
        chosen = [buckets.choose(60, 240, 426, 1, buckets.seed(7, epoch, i)) for i in range(300)]
        return [c.resolution if c else None for c in chosen]

    # Open-Sora: who is kept in the second bucket in one epoch is kept in the first in the next.
    second = [name == "144p" for name in places(strict, 0)]
    first = [name == "240p" for name in places(strict, 1)]
    assert all(b for a, b in zip(second, first, strict=True) if a)
    second = [name == "144p" for name in places(fixed, 0)]
    first = [name == "240p" for name in places(fixed, 1)]
    kept = sum(b for a, b in zip(second, first, strict=True) if a) / sum(second)
    assert 0.3 < kept < 0.7
    assert 110 < sum(name == "240p" for name in places(fixed, 0)) < 190


def test_images_take_a_pair_of_probabilities() -> None:
    buckets = Buckets({"144p": {1: ((1.0, 0.3), 4)}})
    kept = sum(buckets.choose(1, 144, 256, 1, seed) is not None for seed in range(400))
    assert 80 < kept < 160


def test_an_entry_of_probability_0_catches_clips() -> None:
    buckets = Buckets({"240p": {51: (0.0, None)}, "144p": {51: (1.0, 2)}})
    assert buckets.choose(60, 240, 426) == ("144p", 51, "0.56")
    assert Buckets({"240p": {51: [0.0, 0]}}).choose(60, 240, 426) is None


def test_reasons_name_every_resolution() -> None:
    buckets = Buckets({"720p": {51: (1.0, 1)}, "240p": {1: (1.0, 1)}, "144p": {51: (0.0, None)}})
    why: list[str] = []
    assert buckets.choose(60, 240, 426, why=why) is None
    assert why == [
        "426x240 is too small for 720p (at least 737280 pixels)",
        "240p: takes images alone",
        "144p: not kept, probability 0 of 51 frames",
    ]
    why.clear()
    buckets.choose(51, 720, 1280, why=why)
    assert why[0] == "720p: 51 frames are too few (at least 52 for 51)"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "must be a dict that is not empty"),
        ({"144": {51: (1.0, 2)}}, "unknown resolution '144'; did you mean 144p"),
        ({"144p": {}}, "must be a dict"),
        ({"144p": {"x": (1.0, 2)}}, "'x' is no number of frames"),
        ({"144p": {51: 2}}, r"\(keep probability, batch size\)"),
        ({"144p": {51: (1.5, 2)}}, "1.5 is no probability"),
        ({"144p": {51: ((1.0, 2), 2)}}, "2 is no probability"),
        ({"144p": {51: (1.0, 0)}}, "a batch size of 0 needs the keep probability 0"),
        ({"144p": {51: (1.0, None)}}, "a batch size of None needs the keep probability 0"),
        ({"144p": {51: (1.0, 2.5)}}, "2.5 is no batch size"),
    ],
)
def test_rejects_what_cannot_be(config: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Buckets(config)
