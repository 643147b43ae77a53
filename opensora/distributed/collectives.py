"""Talk to the other processes in calls that say what they were for when one does not answer.

A process on its own may make every call: it is answered by itself. Tensors on the CPU go through
gloo, where a rank that is late or gone raises `CollectiveError` here. NCCL reports such a rank from
its own thread, under the name that the group has in the mesh, and ends the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opensora.errors import CollectiveError

T = TypeVar("T")
_Group = dist.ProcessGroup | None

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}

# Their names from torch 2.13 on, or the older ones.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Parts of what gloo and NCCL say where they raise no type of their own.
_BACKEND_WORDS = ("gloo", "nccl", "application timeout", "connection closed", "connection reset")

# How long a failed rank waits for the others to say where they are.
_ASKING_S = 3.0


def all_reduce(tensor: Tensor, what: str, op: str = "sum", group: _Group = None) -> Tensor:
    """Add `tensor` up over the ranks, in place, and return it.

    Args:
        tensor: of one shape and dtype on every rank.
        what: what is reduced, for the error message: "the loss".
        op: "sum", "mean", "min" or "max".
        group: the ranks; None: all.

    Raises:
        CollectiveError: a rank did not arrive.
    """
    if not dist.is_initialized():
        return tensor
    with named("all_reduce", what, group):
        dist.all_reduce(tensor, _OPERATIONS["sum" if op == "mean" else op], group)
    return tensor.div_(dist.get_world_size(group)) if op == "mean" else tensor


def all_gather(tensor: Tensor, what: str, group: _Group = None) -> Tensor:
    """Return [ranks, *shape] of a tensor that has one shape and dtype on every rank.

    Raises:
        CollectiveError: a rank did not arrive.
    """
    if not dist.is_initialized():
        return tensor[None]
    result = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    with named("all_gather", what, group):
        gather_into(result.flatten(), tensor.flatten(), group)
    return result


def all_gather_object(value: T, what: str, group: _Group = None) -> list[T]:
    """Return every rank's value, a plain object of Python, in the order of ranks.

    Raises:
        CollectiveError: a rank did not arrive.
    """
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    with named("all_gather_object", what, group):
        dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: T, what: str, source: int = 0, group: _Group = None) -> T:
    """Return rank `source`'s value, a plain object of Python, on every rank.

    Raises:
        CollectiveError: a rank did not arrive.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    with named("broadcast_object", what, group):
        dist.broadcast_object_list(values, source, group, torch.device("cpu"))
    return values[0]


def barrier(what: str, group: _Group = None) -> None:
    """Wait until every rank is here.

    Raises:
        CollectiveError: a rank did not arrive.
    """
    if dist.is_initialized():
        with named("barrier", what, group):  # of a tensor on the CPU: gloo's, which can fail here
            dist.all_reduce(torch.zeros(1), group=group)


@contextmanager
def named(call: str, what: str, group: _Group) -> Iterator[None]:
    """Turn a backend's error into one that names the call, its purpose, the group and the ranks.

    Raises:
        CollectiveError: in place of the backend's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        label = f"{call} of {what}"
        name = "all processes" if group is None else group.group_desc
        name = "all processes" if name == "default_pg" else name
        raise CollectiveError(
            f"{label} failed on rank {dist.get_rank()}; group: {name}, "
            f"ranks {', '.join(map(str, ranks))}. {_whereabouts(label, ranks)} "
            f"The backend said: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def watched(what: str) -> Iterator[None]:
    """Name what was being done when a collective failed that somebody else makes, as FSDP2 does.

    Other errors pass unchanged.

    Args:
        what: "the backward pass of step 7".

    Raises:
        CollectiveError: in place of a backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        known = any(words in str(error).lower() for words in _BACKEND_WORDS)
        if not dist.is_initialized() or not (known or isinstance(error, dist.DistError)):
            raise
        with named("a collective", what, None):
            raise


def _whereabouts(label: str, ranks: list[int]) -> str:
    """Tell the other ranks where this one failed, and return in words where they did."""
    others = [rank for rank in ranks if rank != dist.get_rank()]
    found: dict[int, str] = {}
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"opensora/failed/{dist.get_rank()}", label)
        until = time.monotonic() + _ASKING_S
        while len(found) < len(others) and time.monotonic() < until:
            for rank in others:
                key = f"opensora/failed/{rank}"
                if rank not in found and store.check([key]):
                    found[rank] = store.get(key).decode()
            time.sleep(0.05)
    except RuntimeError:  # the store's process is gone: then nobody can be asked
        return "So has the process that connects them, torchrun or rank 0: read its first error."
    silent = [str(rank) for rank in others if rank not in found]
    elsewhere = [f"rank {rank} was in {at}." for rank, at in found.items() if at != label]
    if silent:
        elsewhere.append(
            f"Not heard of: rank {', '.join(silent)}; read the first error there, and if it was "
            "only slow, start with a longer timeout_s."
        )
    return " ".join(elsewhere) or "All its ranks failed in this call."
