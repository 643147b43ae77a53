"""Write what a finished run trained: a transformer, a pipeline, or LoRA weights, all averaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.distributed.mesh import World
from opensora.errors import WeightsError
from opensora.export import export
from opensora.lora import save_lora
from opensora.models.stdit import STDiT3
from opensora.models.text_encoder import T5TextEncoder
from opensora.pipeline import OpenSoraPipeline
from opensora.schedulers.rflow import RFlow
from opensora.training.ema import EMA
from opensora.training.models import Models
from opensora.weight_sources import read_weights


def write_lora(models: Models, ema: EMA, folder: Path) -> Path:
    """Write the averaged LoRA weights; all processes call it."""
    with ema.swap():
        save_lora(models.transformer, folder / "lora")
    return folder / "lora"


def write_weights(
    models: Models,
    scheduler: RFlow,
    folder: Path,
    defaults: Mapping[str, Any],
    world: World,
) -> Path | None:
    """Write the averages of a run's newest checkpoint; returns where, if this process did.

    The transformer alone, or a pipeline if the text encoder was trained along: then into modules of
    their own, as those of the run may be sharded or compiled.

    Raises:
        WeightsError: the checkpoint cannot be read.
    """
    if not world.is_main:
        return None
    if models.train_text and models.vae is None:
        print(f"opensora export {folder} OUT --pipeline PIPELINE writes the weights", flush=True)
        return None
    if not models.train_text or models.text_encoder is None or models.vae is None:
        export(folder, folder / "transformer")
        return folder / "transformer"
    parts = read_weights(folder, ema=True).parts
    transformer = STDiT3(models.transformer.config)
    _fill(transformer, parts["transformer"], folder)
    encoder = T5TextEncoder.like(models.text_encoder)
    _fill(encoder.model, parts["text_encoder"], folder)
    pipeline = OpenSoraPipeline(
        transformer.eval(), models.vae, encoder.eval(), scheduler, defaults=dict(defaults)
    )
    pipeline.save_pretrained(folder / "pipeline", dtype=torch.bfloat16)
    return folder / "pipeline"


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load averages; a tensor that goes by two names was saved under the first."""
    first: dict[Tensor, str] = {}
    twice = {
        key: first[value]
        for key, value in module.state_dict(keep_vars=True).items()
        if first.setdefault(value, key) != key
    }
    every = {**tensors, **{key: tensors[name] for key, name in twice.items() if name in tensors}}
    try:
        module.load_state_dict(every)
    except RuntimeError as error:
        raise WeightsError(f"{folder}: {str(error).splitlines()[0]}") from error
