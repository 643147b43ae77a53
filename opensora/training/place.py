"""Keep a run's place in the data, also where a resumed run has other processes or another table.

A batch's number says where a run is as long as batches are planned alike. They are not if a step
takes another number of them, or if the table, the buckets or the seed changed. Then the run goes on
in the same epoch, at the first step that begins where the old one would have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from opensora.data.sampler import Sampler, locate

#: Batches of the first epoch that a plan is told by.
_SHOWN = 64


def plan_digest(sampler: Sampler) -> str:
    """Return what tells plans apart: digests of their first batches; see `_alike`."""
    shown = (repr(tuple(batch)).encode() for batch in sampler.epoch(0)[:_SHOWN])
    return " ".join(hashlib.blake2b(text, digest_size=4).hexdigest() for text in shown)


def _alike(one: str, other: str) -> bool:
    """Compare digests as far as both go: an epoch ends earlier where more batches make a step."""
    return all(a == b for a, b in zip(one.split(), other.split(), strict=False))


def place(sampler: Sampler, number: int, epochs: int | None, digest: str) -> dict[str, Any]:
    """Describe the place of a batch number, JSON values for a checkpoint."""
    epoch, start = locate(sampler, number, epochs)
    return {
        "digest": digest,
        "replicas": sampler.replicas,
        "epoch": epoch,
        "offset": number - start,
    }


def find_place(
    sampler: Sampler, number: int, saved: Mapping[str, Any], digest: str
) -> tuple[int, str | None]:
    """Return the number to go on with.

    Args:
        sampler: of this run.
        number: of the checkpoint's next batch, in the numbers of the run that saved it.
        saved: what `place` returned then; empty for checkpoints that have none.
        digest: of this run's plan.

    Returns:
        The number in this run, and a note where what follows is not what the saved run would have
        done; None where it is.
    """
    alike = not saved or _alike(saved["digest"], digest)
    if not saved or (alike and saved["replicas"] == sampler.replicas):
        return number, None
    epoch, size = int(saved["epoch"]), sampler.replicas
    start = sum(sampler.length(before) for before in range(epoch))
    length = sampler.length(epoch)
    offset = min(-(-int(saved["offset"]) // size) * size, length)
    if not alike:
        why = "its table, buckets or seed were others"
    else:
        why = f"its steps took {saved['replicas']} batches, those of this run take {size}"
    return start + offset, (
        f"not an exact continuation of the checkpoint: {why}. Going on in epoch {epoch} after "
        f"{offset} of its {length} batches"
    )
