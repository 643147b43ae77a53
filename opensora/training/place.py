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
_SHOWN = 256


def plan_digest(sampler: Sampler) -> str:
    """Return what tells plans apart: a digest of the first batches, however many make a step."""
    shown = repr([tuple(batch) for batch in sampler.epoch(0)[:_SHOWN]])
    return hashlib.blake2b(shown.encode(), digest_size=8).hexdigest()


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
    if not saved or (saved["digest"], saved["replicas"]) == (digest, sampler.replicas):
        return number, None
    epoch, size = int(saved["epoch"]), sampler.replicas
    start = sum(sampler.length(before) for before in range(epoch))
    length = sampler.length(epoch)
    offset = min(-(-int(saved["offset"]) // size) * size, length)
    if saved["digest"] != digest:
        why = "its table, buckets or seed were others"
    else:
        why = f"its steps took {saved['replicas']} batches, those of this run take {size}"
    return start + offset, (
        f"not an exact continuation of the checkpoint: {why}. Going on in epoch {epoch} after "
        f"{offset} of its {length} batches"
    )
