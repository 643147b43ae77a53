"""Make a run's sampler of its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opensora.data.batch import Dataset, Entry, Size
from opensora.data.buckets import Buckets
from opensora.data.sampler import BatchSampler, FixedSampler
from opensora.errors import UsageError


@dataclass(frozen=True)
class Plan:
    """Hold what decides over the batches of a run, besides the table.

    Attributes:
        bucket_config: sizes and batch sizes; None where all clips have one size.
        size, batch_size: then these.
        frame_interval: step between the frames that are read.
        seed, replicas, drop_last: see `BatchSampler`.
        strict: decide as Open-Sora does, see `opensora.data.buckets`.
    """

    bucket_config: Mapping[Any, Any] | None = None
    size: Size | None = None
    batch_size: int | None = None
    frame_interval: int = 1
    seed: int = 1024
    replicas: int = 1
    drop_last: bool = True
    strict: bool = True

    def sampler(self, entries: Sequence[Entry]) -> BatchSampler | FixedSampler:
        """Return the sampler: by buckets if there are any, of one size otherwise.

        Raises:
            UsageError: neither buckets nor a size with a batch size, or one of them cannot be.
        """
        if self.bucket_config is not None:
            return BatchSampler(
                entries,
                Buckets(self.bucket_config, strict=self.strict),
                frame_interval=self.frame_interval,
                seed=self.seed,
                replicas=self.replicas,
                drop_last=self.drop_last,
            )
        if self.size is None or self.batch_size is None:
            raise UsageError(
                "training needs bucket_config, or batch_size with num_frames and image_size of "
                "the dataset"
            )
        return FixedSampler(
            entries,
            self.size,
            self.batch_size,
            seed=self.seed,
            replicas=self.replicas,
            drop_last=self.drop_last,
        )


def make_plan(
    dataset: Dataset,
    *,
    bucket_config: Mapping[Any, Any] | None = None,
    batch_size: int | None = None,
    seed: int = 1024,
    replicas: int = 1,
) -> Plan:
    """Return the plan of a configuration for its dataset.

    The dataset's own frame_interval, strict_buckets and size count, where it has them; `replicas`
    are data-parallel processes times accumulation steps; the others are keys of the configuration.
    """
    return Plan(
        bucket_config=bucket_config,
        size=getattr(dataset, "size", None),
        batch_size=batch_size,
        frame_interval=getattr(dataset, "frame_interval", 1),
        seed=seed,
        replicas=replicas,
        strict=getattr(dataset, "strict_buckets", True),
    )
