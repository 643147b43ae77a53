"""Choose the bucket of a clip: the resolution, the length and the ratio it is trained at.

    bucket_config = {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27)},
        "256": {1: (0.4, 297), 51: (0.5, None)},
    }

reads: resolution -> frames -> (keep probability, clips a batch). A pair in place of the probability
is (keep probability, probability of trying this length at all). A batch size of None, or 0, goes
with a keep probability of 0: such an entry catches clips so that they do not reach what follows it.

Resolutions are tried from large to small, lengths from long to short. A resolution is passed over
if the clip has fewer than 0.8 of its pixels. The first length that the clip has frames for decides:
if it is not kept there, the next smaller resolution is tried. Images take the length 1 alone.

`strict=False` differs from Open-Sora in two points: a clip of exactly the frames that a bucket
reads fits (Open-Sora wants more than frames x interval), and the draws of an epoch, a row and a
bucket are independent (Open-Sora adds the three up, so that a row's draw for one bucket comes back
in the next epoch for another).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from opensora.config_file import suggest
from opensora.data.batch import Size
from opensora.data.draws import first_two, words_of
from opensora.errors import UsageError
from opensora.sizes import NUM_PIXELS, SIZES, closest_ratio

#: A clip may have this share of a resolution's pixels and still be enlarged to it.
ENLARGE = 0.8


class BucketId(NamedTuple):
    """Name a bucket: a resolution, frames, and a ratio key of opensora.sizes."""

    resolution: str
    frames: int
    ratio: str

    @property
    def name(self) -> str:
        """Return "240p 51 0.56"."""
        return f"{self.resolution} {self.frames} {self.ratio}"

    @property
    def size(self) -> Size:
        """Return frames, height and width."""
        return Size(self.frames, *SIZES[self.resolution][self.ratio])


class Rule(NamedTuple):
    """Hold one entry of a configuration.

    Attributes:
        place: in the order of trial; seeds this entry's draws.
        keep: probability that a clip which fits is taken.
        attempt: probability that this length is tried at all; None where it always is.
        batch_size: clips a batch; 0 where nothing is ever kept.
    """

    place: int
    keep: float
    attempt: float | None
    batch_size: int


class Buckets:
    """Hold a bucket configuration and decide by it.

    Args:
        config: as in the head of this module; lists may stand for tuples.
        strict: decide as Open-Sora does.

    Attributes:
        rules: resolution -> frames -> rule, in the order of trial.
        count: buckets, ratios counted.

    Raises:
        UsageError: an unknown resolution, a length, probability or batch size that cannot be.
    """

    def __init__(self, config: Mapping[Any, Any], *, strict: bool = True) -> None:
        self.strict = strict
        self.rules: dict[str, dict[int, Rule]] = {}
        self.count = index = 0
        named = _check(config)
        # Stable: two names of one pixel count (2880 and 4k) stay in the configuration's order.
        for name in sorted(named, key=lambda key: NUM_PIXELS[key], reverse=True):
            self.rules[name] = {}
            for frames, (keep, attempt, batch_size) in sorted(named[name].items(), reverse=True):
                self.rules[name][frames] = Rule(index, keep, attempt, batch_size)
                index += 1
                self.count += len(SIZES[name])

    def needed(self, frames: int, interval: int) -> int:
        """Return how many frames a clip must have to enter a bucket of `frames`."""
        if frames == 1:
            return 1
        return frames * interval + 1 if self.strict else (frames - 1) * interval + 1

    def batch_size(self, bucket: BucketId) -> int:
        """Return clips a batch."""
        return self.rules[bucket.resolution][bucket.frames].batch_size

    def seed(self, seed: int, epoch: int, index: int) -> int | tuple[int, ...]:
        """Return what `choose` takes for a row of a table in an epoch."""
        if self.strict:
            return seed + epoch + index * self.count
        return seed % 2**32, epoch, index

    def choose_all(
        self,
        shapes: npt.NDArray[np.int64],
        interval: int,
        seed: int,
        epoch: int,
    ) -> dict[BucketId, list[int]]:
        """Return bucket -> rows, as `choose` decides; buckets in the order in which rows meet them.

        Args:
            shapes: frames, height and width of every row, [R, 3]; rows of 0 frames get no bucket.
            interval: step between the frames that are read.
            seed: of the run.
            epoch: zero-based.
        """
        frames, pixels = shapes[:, 0], shapes[:, 1] * shapes[:, 2]
        chosen = np.full(len(shapes), -1)
        free = frames > 0
        numbers = [(name, length) for name, rules in self.rules.items() for length in rules]
        for name, rules in self.rules.items():
            # Rows that no length of this resolution has decided over yet.
            asked = free & (pixels >= ENLARGE * NUM_PIXELS[name])
            for length, rule in rules.items():
                fit = np.flatnonzero(
                    asked
                    & ((frames == 1) == (length == 1))
                    & (frames >= self.needed(length, interval))
                )
                draw = None
                if rule.attempt is not None:
                    tried, draw = self._draw_all(seed, epoch, fit, rule)
                    fit, draw = fit[tried <= rule.attempt], draw[tried <= rule.attempt]
                elif 0 < rule.keep < 1:
                    draw = self._draw_all(seed, epoch, fit, rule)[0]
                asked[fit] = False
                kept = fit if rule.keep >= 1 else fit[:0] if draw is None else fit[draw < rule.keep]
                chosen[kept] = rule.place
                free[kept] = False
        rows = np.flatnonzero(chosen >= 0)
        groups: dict[BucketId, list[int]] = {}
        for place in np.unique(chosen[rows]):
            name, length = numbers[place]
            mine = rows[chosen[rows] == place]
            keys = list(SIZES[name])
            ratios = shapes[mine, 1] / shapes[mine, 2]
            values = np.array([float(key) for key in keys])
            nearest = np.abs(values[None] - ratios[:, None]).argmin(1)
            for number in np.unique(nearest):
                same = mine[nearest == number]
                groups[BucketId(name, length, keys[number])] = same.tolist()
        return dict(sorted(groups.items(), key=lambda group: group[1][0]))

    def _draw_all(
        self, seed: int, epoch: int, rows: npt.NDArray[np.int64], rule: Rule
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the first two draws of rows for a rule."""
        count = len(rows)
        if self.strict:
            return first_two(words_of(seed + epoch + rows * self.count + rule.place, count))
        parts = seed % 2**32, epoch, rows, rule.place
        return first_two([word for part in parts for word in words_of(part, count)])

    def choose(
        self,
        frames: int,
        height: int,
        width: int,
        interval: int = 1,
        seed: int | Sequence[int] = 0,
        why: list[str] | None = None,
    ) -> BucketId | None:
        """Return the bucket of a clip, None if it is dropped.

        Args:
            frames: of the file; 1 is an image.
            height: of the file.
            width: of the file.
            interval: step between the frames that are read.
            seed: of the draws, see `seed`.
            why: gets what each resolution that was passed over lacks, or the clip.
        """
        small = [n for n in self.rules if height * width < ENLARGE * NUM_PIXELS[n]]
        if small and why is not None:  # the smallest is the last
            needed = f"{ENLARGE * NUM_PIXELS[small[-1]]:.0f} pixels"
            why.append(f"{width}x{height} is too small for {', '.join(small)} (at least {needed})")
        for name, rules in self.rules.items():
            if name in small:
                continue
            chosen = self._length(name, rules, frames, interval, seed, why)
            if chosen is not None:
                return BucketId(name, chosen, closest_ratio(name, height, width))
        return None

    def _length(
        self,
        name: str,
        rules: Mapping[int, Rule],
        frames: int,
        interval: int,
        seed: int | Sequence[int],
        why: list[str] | None,
    ) -> int | None:
        """Return the frames of the entry that takes the clip, if one does."""
        skipped = ""
        for length, rule in rules.items():
            if (length == 1) != (frames == 1):
                continue
            draws: np.random.Generator | None = None
            if rule.attempt is not None:
                draws = self._draws(seed, rule)
                if draws.random() > rule.attempt:
                    skipped = f", {length} frames left out by its probability {rule.attempt:g}"
                    continue
            if frames < self.needed(length, interval):
                continue
            # A draw lies in [0, 1): what is always kept needs none, what never is neither.
            if rule.keep >= 1 or (
                rule.keep > 0 and (draws or self._draws(seed, rule)).random() < rule.keep
            ):
                return length
            if why is not None:
                why.append(
                    f"{name}: not kept, probability {rule.keep:g} of {length} frames{skipped}"
                )
            return None
        if why is not None:
            why.append(f"{name}: {self._misfit(rules, frames, interval)}{skipped}")
        return None

    def _misfit(self, rules: Mapping[int, Rule], frames: int, interval: int) -> str:
        """Say why no length of a resolution suits a clip."""
        if frames == 1:
            return "takes no images (it has no entry of 1 frame)"
        lengths = [length for length in rules if length > 1]
        if not lengths:
            return "takes images alone"
        step = f" at frame interval {interval}" if interval > 1 else ""
        return (
            f"{frames} frames are too few (at least {self.needed(min(lengths), interval)} for "
            f"{min(lengths)}{step})"
        )

    def _draws(self, seed: int | Sequence[int], rule: Rule) -> np.random.Generator:
        if isinstance(seed, int):
            return np.random.default_rng(seed + rule.place)
        return np.random.default_rng([*seed, rule.place])


