"""Order the batches of rows whose sizes are fixed: what is stored cannot be cut to a bucket."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from opensora.data.batch import Size
from opensora.data.buckets import BucketId, Buckets
from opensora.data.sampler import PlannedBatch, _plan
from opensora.errors import UsageError
from opensora.sizes import SIZES


class StoredSampler:
    """Plan batches of rows that are stored at one size or several.

    A row that is stored at several sizes takes one of them in every epoch, drawn from the seed,
    the epoch and the row. Rows of a size for which there is no batch size are left out.

    Args:
        sizes: of every row; none leaves the row out.
        batch_size: clips a batch of every size, where `bucket_config` has no entry of its
            frames, height and width.
        bucket_config: resolution -> frames -> (probability, clips a batch); only the batch sizes
            count, as drawing was done when the rows were made.
        seed: of order and sizes.
        replicas: that every epoch's number of batches is a multiple of.
        shuffle: keep the order of the rows if False.
        drop_last: as for `BatchSampler`.

    Attributes:
        left_out: size -> rows that no batch size suits.

    Raises:
        UsageError: there is no batch size at all, or none for any stored size.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[Size]],
        *,
        batch_size: int | None = None,
        bucket_config: Mapping[Any, Any] | None = None,
        seed: int = 1024,
        replicas: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if replicas < 1 or (batch_size is not None and batch_size < 1):
            raise UsageError(
                f"batch_size and replicas must be at least 1, got {batch_size} and {replicas}"
            )
        if batch_size is None and bucket_config is None:
            raise UsageError("stored features need bucket_config, or batch_size for all sizes")
        self.seed, self.replicas, self.shuffle, self.drop_last = seed, replicas, shuffle, drop_last
        found = {size for row in sizes for size in row}
        buckets = None if bucket_config is None else Buckets(bucket_config)
        self.batches = {size: _batch(size, buckets, batch_size) for size in sorted(found)}
        self.sizes = [[size for size in row if self.batches[size][1]] for row in sizes]
        self.left_out = Counter(s for row in sizes for s in row if not self.batches[s][1])
        if sizes and not any(self.sizes):
            held = ", ".join(f"{s.frames}x{s.height}x{s.width}" for s in sorted(found)[:6])
            raise UsageError(
                f"bucket_config has no entry for the sizes that are stored ({held or 'none'}, "
                "frames x height x width); add them, or give batch_size"
            )
        self._lengths: dict[int, int] = {}

    def size(self, epoch: int, index: int) -> Size | None:
        """Return the size at which a row is read in an epoch; None if it is left out."""
        sizes = self.sizes[index]
        if len(sizes) < 2:
            return sizes[0] if sizes else None
        return random.Random(f"{self.seed}/{epoch}/{index}/size").choice(sizes)

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """List the batches of an epoch; see `opensora.data.sampler.Sampler`."""
        groups: dict[tuple[str, Size], tuple[list[int], int]] = {}
        for index in range(len(self.sizes)):
            size = self.size(epoch, index)
            if size is not None:
                name, count = self.batches[size]
                groups.setdefault((name, size), ([], count))[0].append(index)
        planned = _plan(groups, self.seed + epoch, self.replicas, self.shuffle, self.drop_last)
        self._lengths[epoch] = len(planned)
        return planned

    def length(self, epoch: int) -> int:
        """Return the number of batches of an epoch."""
        return self._lengths[epoch] if epoch in self._lengths else len(self.epoch(epoch))


def _batch(size: Size, buckets: Buckets | None, batch_size: int | None) -> tuple[str, int]:
    """Return name and clips a batch of a size; 0 clips if nothing says."""
    for resolution, rules in (buckets.rules if buckets else {}).items():
        if size.frames in rules:
            for ratio, (height, width) in SIZES[resolution].items():
                if (height, width) == (size.height, size.width):
                    name = BucketId(resolution, size.frames, ratio).name
                    return name, rules[size.frames].batch_size or batch_size or 0
    return f"{size.width}x{size.height} {size.frames}", batch_size or 0
