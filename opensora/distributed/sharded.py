"""Compute with parameters and gradients that may be sharded (DTensor) or whole.

Elementwise work (AdamW, averages, clipping) is done on `local` parts: the padding of FSDP2 is not
among them. What needs a matrix as it is takes `whole` and gives `part_of` back.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from opensora.distributed.collectives import all_reduce

# Gradients of whole parameters are joined up to this size before they are reduced.
_BUCKET_BYTES = 64 * 2**20


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, sharing memory; the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor's value, gathered from its ranks: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Return what `local(like)` would be if `like` had this value; no communication.

    Args:
        value: whole, equal on every rank.
        like: says how it is sharded.
    """
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements).to_local()


@torch.no_grad()
def reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Take the mean over all ranks of whole parameters' gradients, in place.

    For what FSDP2 does not wrap: it does this for the parameters that it shards, which are left
    alone. Call it once before the optimizer's step.

    Raises:
        CollectiveError: a rank did not arrive.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buckets: list[list[Tensor]] = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None or isinstance(grad, DTensor):
            continue
        last = buckets[-1] if buckets else []
        fits = last and (last[0].dtype, last[0].device) == (grad.dtype, grad.device)
        if fits and sum(g.nbytes for g in last) + grad.nbytes <= _BUCKET_BYTES:
            last.append(grad)
        else:
            buckets.append([grad])
    for bucket in buckets:
        joined = torch.cat([grad.flatten() for grad in bucket])
        all_reduce(joined, "gradients", "mean")
        for grad, mean in zip(bucket, joined.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))
