"""Test the order of batches: Open-Sora's, resumable anywhere, equal shares."""

from __future__ import annotations

from itertools import islice

import pytest

from opensora.data.batch import Entry, Size
from opensora.data.buckets import Buckets
from opensora.data.sampler import BatchSampler, FixedSampler, locate, steps
from opensora.errors import UsageError

CONFIG = {"144p": {1: (1.0, 3), 17: (0.6, 2)}, "240p": {17: (0.5, 2)}}


def entries(count: int) -> list[Entry]:
    shapes = [(30, 240, 426), (1, 144, 256), (40, 144, 256), (5, 144, 256)]
    return [Entry(str(i), *shapes[i * 7 % 5 % 4]) for i in range(count)]


def sampler(count: int = 60, **settings: object) -> BatchSampler:
    return BatchSampler(entries(count), Buckets(CONFIG), **settings)  # type: ignore[arg-type]


def test_any_cursor_gives_the_remaining_batches() -> None:
    # Epochs differ in length, for buckets draw anew.
    lengths = [sampler().length(epoch) for epoch in range(4)]
    assert len(set(lengths)) > 1
    whole = list(steps(sampler(), 0, epochs=4))
    assert [step.number for step in whole] == list(range(sum(lengths)))
    for first in range(len(whole) + 1):
        assert list(steps(sampler(), first, epochs=4)) == whole[first:]
    assert list(islice(steps(sampler(), 5), 20)) == whole[5:25]
    assert list(steps(sampler(), len(whole) + 3, epochs=4)) == []


def test_cursor_names_its_epoch() -> None:
    plan = sampler()
    first = plan.length(0)
    assert locate(plan, first - 1) == (0, 0)
    assert locate(plan, first) == (1, first)


def test_replicas_get_equally_many_different_rows() -> None:
    plan = sampler(200, replicas=3).epoch(0)
    assert plan
    assert len(plan) % 3 == 0
    rows = [index for batch in plan for index in batch.indices]
    assert len(set(rows)) == len(rows)


def test_replicas_change_nothing_but_the_end() -> None:
    one, four = sampler(200).epoch(2), sampler(200, replicas=4).epoch(2)
    assert one[: len(four)] == four
    assert len(one) - len(four) < 4


def test_padding_fills_every_batch_and_replica() -> None:
    plan = sampler(31, replicas=4, drop_last=False)
    batches = plan.epoch(0)
    assert len(batches) % 4 == 0
    sizes = {b.name: plan.buckets.batch_size(b) for b in plan.groups(0)}
    assert all(len(batch.indices) == sizes[batch.bucket] for batch in batches)
    placed = {index for rows in plan.groups(0).values() for index in rows}
    assert {index for batch in batches for index in batch.indices} == placed


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 12])
def test_fixed_size_counts_its_batches(count: int, replicas: int, drop_last: bool) -> None:
    rows = [Entry(str(i), 20, 48, 64) for i in range(count)] + [Entry("short", 9, 48, 64)]
    plan = FixedSampler(rows, Size(16, 32, 32), 3, replicas=replicas, drop_last=drop_last)
    for epoch in (0, 1):
        assert plan.length(epoch) == len(plan.epoch(epoch))
        assert all(len(b.indices) == 3 and count not in b.indices for b in plan.epoch(epoch))
    if count == 12:
        assert plan.epoch(0) != plan.epoch(1)


@pytest.mark.parametrize("epochs", [None, 1, 3])
def test_no_batch_at_all_is_an_error(epochs: int | None) -> None:
    for first in (0, 5):
        with pytest.raises(UsageError, match="hold no batch"):
            next(steps(FixedSampler([], Size(16, 32, 32), 3), first, epochs))


def test_an_epoch_that_is_empty_by_chance_is_passed_over() -> None:
    rows = [Entry("0", 60, 144, 256)]
    plan = BatchSampler(rows, Buckets({"144p": {17: (0.2, 1)}}))
    lengths = [plan.length(epoch) for epoch in range(40)]
    assert lengths[0] == 0
    assert 3 < sum(lengths) < 20
    whole = list(steps(plan, 0, epochs=40))
    assert [step.number for step in whole] == list(range(sum(lengths)))
    assert [step.epoch for step in whole] == [e for e, length in enumerate(lengths) if length]
    for first in range(len(whole) + 1):
        assert list(steps(plan, first, epochs=40)) == whole[first:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"replicas": 0}, "replicas"), ({"frame_interval": 0}, "frame_interval")],
)
def test_rejects_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler(**settings)
