"""Start and describe the processes of a run: who they are, and how they are grouped.

A run of P processes is a mesh with three named sides, replicate x shard x sequence = P. The ranks
of one `sequence` group split the tokens of the same batch; all others see different batches.
Parameters are sharded over `shard` and `sequence` together, and copied over `replicate` (HSDP).
Neighbouring ranks are of one sequence group, so that its traffic stays inside a machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opensora.devices import choose_device
from opensora.errors import UsageError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Describe this process and its place among the others.

    Attributes:
        rank: of this process, 0 to size - 1.
        size: processes of the run.
        local_rank: of this process on its machine.
        device: that it computes on.
        backend: "gloo", "cpu:gloo,cuda:nccl", or "" for a process on its own.
        sp_size: ranks that share one batch.
        replicate: copies of the sharded parameters.
        timeout_s: seconds after which a collective is given up.
        mesh: sides "replicate", "shard", "sequence"; None for a process on its own.
        shard_mesh: the same ranks as `fully_shard` takes them: one side of shard and sequence, or
            two, copies and shards (HSDP).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = ""
    sp_size: int = 1
    replicate: int = 1
    timeout_s: float = 1800.0
    mesh: DeviceMesh | None = None
    shard_mesh: DeviceMesh | None = None

    @property
    def dp_size(self) -> int:
        """Return how many batches are trained on at a time."""
        return self.size // self.sp_size

    @property
    def dp_rank(self) -> int:
        """Return which of those batches this process takes."""
        return self.rank // self.sp_size

    @property
    def sp_rank(self) -> int:
        """Return which part of its batch's tokens this process takes."""
        return self.rank % self.sp_size

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes what is written once: logs, clips."""
        return self.rank == 0

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that share this process's batch; None if it is the only one."""
        return None if self.mesh is None or self.sp_size == 1 else self.mesh.get_group("sequence")


def start(
    device: str | torch.device | None = None,
    sp_size: int = 1,
    replicate: int = 1,
    timeout_s: float = 1800.0,
) -> World:
    """Join the processes that torchrun started, or stand alone.

    Without torchrun's variables nothing is opened: no port, no process group.

    Args:
        device: "cpu", "cuda", ...; None: a GPU if there is one. "cuda" is this process's own.
        sp_size: ranks that share one batch (sequence parallelism).
        replicate: copies of the sharded parameters (HSDP); usually the number of machines.
        timeout_s: seconds until a collective is given up.

    Raises:
        UsageError: sizes that the number of processes cannot be divided into, a torchrun
            environment that is incomplete, or a device that is not there.
    """
    present = [name for name in _NEEDED if name in os.environ]
    alone = "RANK" not in present and "WORLD_SIZE" not in present
    if not alone and len(present) < len(_NEEDED):
        missing = ", ".join(name for name in _NEEDED if name not in present)
        raise UsageError(
            f"{', '.join(present)} are set but {missing} not: start every process with torchrun "
            "--nproc-per-node N SCRIPT, or unset them to run one process"
        )
    rank, size, local_rank = (
        (0, 1, 0) if alone else (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    )
    check_sizes(size, sp_size, replicate)
    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = choose_device(f"cuda:{local_rank}")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if alone:
        return World(device=chosen, timeout_s=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    world = World(rank, size, local_rank, chosen, backend, timeout_s=timeout_s)
    return divide(world, sp_size, replicate)


def divide(world: World, sp_size: int = 1, replicate: int = 1) -> World:
    """Return the same processes, grouped in another way; every rank must call it.

    Raises:
        UsageError: as `start`.
    """
    check_sizes(world.size, sp_size, replicate)
    world = replace(world, sp_size=sp_size, replicate=replicate)
    if not world.backend:
        return world
    sides = (replicate, world.size // replicate // sp_size, sp_size)
    names = ("replicate", "shard", "sequence")
    kind = world.device.type
    mesh = init_device_mesh(kind, sides, mesh_dim_names=names)
    if replicate == 1:
        shards = init_device_mesh(kind, (world.size,), mesh_dim_names=("shards",))
    else:
        two = (replicate, world.size // replicate)
        shards = init_device_mesh(kind, two, mesh_dim_names=("copies", "shards"))
    return replace(world, mesh=mesh, shard_mesh=shards)


def start_group_of_one(world: World) -> World:
    """Give a process on its own a mesh of one rank, which needs no network.

    For what only exists on meshes: `fully_shard` with its mixed precision.
    """
    if world.mesh is not None:
        return world
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return divide(replace(world, backend=backend))


def stop() -> None:
    """Leave the group; a process on its own has nothing to leave."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_sizes(size: int, sp_size: int, replicate: int) -> None:
    """Raise UsageError where processes cannot be divided like that, and say how they can."""
    if sp_size < 1 or replicate < 1:
        raise UsageError(f"sp_size {sp_size} and replicate {replicate} must be 1 or more")
    if size % (sp_size * replicate) == 0:
        return
    fits = [n for n in range(1, size + 1) if size % (n * replicate) == 0]
    if sp_size > 1 and fits:
        raise UsageError(
            f"sp_size {sp_size} x replicate {replicate} does not divide the {size} processes of "
            f"this run: use an sp_size of {' or '.join(map(str, fits))}, or start a multiple of "
            f"{sp_size * replicate} processes (torchrun --nproc-per-node {sp_size * replicate})"
        )
    raise UsageError(
        f"replicate {replicate} does not divide the {size} processes of this run: use replicate 1, "
        f"or start a multiple of {sp_size * replicate} processes"
    )


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdigit():
        raise UsageError(f"{name}={text!r} is not a number: torchrun sets it, or unset it")
    return int(text)
