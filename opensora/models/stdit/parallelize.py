"""Prepare an STDiT3 for training on one or many processes: freeze, recompute, compile, shard.

The order is fixed: activation checkpointing inside, then compilation block by block, then FSDP2
around every block and around the whole.
"""

from __future__ import annotations

from opensora.distributed.mesh import World
from opensora.models.stdit.model import STDiT3


def freeze(
    model: STDiT3, *, only_train_temporal: bool = False, freeze_y_embedder: bool = False
) -> None:
    """Stop the training of some parameters; call it before `parallelize`."""
    raise NotImplementedError


def parallelize(
    model: STDiT3,
    world: World,
    *,
    checkpointing: str = "none",
    compile: bool = False,  # noqa: A002
    dtype: str = "bf16",
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
    shard: bool | None = None,
) -> STDiT3:
    """Change a model in place, and return it.

    Args:
        model: on the CPU or on the world's device, its parameters in float32.
        world: from `opensora.distributed.mesh.start`.
        checkpointing: "none"; "full": every block; "every-N": every Nth block; "first-N": the
            first N blocks; "ops": keep products and attention, compute the rest again.
        compile: compile every block by itself.
        dtype: "bf16", "fp32" or "fp16": of the gathered parameters and of activations.
        cpu_offload: keep parameters, gradients and the optimizer's state on the CPU.
        reshard_after_forward: free a block's gathered parameters between forward and backward.
        shard: wrap with FSDP2; None: with several processes, or a dtype that is not fp32.
    """
    raise NotImplementedError
