"""Find and write pipeline folders.

model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from opensora.checkpoint import save_model
from opensora.errors import WeightsError
from opensora.files import write_error, write_text

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline

TINY = "tiny"
INDEX = "model_index.json"

#: The parts with weights.
PARTS = ("transformer", "vae", "text_encoder")


def pipeline_folder(source: str) -> Path | None:
    """Return the folder of a pipeline, built in or named; None for anything else."""
    if source == TINY and not Path(source).exists():
        folder = Path(str(files("opensora") / "assets" / TINY))
        if not (folder / INDEX).is_file():
            raise WeightsError(
                f"this installation has no built-in model ({folder} is missing): install opensora "
                "again, or name weights with --ckpt-path"
            )
        return folder
    path = Path(source).expanduser()
    return path if (path / INDEX).is_file() else None


def save_pipeline(pipe: OpenSoraPipeline, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a pipeline folder; `model_index.json`, which makes it one, is written last.

    Args:
        pipe: the pipeline.
        folder: made if missing.
        dtype: type of stored matrices, None for that of the weights. Vectors and scalars keep
            theirs: they are small, and rotary frequencies or latent scales suffer most.

    Raises:
        DoesNotFitError, UsageError, WeightsError: the folder cannot be written.
    """
    encoder = copy.copy(pipe.text_encoder)
    try:
        save_model(_cast(pipe.transformer, dtype), folder / "transformer")
        save_model(_cast(pipe.vae, dtype), folder / "vae")
        if dtype is not None:
            encoder = copy.deepcopy(pipe.text_encoder)
            encoder.model = encoder.model.to(dtype)
        encoder.save_pretrained(folder)
        pipe.scheduler.save_pretrained(folder)
    except OSError as error:
        raise write_error(folder, error) from error
    index = {
        "_class_name": "OpenSoraPipeline",
        "transformer": ["opensora", type(pipe.transformer).__name__],
        "vae": ["opensora", type(pipe.vae).__name__],
        "text_encoder": ["opensora", type(pipe.text_encoder).__name__],
        "scheduler": ["opensora", type(pipe.scheduler).__name__],
        "defaults": pipe.defaults,
    }
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _cast(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy with its matrices cast; the module itself if there is nothing to cast."""
    if dtype is None:
        return module
    module = copy.deepcopy(module)
    for weight in module.parameters():
        if weight.ndim > 1 and weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return module
