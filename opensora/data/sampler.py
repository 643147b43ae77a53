"""Order the batches of a run: a pure function of the seed, the epoch, the table and the buckets.

Batches are numbered over all replicas and epochs, from 0 on. Number n belongs to replica n %
replicas, and every epoch holds a multiple of `replicas` batches, so one number says where a run is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple, Protocol

import numpy as np
import torch

from opensora.data.batch import Entry, Size
from opensora.data.buckets import BucketId, Buckets
from opensora.errors import UsageError

#: Epochs in a row without a batch that are no chance any more.
_EMPTY = 100


class PlannedBatch(NamedTuple):
    """Name the rows of a batch.

    Attributes:
        bucket: "240p 51 0.56".
        size: that the rows are read at.
        indices: of the rows in the table.
    """

    bucket: str
    size: Size
    indices: tuple[int, ...]


class Step(NamedTuple):
    """Place a batch in the run."""

    number: int
    epoch: int
    batch: PlannedBatch


class Sampler(Protocol):
    """Plan the batches of every epoch."""

    #: Every epoch holds a multiple of this many batches.
    replicas: int

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """List the batches of an epoch; the place in the list, modulo replicas, is the replica."""

    def length(self, epoch: int) -> int:
        """Return the number of batches of an epoch."""


def steps(sampler: Sampler, first: int = 0, epochs: int | None = None) -> Iterator[Step]:
    """Go through the batches from number `first` on.

    Args:
        sampler: plans them.
        first: number of the first batch, 0 for the beginning.
        epochs: where to end; endless if None.

    Raises:
        UsageError: no epoch holds a batch, or a hundred in a row do not. A single one may be empty
            by chance, where buckets are drawn.
    """
    epoch, start = locate(sampler, first, epochs)
    empty = 0
    while epochs is None or epoch < epochs:
        planned = sampler.epoch(epoch)
        empty = 0 if planned else empty + 1
        if empty == _EMPTY or (empty and epochs is not None and start == 0 and epoch + 1 == epochs):
            raise UsageError(
                f"{empty} epochs in a row hold no batch; `opensora data explain TABLE --config C` "
                "says why"
            )
        for offset in range(max(0, first - start), len(planned)):
            yield Step(start + offset, epoch, planned[offset])
        start += len(planned)
        epoch += 1


def locate(sampler: Sampler, number: int, epochs: int | None = None) -> tuple[int, int]:
    """Return the epoch of a batch number and the number of that epoch's first batch.

    Epochs differ in length where buckets are drawn, so this plans all epochs before it once.
    """
    if number < 0:
        raise UsageError(f"a batch number is at least 0, got {number}")
    epoch = start = empty = 0
    while (epochs is None or epoch < epochs) and empty < _EMPTY:
        length = sampler.length(epoch)
        if number < start + length:
            break
        empty = 0 if length else empty + 1
        start += length
        epoch += 1
    # `steps` meets the same empty epochs and says so.
    return epoch - empty, start


class BatchSampler:
    """Plan batches by buckets, in Open-Sora's order.

    Every row is put into a bucket. Bucket by bucket, in the order in which rows first met them, the
    rows that do not fill a batch are dropped and the others shuffled. Then the visits to the
    buckets are shuffled, and the last ones dropped so that all replicas get equally many. Both
    shuffles draw from one generator seeded with seed + epoch.

    Args:
        entries: of the dataset.
        buckets: decide.
        frame_interval: step between the frames that are read.
        seed: of buckets and order.
        replicas: that every epoch's number of batches is a multiple of: data-parallel processes
            times accumulation steps.
        shuffle: keep the table's order if False.
        drop_last: fill the last batch of a bucket with its first rows, and the last visits with
            the first ones, if False. Open-Sora drops.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        buckets: Buckets,
        *,
        frame_interval: int = 1,
        seed: int = 1024,
        replicas: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        _check(replicas, seed)
        if frame_interval < 1:
            raise UsageError(f"frame_interval must be at least 1, got {frame_interval}")
        self.entries, self.buckets = entries, buckets
        self.frame_interval, self.seed, self.replicas = frame_interval, seed, replicas
        self.shuffle, self.drop_last = shuffle, drop_last
        self._shapes = np.array(
            [(entry.num_frames, entry.height, entry.width) for entry in entries], np.int64
        ).reshape(-1, 3)
        self._lengths: dict[int, int] = {}
        self._last: tuple[int, list[PlannedBatch]] | None = None

    def choose(self, index: int, epoch: int, why: list[str] | None = None) -> BucketId | None:
        """Return the bucket of a row in an epoch; `why` gets the reasons on the way."""
        entry = self.entries[index]
        if entry.num_frames < 1:
            return None
        return self.buckets.choose(
            entry.num_frames,
            entry.height,
            entry.width,
            self.frame_interval,
            self.buckets.seed(self.seed, epoch, index),
            why,
        )

    def groups(self, epoch: int) -> dict[BucketId, list[int]]:
        """Return bucket -> rows of an epoch, both in the table's order."""
        return self.buckets.choose_all(self._shapes, self.frame_interval, self.seed, epoch)

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """List the batches of an epoch; see `Sampler`."""
        if self._last is None or self._last[0] != epoch:
            planned = _plan(
                {
                    (bucket.name, bucket.size): (rows, self.buckets.batch_size(bucket))
                    for bucket, rows in self.groups(epoch).items()
                },
                self.seed + epoch,
                self.replicas,
                self.shuffle,
                self.drop_last,
            )
            self._last = epoch, planned
            self._lengths[epoch] = len(planned)
        return self._last[1]

    def length(self, epoch: int) -> int:
        """Return the number of batches of an epoch."""
        if epoch not in self._lengths:
            self.epoch(epoch)
        return self._lengths[epoch]


