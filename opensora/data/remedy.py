"""Find the smallest change that makes a run of no steps do one, by trying changes out.

Changes in the order of what they cost: a smaller batch, a looser fit, a smaller frame interval, a
kept bucket, a shorter one, another resolution, fewer replicas. A change that alone fills a bucket
but no batch is completed by a batch size.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opensora.data.batch import Entry
from opensora.data.buckets import ENLARGE
from opensora.data.plan import Plan
from opensora.data.sampler import BatchSampler, FixedSampler
from opensora.sizes import NUM_PIXELS

#: Resolutions offered for new buckets: those with the usual ratios.
_OFFERED = tuple(n for n in NUM_PIXELS if n.endswith(("p", "k")))
_LOOSE = "strict_buckets=False of dataset"
#: Lengths offered are multiples of this, a chunk of the video autoencoder, where clips have them.
_CHUNK = 17


@dataclass(frozen=True)
class Remedy:
    """Describe a change.

    Attributes:
        text: what to change, "batch_size of 144p/51 from 51 to 12".
        plan: with the change made.
    """

    text: str
    plan: Plan


def find_remedy(entries: Sequence[Entry], plan: Plan) -> Remedy | None:
    """Return the smallest change that gives the first epoch a step; None if there is none."""
    readable = [entry for entry in entries if entry.num_frames > 0]
    if not readable:
        return None
    for base in _bases(plan):
        for change in _changes(readable, base.plan):
            done = _complete(entries, change)
            if done is not None:
                return Remedy(_joined(base.text, done.text), done.plan)
    return None


def _bases(plan: Plan) -> Iterator[Remedy]:
    """Yield the plan as it is, then with what a single change on top may need."""
    looser = [Remedy("", plan)]
    if plan.frame_interval > 1:
        text = f"frame_interval from {plan.frame_interval} to 1"
        looser.append(Remedy(text, dataclasses.replace(plan, frame_interval=1)))
    if plan.strict and plan.bucket_config is not None:
        last = looser[-1]
        loose = dataclasses.replace(last.plan, strict=False)
        looser.append(Remedy(_joined(last.text, _LOOSE), loose))
    yield from looser
    for count in range(plan.replicas - 1, 0, -1):
        for base in looser:
            fewer = dataclasses.replace(base.plan, replicas=count)
            yield Remedy(_joined(base.text, _fewer(plan, count)), fewer)


def _fewer(plan: Plan, count: int) -> str:
    return f"replicas (processes times accumulation steps) from {plan.replicas} to {count}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _changes(readable: list[Entry], plan: Plan) -> Iterator[Remedy]:
    """Yield changes, the cheapest first; they may still lack a batch size."""
    yield Remedy("", plan)
    if plan.bucket_config is None:
        yield from _shorter_clips(readable, plan)
    else:
        if plan.strict:
            yield Remedy(_LOOSE, dataclasses.replace(plan, strict=False))
        for interval in range(plan.frame_interval - 1, 0, -1):
            yield Remedy(
                f"frame_interval from {plan.frame_interval} to {interval}",
                dataclasses.replace(plan, frame_interval=interval),
            )
        yield from _kept(plan)
        yield from _shorter_buckets(readable, plan)
        yield from _new_resolution(readable, plan)
    for count in range(plan.replicas - 1, 0, -1):
        yield Remedy(_fewer(plan, count), dataclasses.replace(plan, replicas=count))


def _complete(entries: Sequence[Entry], change: Remedy) -> Remedy | None:
    """Return the change, with a batch size if it takes one; None if it gives no step even so."""
    sampler = change.plan.sampler(entries)
    if sampler.length(0) > 0:
        return change
    best: tuple[float, str, Plan] | None = None
    for text, share, plan in _smaller_batches(sampler, change.plan):
        # Many rows and processes may rule a candidate out that the counts allow: it is tried.
        if (best is None or share > best[0]) and plan.sampler(entries).length(0) > 0:
            best = share, text, plan
    if best is None:
        return None
    return Remedy(_joined(change.text, best[1]), best[2])


def _smaller_batches(
    sampler: BatchSampler | FixedSampler, plan: Plan
) -> Iterator[tuple[str, float, Plan]]:
    """Yield, for every entry of the configuration, the largest batch size that gives a step.

    With it comes the share of the batch size that is left.
    """
    if isinstance(sampler, FixedSampler):
        rows = sum(sampler.takes(entry) for entry in sampler.entries)
        size = rows // plan.replicas
        if size:
            text = f"batch_size from {sampler.batch_size} to {size}"
            yield text, size / sampler.batch_size, dataclasses.replace(plan, batch_size=size)
        return
    assert plan.bucket_config is not None
    groups = sampler.groups(0)
    full = {b: len(rows) // sampler.buckets.batch_size(b) for b, rows in groups.items()}
    for name, frames in dict.fromkeys((b.resolution, b.frames) for b in groups):
        mine = [len(rows) for b, rows in groups.items() if b[:2] == (name, frames)]
        others = sum(n for b, n in full.items() if b[:2] != (name, frames))
        old = sampler.buckets.rules[name][frames].batch_size
        for size in range(min(old - 1, max(mine)), 0, -1):
            if others + sum(rows // size for rows in mine) >= plan.replicas:
                key, length = _spelled(plan, name, frames)
                chance = plan.bucket_config[key][length][0]
                yield (
                    f"batch_size of {name}/{frames} from {old} to {size}",
                    size / old,
                    _with(plan, key, length, (chance, size)),
                )
                break


def _kept(plan: Plan) -> Iterator[Remedy]:
    """Yield the entries that chance keeps clips out of, certain, from small sizes to large."""
    assert plan.bucket_config is not None
    for key in sorted(plan.bucket_config, key=lambda name: NUM_PIXELS[str(name)]):
        for length, (chance, size) in plan.bucket_config[key].items():
            if chance not in (1, 1.0):
                where = f"{key}/{length}"
                text = f"keep probability of {where} from {chance} to 1.0"
                if not size:
                    text += f" and its batch size from {size} to 1"
                yield Remedy(text, _with(plan, key, length, (1.0, size or 1)))


def _shorter_buckets(readable: Sequence[Entry], plan: Plan) -> Iterator[Remedy]:
    """Yield new lengths for the resolutions that are there, the largest first."""
    assert plan.bucket_config is not None
    for key in sorted(plan.bucket_config, key=lambda name: NUM_PIXELS[str(name)], reverse=True):
        fitting = [e for e in readable if _fits(e, str(key))]
        for length in _lengths(fitting, plan):
            if length not in {int(known) for known in plan.bucket_config[key]}:
                rule = 1.0, _capacity(fitting, length, plan)
                yield Remedy(
                    f"add {length}: {rule} to {key} of bucket_config",
                    _with(plan, key, length, rule),
                )


def _new_resolution(readable: Sequence[Entry], plan: Plan) -> Iterator[Remedy]:
    """Yield new resolutions: the largest that most rows fit first."""
    assert plan.bucket_config is not None
    known = {str(name) for name in plan.bucket_config}
    fitting = Counter({n: sum(_fits(e, n) for e in readable) for n in _OFFERED if n not in known})
    for name in sorted(fitting, key=lambda n: (fitting[n], NUM_PIXELS[n]), reverse=True):
        rows = [entry for entry in readable if _fits(entry, name)]
        for length in _lengths(rows, plan):
            rule = 1.0, _capacity(rows, length, plan)
            yield Remedy(
                f'add "{name}": {{{length}: {rule}}} to bucket_config',
                _with(plan, name, length, rule),
            )


def _shorter_clips(readable: Sequence[Entry], plan: Plan) -> Iterator[Remedy]:
    """Yield a length that at least one clip has."""
    assert plan.size is not None
    longest = max(entry.num_frames for entry in readable)
    if longest < plan.size.frames:
        size = plan.size._replace(frames=longest)
        yield Remedy(
            f"num_frames of dataset from {plan.size.frames} to {longest}",
            dataclasses.replace(plan, size=size),
        )


def _fits(entry: Entry, resolution: str) -> bool:
    return entry.height * entry.width >= ENLARGE * NUM_PIXELS[resolution]


def _room(entry: Entry, plan: Plan) -> int:
    """Return the longest bucket that a clip fits."""
    if entry.num_frames == 1:
        return 1
    if plan.strict:
        return (entry.num_frames - 1) // plan.frame_interval
    return (entry.num_frames - 1) // plan.frame_interval + 1


def _lengths(rows: Sequence[Entry], plan: Plan) -> list[int]:
    """Return lengths to offer: what most rows have room for, and what the longest has."""
    rooms = sorted(_room(entry, plan) for entry in rows if entry.num_frames > 1)
    lengths = [_chunks(room) for room in (rooms[len(rooms) // 2], rooms[-1])] if rooms else []
    images = [1] if any(entry.num_frames == 1 for entry in rows) else []
    return list(dict.fromkeys([length for length in lengths if length > 1] + images))


def _chunks(room: int) -> int:
    return room // _CHUNK * _CHUNK or room


def _capacity(rows: Sequence[Entry], length: int, plan: Plan) -> int:
    """Return a batch size that the rows could fill for every replica, at least 1."""
    count = sum(
        (entry.num_frames == 1) == (length == 1) and _room(entry, plan) >= length for entry in rows
    )
    return max(1, count // plan.replicas)


def _spelled(plan: Plan, resolution: str, frames: int) -> tuple[Any, Any]:
    """Return the keys of an entry as the configuration writes them."""
    assert plan.bucket_config is not None
    key = next(name for name in plan.bucket_config if str(name) == resolution)
    return key, next(length for length in plan.bucket_config[key] if int(length) == frames)


def _with(plan: Plan, key: Any, length: Any, rule: tuple[Any, int]) -> Plan:
    """Return a plan with one entry of its buckets set."""
    config = {name: dict(rules) for name, rules in (plan.bucket_config or {}).items()}
    config.setdefault(key, {})[length] = rule
    return dataclasses.replace(plan, bucket_config=config)
