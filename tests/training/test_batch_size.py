"""Check the search of batch sizes and the memory model behind its first guess."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from opensora.errors import DoesNotFitError, UsageError
from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.models.stdit.parallelize import set_checkpointing
from opensora.training.batch_size import (
    OutOfMemory,
    frames_of,
    search,
    search_buckets,
)
from opensora.training.memory import MemoryModel, estimate, saved_bytes, timed_step


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Leave out what only real tensors need and takes long."""
    monkeypatch.setattr(gc, "collect", lambda: None)


def device_with(room: int, calls: list[int] | None = None, seconds: float = 1.0):
    """Return a try_batch of a device that takes `room` samples."""

    def try_batch(size: int) -> float:
        if calls is not None:
            calls.append(size)
        if size > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 0.5 + seconds * size

    return try_batch


def test_the_largest_that_fits_is_found_from_any_guess():
    for room in (1, 2, 3, 17, 63, 64, 65, 100):
        for start in (1, 2, 16, 50, 100):
            calls: list[int] = []
            found = search(device_with(room, calls), start, 100)
            assert found.batch_size == room, (room, start)
            assert len(calls) == len(set(calls)) <= 2 * math.log2(100) + 2


def test_a_good_guess_needs_few_tries():
    calls: list[int] = []
    search(device_with(40, calls), 38, 4096)
    assert len(calls) <= 8


def test_nothing_fits():
    found = search(device_with(0), 8)
    assert found.batch_size == 0
    assert math.isnan(found.seconds)
    assert set(found.tried.values()) == {None}


def test_the_step_time_nearest_to_the_goal_is_found():
    for goal, best in ((4.4, 4), (4.6, 4), (5.2, 5), (0.1, 1), (100.0, 20)):
        found = search(device_with(20), 3, 50, step_time=goal)
        assert found.batch_size == best, goal
        assert found.seconds == 0.5 + best


def test_bounds_are_kept():
    calls: list[int] = []
    assert search(device_with(100, calls), 30, 40, lowest=20).batch_size == 40
    assert search(device_with(100, calls), 30, 40, lowest=20, step_time=3.0).batch_size == 20
    assert min(calls) >= 20
    assert max(calls) <= 40
    with pytest.raises(UsageError, match="no size between"):
        search(device_with(1), 1, 3, lowest=4)


def test_other_failures_are_not_taken_for_memory():
    def broken(size):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        search(broken, 4)


TOKENS = {("144p", 1): 200, ("144p", 51): 3000, ("512", 408): 120_000, ("2048", 1): 10**6}


def measure(resolution: str, frames: int, batch: int) -> float:
    tokens = TOKENS[resolution, frames] * batch
    if tokens > 500_000:
        raise OutOfMemory
    return tokens / 10_000


def test_buckets_get_the_step_time_of_the_base():
    config = {"144p": {1: (475, 300), 51: (51, 40)}, "512": {408: (2, 3)}, "2048": {1: (5, 0)}}
    result = search_buckets(config, measure, base=("512", "16s"))
    assert result.step_time == 48.0  # four of the base fit
    assert result.bucket_config == {
        "144p": {1: 775, 51: 91},  # the end of the range: 2400 and 160 would be better
        "512": {408: 4},
        "2048": {1: 0},
    }
    assert "does not fit" in result.table()
    assert config["512"][408] == (2, 3)


def test_a_given_step_time_needs_no_base():
    config = {"144p": {1: (475, 300), 51: (41, 20)}, "512": {408: (1, 0)}}
    result = search_buckets(config, measure, base_step_time=12)
    assert result.bucket_config == {"144p": {1: 600, 51: 40}, "512": {408: 1}}
    one = search_buckets(config, measure, base_step_time=12, resolution="512")
    assert one.bucket_config == {**config, "512": {408: 1}}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, UsageError, "base_step_time = 12"),
        ({"base": ("512", "51")}, UsageError, "no 512 with 51 frames"),
        ({"base": ("2048", 1)}, DoesNotFitError, "grad_checkpoint"),
        ({"base_step_time": 1, "resolution": "240p"}, UsageError, "not in bucket_config"),
        ({"bucket_config": {"144p": {1: (1.0,)}}}, UsageError, r"expected \(guess, range\)"),
    ],
)
def test_wrong_searches_are_named(settings, error, message):
    config = {"512": {408: (1, 0)}, "2048": {1: (5, 0)}}
    with pytest.raises(error, match=message):
        search_buckets(**{"bucket_config": config, "measure": measure, **settings})


