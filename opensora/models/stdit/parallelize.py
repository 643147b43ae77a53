"""Prepare an STDiT3 for training on one or many processes: freeze, recompute, compile, shard.

The order is fixed: activation checkpointing inside, then compilation block by block, then FSDP2
around every block and around the whole. Ranks of one sequence group then share the tokens of a
batch (`shards.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from opensora.config_file import suggest
from opensora.devices import DTYPES
from opensora.distributed.mesh import World, start_group_of_one
from opensora.distributed.sequence import Sequence
from opensora.errors import UsageError
from opensora.models.stdit.model import STDiT3

# Of these the "ops" policy keeps the results: they cost the most to compute again.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
_OURS = ("spatial_attention_forward", "temporal_attention_forward", "cross_attention_forward")

# Every bucket of a run may be a graph of its own; torch's 8 are fewer than upstream's buckets.
_GRAPHS = 128


def freeze(
    model: STDiT3, *, only_train_temporal: bool = False, freeze_y_embedder: bool = False
) -> None:
    """Stop the training of some parameters; call it before `parallelize` and the optimizer.

    Args:
        model: the model.
        only_train_temporal: train the temporal blocks alone.
        freeze_y_embedder: keep the projection of the text.
    """
    if only_train_temporal:
        model.requires_grad_(False)
        model.temporal_blocks.requires_grad_(True)
    if freeze_y_embedder:
        model.y_embedder.requires_grad_(False)


def parallelize(
    model: STDiT3,
    world: World,
    *,
    checkpointing: str = "none",
    compile: bool = False,  # noqa: A002
    backend: str = "inductor",
    dtype: str = "bf16",
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
    shard: bool | None = None,
) -> STDiT3:
    """Change a model in place, and return it.

    Sharded parameters are float32 DTensors, gathered in `dtype` while they are used; gradients are
    averaged over *all* ranks in float32 (see `opensora.distributed.sequence` for why that is right
    with sequence parallelism). Without sharding parameters and arithmetic stay as they are, and
    `reduce_gradients` averages.

    Args:
        model: on any device, its parameters in float32 and equal on all ranks. It goes to the
            world's device.
        world: from `opensora.distributed.mesh.start`.
        checkpointing: "none"; "full": every block; "every-N": every Nth block; "first-N": the
            first N blocks; "ops": every block, but keep products and attention. Blocks count in
            running order, spatial and temporal.
        compile: compile every block by itself.
        backend: of the compiler.
        dtype: "bf16", "fp32" or "fp16": of gathered parameters and of activations.
        cpu_offload: keep parameters, gradients and the optimizer's state on the CPU.
        reshard_after_forward: free a block's gathered parameters between forward and backward.
        shard: wrap with FSDP2; None: with several processes, or a dtype that is not fp32.

    Raises:
        UsageError: an unknown policy or dtype, parameters that are not float32, or cpu_offload or a
            dtype that only sharded parameters can have.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown{suggest(dtype, DTYPES)} (fp32, bf16, fp16)")
    wide = DTYPES[dtype] == torch.float32
    shard = (world.size > 1 or not wide or cpu_offload) if shard is None else shard
    if not shard and (cpu_offload or not wide):
        asked = "cpu_offload" if cpu_offload else f"dtype {dtype}"
        raise UsageError(f"{asked} needs sharded parameters: leave shard at None, or use fp32")
    found = {p.dtype for p in model.parameters()} - {torch.float32}
    if shard and found:
        raise UsageError(
            f"the model has parameters of {found.pop()}; training keeps them in float32 and casts "
            "them in use: load it with dtype=torch.float32 and ask for the other type here"
        )
    set_checkpointing(model, checkpointing)
    if not cpu_offload:
        model.to(world.device)
    if compile:
        compile_blocks(model, backend, inside_hooks=shard)
    if shard:
        _shard(model, world, DTYPES[dtype], cpu_offload, reshard_after_forward)
    model.sequence = Sequence.of(world)
    return model


def set_checkpointing(model: STDiT3, policy: str) -> None:
    """Choose which blocks are computed again in the backward pass; see `parallelize`.

    Raises:
        UsageError: an unknown policy.
    """
    blocks = model.blocks()
    for block, recompute in zip(blocks, recomputed_blocks(policy, len(blocks)), strict=True):
        block.recompute = recompute
        if policy == "ops":
            block.recompute_context = _selective_contexts


def recomputed_blocks(policy: str, blocks: int) -> list[bool]:
    """Tell for every block, in running order, whether a policy computes it again.

    Raises:
        UsageError: an unknown policy.
    """
    kind, _, number = policy.partition("-")
    if kind in ("every", "first") and number.isdigit() and int(number) > 0:
        n = int(number)
        return [i % n == n - 1 if kind == "every" else i < n for i in range(blocks)]
    if policy in ("none", "full", "ops"):
        return [policy != "none"] * blocks
    hint = suggest(policy, ("none", "full", "ops", "every-2", "first-2"))
    raise UsageError(
        f"checkpointing {policy!r} is unknown{hint} (none, full, every-N, first-N, ops)"
    )


def compile_blocks(model: STDiT3, backend: str = "inductor", *, inside_hooks: bool = False) -> None:
    """Compile every block by itself.

    Args:
        model: the model.
        backend: of the compiler.
        inside_hooks: leave what FSDP2 does before and after a block out of its graph.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    for block in model.blocks():
        if inside_hooks:
            block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
        else:
            block.compile(backend=backend)


def _shard(
    model: STDiT3, world: World, dtype: torch.dtype, cpu_offload: bool, reshard: bool
) -> None:
    mesh = start_group_of_one(world).shard_mesh
    # The model casts its inputs itself; sizes and frame rates must keep theirs.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for block in model.blocks():
        block.adds_table = True
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)


def _kept_ops() -> frozenset[Any]:
    names = [(torch.ops.aten, name) for name in (*_PRODUCTS, *_ATTENTION)]
    names += [(torch.ops.opensora, name) for name in _OURS]
    return frozenset(
        getattr(library, name).default for library, name in names if hasattr(library, name)
    )


def _policy(kept: frozenset[Any], _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, _kept_ops()))
