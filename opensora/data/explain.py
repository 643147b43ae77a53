"""Say what training makes of a table: the bucket of every row, or why it is dropped, and the steps.

A run that would do no step is refused with the smallest change that makes it do one. Changes are
tried out on the table, not guessed (`opensora.data.remedy`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from opensora.data.batch import Dataset, Entry
from opensora.data.plan import Plan
from opensora.data.remedy import Remedy, find_remedy
from opensora.data.sampler import BatchSampler, FixedSampler
from opensora.errors import UsageError


@dataclass(frozen=True)
class BucketReport:
    """Count what a bucket holds in one epoch; `left` rows do not fill a batch."""

    name: str
    rows: int
    batch_size: int

    @property
    def batches(self) -> int:
        """Return full batches."""
        return self.rows // self.batch_size

    @property
    def left(self) -> int:
        """Return rows that do not fill a batch."""
        return self.rows % self.batch_size


@dataclass
class Report:
    """Tell what an epoch makes of a table.

    Attributes:
        rows: (name, bucket or None, why it is dropped) of every row.
        unreadable: rows whose file cannot be read.
        buckets: the ones that hold rows, the fullest first.
        replicas: that share an epoch.
        steps: of an epoch.
        remedy: the smallest change to a table or configuration that makes no step.
        remarks: further facts about the table.
    """

    rows: list[tuple[str, str | None, str]]
    unreadable: int
    buckets: list[BucketReport]
    replicas: int
    steps: int
    remedy: Remedy | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """Return how many readable rows get no bucket."""
        return sum(bucket is None for _, bucket, _ in self.rows) - self.unreadable

    def lines(self, *, rows: bool = True) -> Iterator[str]:
        """Yield the report line by line; the rows first, unless they are not wanted."""
        if rows:
            for name, place, reason in self.rows:
                yield f"{name}: {place}" if place else f"{name}: dropped: {reason}"
            yield ""
        kept = len(self.rows) - self.dropped - self.unreadable
        yield (
            f"{len(self.rows)} rows: {kept} in a bucket, {self.dropped} dropped, "
            f"{self.unreadable} unreadable"
        )
        yield from self.remarks
        if self.buckets:
            width = max(len("bucket"), *(len(bucket.name) for bucket in self.buckets))
            yield ""
            yield f"{'bucket':<{width}}  {'rows':>8}  {'batch size':>10}  {'batches':>8}  left over"
            for bucket in self.buckets:
                yield (
                    f"{bucket.name:<{width}}  {bucket.rows:>8}  {bucket.batch_size:>10}  "
                    f"{bucket.batches:>8}  {bucket.left:>9}"
                )
        yield ""
        over = f" ({self.replicas} replicas take a batch each)" if self.replicas > 1 else ""
        yield f"steps per epoch: {self.steps}{over}"
        if self.steps == 0:
            yield f"no training: {self.advice()}"

    def advice(self) -> str:
        """Say what makes a run of no steps do one."""
        if self.remedy is not None:
            return f"smallest change: {self.remedy.text}"
        reason = next((why for _, bucket, why in self.rows if bucket is None), "the table is empty")
        return f"no change of the configuration helps; the first row: {reason}"


def explain(dataset: Dataset, plan: Plan, epoch: int = 0) -> Report:
    """Report on an epoch of a dataset; buckets with keep probabilities draw anew every epoch.

    Raises:
        UsageError: the plan cannot be.
    """
    entries = dataset.entries()
    problems: Mapping[int, str] = getattr(dataset, "problems", {})
    sampler = plan.sampler(entries)
    by_buckets = isinstance(sampler, BatchSampler)
    rows: list[tuple[str, str | None, str]] = []
    counts: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for index, entry in enumerate(entries):
        bucket, reason = None, ""
        if entry.num_frames < 1:
            reason = f"unreadable: {problems.get(index, 'it holds no frame')}"
        elif isinstance(sampler, BatchSampler):
            why: list[str] = []
            chosen = sampler.choose(index, epoch, why)
            if chosen is not None:
                bucket = chosen.name
                sizes[bucket] = sampler.buckets.batch_size(chosen)
            reason = "; ".join(why)
        else:
            bucket, reason = _fixed(sampler, entry)
            sizes[sampler.name] = sampler.batch_size
        if bucket is not None:
            counts[bucket] += 1
        rows.append((entry.name, bucket, reason))
    steps = sampler.length(epoch) // plan.replicas
    return Report(
        rows=rows,
        unreadable=sum(entry.num_frames < 1 for entry in entries),
        buckets=[BucketReport(name, n, sizes[name]) for name, n in counts.most_common()],
        replicas=plan.replicas,
        steps=steps,
        remedy=None if steps else find_remedy(entries, plan),
        remarks=_remarks(entries) + ([_DRAWN] if by_buckets and _draws(plan) else []),
    )


def require_steps(dataset: Dataset, plan: Plan) -> int:
    """Return the steps of the first epoch.

    Raises:
        UsageError: there are none; says how the rows were lost and the smallest change that helps.
    """
    steps = plan.sampler(dataset.entries()).length(0) // plan.replicas
    if steps:
        return steps
    report = explain(dataset, plan)
    total, kept = len(report.rows), sum(bucket.rows for bucket in report.buckets)
    raise UsageError(
        f"there would be 0 steps: of {total} rows {report.unreadable} are unreadable, "
        f"{report.dropped} fit no bucket and {kept} do, in {len(report.buckets)} buckets with "
        f"{sum(bucket.batches for bucket in report.buckets)} full batches for {plan.replicas} "
        f"{'replica' if plan.replicas == 1 else 'replicas'}; {report.advice()}. `opensora data "
        "explain` shows every row"
    )


_DRAWN = "epoch 0 is shown; buckets with probabilities below 1 draw anew every epoch"


def _draws(plan: Plan) -> bool:
    """Tell whether a bucket configuration leaves anything to chance."""
    return plan.bucket_config is not None and any(
        isinstance(rule[0], list | tuple) or 0 < rule[0] < 1
        for rules in plan.bucket_config.values()
        for rule in rules.values()
    )


def _fixed(sampler: FixedSampler, entry: Entry) -> tuple[str | None, str]:
    """Return the one bucket, or why a row is not in it."""
    if sampler.takes(entry):
        return sampler.name, ""
    return None, f"{entry.num_frames} frames are too few, {sampler.size.frames} are read"


def _remarks(entries: Sequence[Entry]) -> list[str]:
    """Return what else is worth knowing of a table."""
    images = sum(entry.num_frames == 1 for entry in entries)
    videos = sum(entry.num_frames > 1 for entry in entries)
    remarks = [f"{videos} videos, {images} images"]
    files = Counter(entry.name.partition(" ")[2] or entry.name for entry in entries)
    double = [name for name, count in files.items() if count > 1]
    if double:
        remarks.append(f"{len(double)} files are named more than once, such as {double[0]}")
    return remarks