def test_lengths_have_names():
    assert [frames_of(v) for v in ("image", "2s", "408", 51)] == [1, 51, 408, 51]
    with pytest.raises(UsageError, match="no number of frames"):
        frames_of("long")


def small(ratio: float, policy: str, frames: int) -> int:
    """Return what a small model keeps for its backward."""
    config = STDiT3Config(
        hidden_size=64, depth=3, num_heads=2, caption_channels=16, model_max_length=8,
        mlp_ratio=ratio,
    )  # fmt: skip
    model = STDiT3(config)
    set_checkpointing(model, policy)
    one = torch.ones(1)
    x, y = torch.randn(1, 4, frames, 16, 16), torch.randn(1, 1, 8, 16)
    size = {"fps": one, "height": 64 * one, "width": 64 * one}
    return saved_bytes(lambda: model(x, one, y, **size), model.parameters())


@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_the_memory_model_counts_what_autograd_keeps(ratio):
    config = STDiT3Config(hidden_size=64, depth=3, num_heads=2, mlp_ratio=ratio)
    tensor = 64 * 4  # bytes of a token
    for policy in ("none", "every-2", "first-1", "full"):
        counted = MemoryModel.fit([(f * 64, small(ratio, policy, f)) for f in (4, 8)])
        guess = estimate(config, 0, checkpointing=policy, dtype=torch.float32)
        # What autograd does not keep: gradients, and the block that is recomputed.
        apart = 3 + (0 if policy == "none" else 13 + 2 * ratio)
        assert guess.per_token - apart * tensor == pytest.approx(counted.per_token, rel=0.07)


def test_policies_keep_less_and_less():
    config = STDiT3Config()
    order = ("none", "first-8", "ops", "every-2", "full")
    bytes_ = [estimate(config, 0, checkpointing=policy).per_token for policy in order]
    assert bytes_ == pytest.approx(sorted(bytes_, reverse=True))
    with pytest.raises(UsageError, match="checkpointing 'al' is unknown"):
        estimate(config, 0, checkpointing="al")


def test_the_published_model_fits_as_many_samples_as_its_configurations_say():
    config, parameters = STDiT3Config(), 1_207_643_936
    model = estimate(config, parameters, checkpointing="full", shards=8)
    # 512 px of 408 frames, 122,880 tokens: upstream trains one at a time on 80 GB, with T5 and VAE.
    assert 1 <= model.batch_size(80e9, 122_880) <= 4
    none = estimate(config, parameters, shards=8)
    assert none.batch_size(80e9, 122_880) == 0
    assert none.batch_size(80e9, 13_800) >= 1


def test_a_line_is_fitted_through_measured_steps():
    model = MemoryModel.fit([(100, 1100.0), (200, 1200.0), (300, 1300.0)])
    assert model.bytes(1000) == pytest.approx(2000)
    assert model.batch_size(2000, 100, reserve=0) == 10
    assert model.batch_size(900, 100) == 0
    with pytest.raises(ValueError, match="two different sizes"):
        MemoryModel.fit([(100, 1.0), (100, 2.0)])


def test_memory_beyond_the_limit_of_a_cpu_is_out_of_memory():
    cpu = torch.device("cpu")

    def step(mebibytes: int):
        return lambda: torch.ones(mebibytes * 2**18).sum()

    seconds, peak = timed_step(step(1), cpu)
    assert 0 < seconds < 1
    timed_step(step(1), cpu, limit=peak + 2**27)
    with pytest.raises(OutOfMemory, match="were used"):
        timed_step(step(256), cpu, limit=peak + 2**27)
