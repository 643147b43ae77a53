"""opensora export CHECKPOINT OUT [--ema | --no-ema] [--part NAME | --pipeline FOLDER]
[--dtype fp32|bf16|fp16].

Write the weights of a training checkpoint as safetensors that inference loads. CHECKPOINT is a
checkpoint folder of opensora or of upstream (ColossalAI), or a run's folder, whose newest one is
taken. Moving averages are exported where there are any, unless --no-ema; --ema insists on them.

OUT becomes a model folder (config.json, model.safetensors). With --pipeline it becomes a whole
pipeline: the parts that were trained, and all others of that pipeline. Of a run that trained
several parts of a pipeline, --part exports one as a model folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from opensora.checkpoint import apply_renamings, check_finite, describe_mismatch, shapes_of
from opensora.devices import DTYPES
from opensora.errors import UsageError, WeightsError
from opensora.files import check_folder
from opensora.models.families import identify_family
from opensora.pipeline_folder import PARTS
from opensora.weight_saving import save_model
from opensora.weight_sources import Weights, read_weights

_CLASSES = {
    "STDiT3": ("opensora.models.stdit", "STDiT3"),
    "VideoAutoencoderPipeline": ("opensora.models.vae", "VideoAutoencoder"),
    "AutoencoderKL": ("opensora.models.vae", "AutoencoderKL"),
    "VAE_Temporal": ("opensora.models.vae", "VAETemporal"),
}


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    ema: bool | None = None,
    part: str | None = None,
    pipeline: str | None = None,
    dtype: torch.dtype | None = None,
) -> Weights:
    """Write the weights of a checkpoint as a model folder or, with `pipeline`, a pipeline folder.

    Args:
        source: checkpoint or run folder, ours or upstream's; any other source of weights too.
        out: folder to write; a model that is there stays until the new one is complete.
        ema: export moving averages; None does if there are any.
        part: name of the model to export, of a run that trained several.
        pipeline: pipeline whose other parts are taken: "tiny", a folder.
        dtype: of floating weights; None keeps each as stored.

    Returns:
        What was read.

    Raises:
        WeightsError: the checkpoint cannot be read, or its parts do not fit the pipeline.
        UsageError: `out` cannot be written, or the run has several parts and none is named.
        DoesNotFitError: no space is left.
    """
    out = Path(out)
    weights = read_weights(source, ema=ema)
    needed = sum(t.nbytes for tensors in weights.parts.values() for t in tensors.values())
    check_folder(out, needed)
    for owner, tensors in weights.parts.items():
        for name, tensor in tensors.items():
            check_finite(weights.source, f"{owner}.{name}" if owner else name, tensor)
            if dtype is not None and tensor.is_floating_point():
                tensors[name] = tensor.to(dtype)
    if pipeline is not None:
        _export_pipeline(weights, out, pipeline)
        return weights
    chosen = _choose(weights, part)
    save_model(_build(weights, chosen, weights.parts[chosen]), out)
    return weights


def _choose(weights: Weights, part: str | None) -> str:
    """Return the name of the part to export; what only training needs (a critic) does not count."""
    names = list(weights.parts)
    if part is not None and part not in names:
        raise UsageError(f"{weights.source} has no part {part!r}; it has {', '.join(names)}")
    wanted = [name for name in names if name in PARTS] or names
    if part is None and len(wanted) > 1:
        raise UsageError(
            f"{weights.source} holds {', '.join(wanted)}: name one (--part), or the pipeline that "
            "has the other parts, as in --pipeline tiny"
        )
    return part if part is not None else wanted[0]


def _build(weights: Weights, part: str, tensors: dict[str, Tensor]) -> nn.Module:
    """Return the model that tensors belong to, holding them."""
    family = weights.families.get(part) or identify_family(tensors)
    if family not in _CLASSES:
        raise WeightsError(
            f"{weights.source}: cannot export {part or 'these weights'} ({family}) as a model of "
            "its own; name the pipeline it belongs to (--pipeline)"
        )
    module, name = _CLASSES[family]
    cls: Any = getattr(import_module(module), name)
    config = weights.configs.get(part)
    if config is None:
        if not hasattr(cls, "infer_config"):
            raise WeightsError(f"{weights.source} has no config.json; put the model's beside it")
        parsed = cls.infer_config(shapes_of(tensors))
    else:
        parsed = cls.config_class.from_dict(config)
    with torch.device("meta"):
        model: nn.Module = cls(parsed)
    _put(model, weights.source, tensors)
    return model


def _put(model: nn.Module, source: str, tensors: dict[str, Tensor]) -> None:
    """Give a model its weights, in their dtype; ones on the meta device are replaced."""
    apply_renamings(model, tensors)
    wanted, given = shapes_of(model.state_dict()), shapes_of(tensors)
    if wanted != given:
        raise WeightsError(
            f"{source}: the weights do not fit {type(model).__name__}: "
            f"{describe_mismatch(wanted, given)}"
        )
    first = next(model.parameters())
    # Replacing would untie weights that go by two names.
    model.to(next(iter(tensors.values())).dtype)
    model.load_state_dict(tensors, assign=first.is_meta)


def _export_pipeline(weights: Weights, out: Path, pipeline: str) -> None:
    from opensora.models.text_encoder import grow_to_fit
    from opensora.pipeline import OpenSoraPipeline

    pipe = OpenSoraPipeline.from_pretrained(pipeline, device="cpu")
    for part, tensors in weights.parts.items():
        name = part or "transformer"
        if name == "text_encoder":
            pipe.text_encoder = grow_to_fit(pipe.text_encoder, tensors)
            _put(pipe.text_encoder.model, weights.source, tensors)
        elif name in PARTS:
            setattr(pipe, name, _build(weights, part, tensors))
    # Built anew: the parts are checked against each other.
    OpenSoraPipeline(**pipe.components, defaults=pipe.defaults).save_pretrained(out)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"opensora export: {message}; see opensora export --help")


def main(words: Sequence[str]) -> int:
    """Read the command line, export, and say what was written."""
    parser = _Parser(
        "opensora export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=None)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--part", metavar="NAME")
    kind.add_argument("--pipeline", metavar="FOLDER")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    given = parser.parse_args(words)
    weights = export(
        given.checkpoint,
        given.out,
        ema=given.ema,
        part=given.part,
        pipeline=given.pipeline,
        dtype=DTYPES.get(given.dtype),
    )
    what = "averaged weights" if weights.averaged else "weights"
    at = "" if weights.step is None else f" of step {weights.step}"
    print(f"wrote {given.out}: {what}{at} from {weights.source}")
    return 0