class FixedSampler:
    """Plan batches of one size.

    Args:
        entries: of the dataset; left out are rows without frames (files that cannot be read) and
            videos with too few. Images are repeated.
        size: of all clips.
        batch_size: clips a batch.
        seed, replicas, shuffle, drop_last: as for `BatchSampler`.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        size: Size,
        batch_size: int,
        *,
        seed: int = 1024,
        replicas: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        _check(replicas, seed)
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.entries, self.size, self.batch_size = entries, size, batch_size
        self.seed, self.replicas = seed, replicas
        self.shuffle, self.drop_last = shuffle, drop_last
        self._rows = [index for index, entry in enumerate(entries) if self.takes(entry)]

    @property
    def name(self) -> str:
        """Name the one bucket: "640x360 17", width x height and frames."""
        return f"{self.size.width}x{self.size.height} {self.size.frames}"

    def takes(self, entry: Entry) -> bool:
        """Tell whether a row has frames enough."""
        return entry.num_frames == 1 or entry.num_frames >= max(1, self.size.frames)

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """List the batches of an epoch; see `Sampler`."""
        return _plan(
            {(self.name, self.size): (list(self._rows), self.batch_size)},
            self.seed + epoch,
            self.replicas,
            self.shuffle,
            self.drop_last,
        )

    def length(self, epoch: int) -> int:
        """Return the number of batches of an epoch: the same for all."""
        rows = len(self._rows)
        full = rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)
        if self.drop_last or full == 0:
            return full - full % self.replicas
        return full + -full % self.replicas


def _plan(
    groups: Mapping[tuple[str, Size], tuple[list[int], int]],
    seed: int,
    replicas: int,
    shuffle: bool,
    drop_last: bool,
) -> list[PlannedBatch]:
    """Cut rows into batches and order them.

    `groups` maps the name and size of a bucket to its rows and batch size.
    """
    generator = torch.Generator().manual_seed(seed)
    batches: dict[tuple[str, Size], list[tuple[int, ...]]] = {}
    visits: list[tuple[str, Size]] = []
    for key, (rows, batch_size) in groups.items():
        count = len(rows) // batch_size if drop_last else -(-len(rows) // batch_size)
        # A bucket with fewer rows than a batch goes round several times.
        rows = list(islice(cycle(rows), count * batch_size))
        if shuffle:
            rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        batches[key] = [
            tuple(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)
        ]
        visits += [key] * count
    if shuffle:
        visits = [visits[i] for i in torch.randperm(len(visits), generator=generator).tolist()]
    # The k-th visit of a bucket takes its k-th batch.
    waiting = {key: iter(parts) for key, parts in batches.items()}
    planned = [PlannedBatch(*key, next(waiting[key])) for key in visits]
    extra = len(planned) % replicas
    if extra and drop_last:
        return planned[:-extra]
    return planned + list(islice(cycle(planned), replicas - extra)) if extra else planned


def _check(replicas: int, seed: int) -> None:
    if seed < 0:
        raise UsageError(f"seed must be at least 0, got {seed}")
    if replicas < 1:
        raise UsageError(f"replicas must be at least 1, got {replicas}")
