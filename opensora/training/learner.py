"""What takes a training step, without the data: models made ready, optimizer, clipping, loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opensora.config_file import suggest
from opensora.data.masks import MaskGenerator
from opensora.distributed.mesh import World
from opensora.errors import UsageError
from opensora.lora import add_lora
from opensora.models.stdit.parallelize import freeze, parallelize, recomputed_blocks
from opensora.schedulers.rflow import RFlow
from opensora.train_config import TrainConfig
from opensora.training.clip import AdaptiveClip, GradientClip
from opensora.training.models import FREEZING, Models
from opensora.training.objective import Objective
from opensora.training.optimizers import build_optimizer


@dataclass
class Learner:
    """Hold what takes a step.

    Attributes:
        world: processes.
        models: of the run.
        modules: what is trained and saved, by name, sharded.
        optimizer: of their parameters.
        clip: limits gradients.
        objective: losses of a batch.
    """

    world: World
    models: Models
    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    clip: GradientClip
    objective: Objective


def build_learner(config: TrainConfig, world: World, models: Models, scheduler: RFlow) -> Learner:
    """Freeze, add LoRA, recompute, compile and shard as configured, then build the optimizer.

    Raises:
        UsageError: an unknown key of lora or optimizer, an unknown policy, nothing to train.
    """
    freezing = {key: bool((config.model or {}).get(key, False)) for key in FREEZING}
    freeze(models.transformer, **freezing)
    if config.lora:
        add_lora(models.transformer, **arguments(config.lora, add_lora, "lora"))
    parallelize(
        models.transformer,
        world,
        checkpointing=config.checkpointing,
        compile=config.compile,
        # On a CPU autocast rounds the products, and sharded weights stay float32.
        dtype="fp32" if world.device.type == "cpu" else config.dtype,
        cpu_offload=config.cpu_offload,
    )
    modules = models.trained()
    weight = next(models.transformer.parameters())
    if isinstance(weight, DTensor) and "text_encoder" in modules:
        # An optimizer takes DTensors or tensors, not both.
        offload: dict[str, Any] = {}
        if config.cpu_offload:
            pin = world.device.type == "cuda"
            offload["offload_policy"] = CPUOffloadPolicy(pin_memory=pin)
        fully_shard(modules["text_encoder"], mesh=weight.device_mesh, **offload)
    named = [(f"{n}.{k}", p) for n, m in modules.items() for k, p in m.named_parameters()]
    settings = {"lr": config.lr, "eps": config.adam_eps, "weight_decay": config.weight_decay}
    given = arguments(config.optimizer or {}, build_optimizer, "optimizer")
    optimizer = build_optimizer(named, **{**settings, **given})
    masks = MaskGenerator(config.mask_ratios).masks if config.mask_ratios else None
    objective = Objective(config, models, scheduler, world.device, masks)
    return Learner(world, models, modules, optimizer, clip_of(config), objective)


def check_sections(config: TrainConfig) -> None:
    """Refuse settings of a learner before models are read, which may take minutes.

    Raises:
        UsageError: as `build_learner`.
    """
    arguments(config.lora or {}, add_lora, "lora")
    arguments(config.optimizer or {}, build_optimizer, "optimizer")
    recomputed_blocks(config.checkpointing, 1)
    if config.mask_ratios:
        MaskGenerator(config.mask_ratios)


def clip_of(config: TrainConfig) -> GradientClip:
    """Return what limits gradients."""
    if config.grad_clip == "adaptive":
        return AdaptiveClip()
    return GradientClip(None if config.grad_clip is None else float(config.grad_clip))


def arguments(section: Mapping[str, Any], function: Any, name: str) -> dict[str, Any]:
    """Return a section whose keys are arguments of a function that has defaults for them.

    Raises:
        UsageError: an unknown key.
    """
    known = [
        key
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    ]
    for key in section:
        if key not in known:
            raise UsageError(
                f"{name}: unknown key {key!r}{suggest(str(key), known)} (known: {', '.join(known)})"
            )
    return dict(section)