def _check(config: Mapping[Any, Any]) -> dict[str, dict[int, tuple[float, float | None, int]]]:
    """Return resolution -> frames -> (keep, attempt, batch size) of a configuration that is one."""
    if not isinstance(config, Mapping) or not config:
        raise UsageError(
            "bucket_config must be a dict that is not empty, as in "
            '{"144p": {1: (1.0, 64), 51: (1.0, 8)}}'
        )
    named = {}
    for name, entries in config.items():
        resolution = str(name)
        if resolution not in SIZES:
            raise UsageError(
                f"bucket_config: unknown resolution {name!r}{suggest(resolution, SIZES)} "
                f"(known: {', '.join(SIZES)})"
            )
        where = f"bucket_config[{resolution!r}]"
        if not isinstance(entries, Mapping) or not entries:
            raise UsageError(f"{where} must be a dict, as in {{51: (1.0, 8)}}, got {entries!r}")
        named[resolution] = {
            _frames(where, frames): _rule(f"{where}[{frames}]", rule)
            for frames, rule in entries.items()
        }
    return named


def _frames(where: str, frames: Any) -> int:
    text = str(frames)
    if isinstance(frames, bool) or not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{where}: {frames!r} is no number of frames; use 1, 17, 51, ...")
    return int(text)


def _rule(where: str, rule: Any) -> tuple[float, float | None, int]:
    form = "(keep probability, batch size) or ((keep, try), batch size)"
    if not isinstance(rule, list | tuple) or len(rule) != 2:
        raise UsageError(f"{where} must be {form}, got {rule!r}")
    chance, batch_size = rule
    pair = list(chance) if isinstance(chance, list | tuple) else [chance, None]
    if len(pair) != 2 or not _is_probability(pair[0]):
        raise UsageError(f"{where}: {chance!r} is no probability in 0 ... 1; use {form}")
    if pair[1] is not None and not _is_probability(pair[1]):
        raise UsageError(f"{where}: {pair[1]!r} is no probability in 0 ... 1; use {form}")
    if batch_size is None or (batch_size == 0 and not isinstance(batch_size, bool)):
        if pair[0] > 0:
            raise UsageError(
                f"{where}: a batch size of {batch_size} needs the keep probability 0, got {pair[0]}"
            )
        batch_size = 0
    elif isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"{where}: {batch_size!r} is no batch size; use 1, 2, ...")
    return float(pair[0]), None if pair[1] is None else float(pair[1]), batch_size


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
