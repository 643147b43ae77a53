"""Find the batch sizes that fit, and that give all buckets of a run the same step time.

Processes wait for the slowest of a step, and buckets are drawn independently: batch sizes are good
when every bucket's step takes as long. As upstream's search: the base bucket gets the largest batch
that fits and its step time is the goal of all others, unless the goal is given in seconds. Unlike
upstream's a batch may take a little longer than the goal if it is nearer to it than the next one.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from opensora.errors import DoesNotFitError, UsageError

#: Names of clip lengths in configurations.
_FRAMES = {"image": 1, "2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816}


class OutOfMemory(Exception):  # noqa: N818  what a try says, not a failure
    """Say that a batch did not fit; for limits other than a GPU's own."""


@dataclass(frozen=True)
class Found:
    """Hold the result of a search.

    Attributes:
        batch_size: the best; 0 if not even the lowest fits.
        seconds: of its step; NaN for batch size 0.
        tried: batch size -> seconds, None where it did not fit.
    """

    batch_size: int
    seconds: float
    tried: dict[int, float | None] = field(default_factory=dict)


def search(
    try_batch: Callable[[int], float],
    start: int = 1,
    limit: int = 4096,
    *,
    lowest: int = 1,
    step_time: float | None = None,
) -> Found:
    """Find the largest batch that fits, or the one whose step time is nearest to a goal.

    Doubles or halves from `start` until the answer is enclosed, then bisects. Each size is tried
    once. Assumes that larger batches take more memory and more time.

    Args:
        try_batch: runs a step or a few and returns the seconds of one; raises `OutOfMemory` or
            torch's OutOfMemoryError. Among several processes it must come to the same end on all:
            the slowest's seconds, and `OutOfMemory` everywhere if one had none left.
        start: first guess.
        limit: largest size to try.
        lowest: smallest size to try.
        step_time: goal, seconds; None: the largest that fits.

    Raises:
        UsageError: lowest <= limit does not hold.
    """
    if not 1 <= lowest <= limit:
        raise UsageError(f"batch-size search: no size between {lowest} and {limit}")
    tried: dict[int, float | None] = {}

    def low_enough(size: int) -> bool:
        if size not in tried:
            tried[size] = _try(try_batch, size)
        seconds = tried[size]
        return seconds is not None and (step_time is None or seconds <= step_time)

    # Invariant: `below` is low enough (or lowest - 1), `above` is not (or limit + 1).
    below, above = lowest - 1, limit + 1
    size = min(max(start, lowest), limit)
    while below + 1 < above:
        if low_enough(size):
            below = size
            size = min(2 * size, limit) if above == limit + 1 else (below + above) // 2
        else:
            above = size
            size = max(size // 2, lowest) if below == lowest - 1 else (below + above) // 2
    fitting = {n: seconds for n, seconds in tried.items() if seconds is not None}
    if not fitting:
        return Found(0, math.nan, tried)
    if step_time is None:
        best = max(fitting)
    else:
        best = min(fitting, key=lambda n: (abs(fitting[n] - step_time), n))
    return Found(best, fitting[best], tried)


def _try(try_batch: Callable[[int], float], size: int) -> float | None:
    try:
        return try_batch(size)
    except (OutOfMemory, torch.cuda.OutOfMemoryError):
        pass
    # Outside the handler: the exception's frames hold the tensors of the failed step.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


#: Measures a step: (resolution, frames, batch size) -> seconds, raising as `try_batch` does.
Measure = Callable[[str, int, int], float]


@dataclass(frozen=True)
class BucketSearch:
    """Hold the batch sizes found for buckets.

    Attributes:
        bucket_config: {resolution: {frames: batch size}}, what was searched replaced.
        step_time: the goal, seconds.
        found: (resolution, frames) -> result.
    """

    bucket_config: dict[str, dict[int, Any]]
    step_time: float
    found: dict[tuple[str, int], Found]

    def table(self) -> str:
        """Return a line a bucket, resolution, frames, batch size and step time."""
        lines = ["resolution  frames  batch size  step time"]
        for (resolution, frames), result in self.found.items():
            time = "does not fit" if math.isnan(result.seconds) else f"{result.seconds:.2f} s"
            lines.append(f"{resolution:>10}  {frames:>6}  {result.batch_size:>10}  {time:>9}")
        return "\n".join(lines)


def search_buckets(
    bucket_config: Mapping[str, Mapping[int, tuple[int, int]]],
    measure: Measure,
    *,
    base: tuple[str, str | int] | None = None,
    base_step_time: float | None = None,
    resolution: str | None = None,
) -> BucketSearch:
    """Search the batch size of every bucket, as upstream's `scripts/misc/search_bs.py`.

    Args:
        bucket_config: {resolution: {frames: (guess, range)}}; sizes from guess - range to
            guess + range are searched, at least 1.
        measure: see `Measure`.
        base: (resolution, frames) of the bucket that sets the goal; frames may be "4s".
        base_step_time: the goal, seconds; None: that of the base bucket's largest batch.
        resolution: search only this one's buckets.

    Raises:
        UsageError: neither base nor base_step_time, a base that is no bucket, or a wrong value.
        DoesNotFitError: the base bucket does not fit.
    """
    ranges = {
        (name, frames): _range(name, frames, value)
        for name, lengths in bucket_config.items()
        if resolution in (None, name)
        for frames, value in lengths.items()
    }
    if not ranges:
        raise UsageError(
            f"resolution {resolution!r} is not in bucket_config ({', '.join(bucket_config)})"
        )
    found: dict[tuple[str, int], Found] = {}
    if base_step_time is None:
        if base is None:
            raise UsageError('set base = ("512", "408") or base_step_time = 12')
        key = (str(base[0]), frames_of(base[1]))
        if key not in ranges:
            raise UsageError(f"base: bucket_config has no {key[0]} with {key[1]} frames")
        found[key] = _search(measure, key, ranges.pop(key), None)
        if not found[key].batch_size:
            raise DoesNotFitError(
                f"base: not one sample of {key[0]} with {key[1]} frames fits; choose a smaller "
                "base, or set grad_checkpoint = True"
            )
        base_step_time = found[key].seconds
    for key, bounds in ranges.items():
        found[key] = _search(measure, key, bounds, base_step_time)
    result: dict[str, dict[int, Any]] = {n: dict(lengths) for n, lengths in bucket_config.items()}
    for (name, frames), one in found.items():
        result[name][frames] = one.batch_size
    return BucketSearch(result, base_step_time, found)


def frames_of(value: str | int) -> int:
    """Return the frames of a length given as a number, digits or a name ("image", "4s")."""
    if isinstance(value, int):
        return value
    if value in _FRAMES:
        return _FRAMES[value]
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{value!r} is no number of frames ({', '.join(_FRAMES)})") from None


def _search(
    measure: Measure, key: tuple[str, int], bounds: tuple[int, int, int], goal: float | None
) -> Found:
    guess, low, high = bounds
    return search(lambda n: measure(*key, n), guess, high, lowest=low, step_time=goal)


def _range(resolution: str, frames: int, value: Any) -> tuple[int, int, int]:
    """Return the guess and the bounds of a bucket's search."""
    try:
        guess, around = (int(number) for number in value)
    except (TypeError, ValueError):
        guess, around = 0, 0
    if guess < 1 or around < 0:
        raise UsageError(
            f"bucket_config of a search: {resolution} {frames}: expected (guess, range) such as "
            f"(8, 4), got {value!r}"
        )
    return guess, max(guess - around, 1), guess + around
