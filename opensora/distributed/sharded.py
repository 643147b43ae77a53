"""Compute with parameters and gradients that may be sharded (DTensor) or whole.

Elementwise work (AdamW, averages, clipping) is done on `local` parts: the padding of FSDP2 is not
among them. What needs a matrix as it is takes `whole` and gives `part_of` back.
"""

from __future__ import annotations

from collections import defaultdict
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


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of those parameters that have one."""
    return [p.grad for p in parameters if p.grad is not None]


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, float32 [], equal on every rank.

    It counts every shard once, copies of HSDP and ranks of a sequence group included, whatever mix
    of whole and sharded parameters there is. Whole ones must have been reduced before.

    Raises:
        CollectiveError: a rank did not arrive.
    """
    by_placement: defaultdict[object, list[Tensor]] = defaultdict(list)
    for grad in gradients(parameters):
        key = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        by_placement[key].append(grad)
    total = torch.zeros(())
    for grads in by_placement.values():
        norms = torch._foreach_norm([local(grad) for grad in grads], 2, torch.float32)
        square = torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
        if isinstance(grads[0], DTensor):
            for side, placement in enumerate(grads[0].placements):
                if placement.is_shard():
                    group = grads[0].device_mesh.get_group(side)
                    square = all_reduce(square, "the gradient norm", group=group)
        total = total.to(square.device) + square
    return total.sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply every gradient by a number, in place, without waiting for the device."""
    by_device: defaultdict[object, list[Tensor]] = defaultdict(list)
    for grad in gradients(parameters):
        by_device[(grad.device, grad.dtype)].append(local(grad))
    for grads in by_device.values():
        at = factor.to(grads[0].device) if isinstance(factor, Tensor) else factor
        torch._foreach_mul_(grads, at)


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
    for grad in gradients(parameters):
        if isinstance(grad, DTensor):
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
