"""Put weights into a model to start a new training run from, adapting what is close to it.

For loading a model as it was saved see `opensora.checkpoint.load_model`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from opensora.checkpoint import apply_renamings, check_finite, describe_mismatch, shapes_of
from opensora.errors import WeightsError
from opensora.models.families import UNKNOWN, identify_family
from opensora.weight_sources import read_weights

log = logging.getLogger("opensora")

_EMBEDDING = "y_embedder.y_embedding"
_COMPUTED = ("pos_embed", "pos_embed_temporal")


@dataclass(frozen=True)
class Report:
    """What `load_weights` did.

    Attributes:
        source: that the weights came from.
        loaded: names that were taken.
        missing: names of the model that the source lacks; they keep their values.
        unexpected: names that the model lacks.
        wrong_shape: names whose shapes differ; they keep their values.
        adapted: what was changed to make weights fit, one sentence each.
        averaged: the weights are moving averages.
        step: optimizer steps that the source had taken, None if unknown.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    adapted: tuple[str, ...]
    averaged: bool
    step: int | None


@torch.no_grad()
def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    ema: bool = False,
    strict: bool = True,
    part: str | None = None,
) -> Report:
    """Copy weights into `model`; no optimizer, counters or random states are read.

    Weights of PixArt, DiT and Latte are adapted: see `adapt`. The model keeps its dtype, device and
    sharding; every rank reads the source by itself.

    Args:
        model: of any sharding.
        source: checkpoint or run folder, ours or upstream's; HF-style folder; .safetensors, .pt,
            .pth, .bin or .ckpt file; hub id.
        ema: take the moving averages.
        strict: all names and shapes must fit; otherwise what fits is taken and the rest is listed
            in a warning.
        part: name of the model in a run that trained several; None takes the one that fits.

    Raises:
        WeightsError: nothing there fits, or not all with `strict`; files are missing, damaged or
            unsafe; a value is NaN or infinite. The model is as it was.
    """
    weights = read_weights(source, ema=ema)
    state = {k: v for k, v in get_model_state_dict(model).items() if isinstance(v, Tensor)}
    wanted = shapes_of(state)
    tensors = _choose_part(weights.source, weights.parts, wanted, part)
    family = identify_family(tensors)
    adapted = adapt(tensors, wanted)
    apply_renamings(model, tensors)
    given = shapes_of(tensors)
    fitting = [name for name, shape in given.items() if wanted.get(name) == shape]
    if wanted != given or not fitting:
        what = "" if family == UNKNOWN else f" (these are of {family})"
        mismatch = describe_mismatch(wanted, given)
        if strict or not fitting:
            advice = "; in Python, load_weights(..., strict=False) takes what fits"
            raise WeightsError(
                f"{weights.source}: the weights do not fit this {type(model).__name__}{what}: "
                f"{mismatch}{advice if fitting else ''}"
            )
        log.warning("%s%s: %d taken; %s", weights.source, what, len(fitting), mismatch)
    for name in fitting:
        check_finite(weights.source, name, tensors[name])
    for name in fitting:
        target, value = state[name], tensors[name]
        if isinstance(target, DTensor):
            # Every rank has the whole tensor: it takes its own part and nothing is sent.
            value = value.to(target.device)
            value = distribute_tensor(
                value, target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(value)
    for sentence in adapted:
        log.info("%s: %s", weights.source, sentence)
    log.info("loaded %d of %d tensors from %s", len(fitting), len(wanted), weights.source)
    return Report(
        weights.source,
        tuple(fitting),
        tuple(name for name in wanted if name not in given),
        tuple(name for name in given if name not in wanted),
        tuple(n for n in given if n in wanted and wanted[n] != given[n]),
        tuple(adapted),
        weights.averaged,
        weights.step,
    )


def adapt(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """Change weights of related image and video models in place to fit; return what was changed.

    * PixArt-Sigma's "blocks." become "spatial_blocks." where the model has those.
    * 2D patch weights [C, c, h, w] get a frame axis, [C, c, 1, h, w].
    * Position tables are dropped: they are computed.
    * The null caption [L, C] is cut, or extended by copies of its last row.

    Args:
        tensors: the weights by name.
        wanted: the model's shapes by name.
    """
    done = []
    spatial = any(name.startswith("spatial_blocks.") for name in wanted)
    if spatial and not any(name.startswith("spatial_blocks.") for name in tensors):
        names = [name for name in tensors if name.startswith("blocks.")]
        for name in names:
            tensors[f"spatial_{name}"] = tensors.pop(name)
        if names:
            done.append(f"{len(names)} tensors of blocks. taken as spatial_blocks.")
    patch = "x_embedder.proj.weight"
    if patch in tensors and tensors[patch].ndim == 4 and len(wanted.get(patch, ())) == 5:
        tensors[patch] = tensors[patch].unsqueeze(2)
        done.append("image patches taken as patches of one frame")
    for name in _COMPUTED:
        if name in tensors and name not in wanted:
            del tensors[name]
            done.append(f"{name} dropped: it is computed")
    if _EMBEDDING in tensors and _EMBEDDING in wanted:
        null, length = tensors[_EMBEDDING], wanted[_EMBEDDING][0]
        if null.ndim == 2 and len(null) != length:
            extra = null[-1:].expand(max(0, length - len(null)), -1)
            tensors[_EMBEDDING] = torch.cat([null[:length], extra])
            done.append(f"null caption of {len(null)} tokens made {length} long")
    return done


def _choose_part(
    source: str,
    parts: dict[str, dict[str, Tensor]],
    wanted: dict[str, tuple[int, ...]],
    part: str | None,
) -> dict[str, Tensor]:
    """Return the tensors of one model of a run."""
    if part is not None and part in parts:
        return parts[part]
    fitting = [name for name, tensors in parts.items() if tensors.keys() == wanted.keys()]
    if part is None and len(parts) > 1 and len(fitting) == 1:
        return parts[fitting[0]]
    if len(parts) == 1 and (part is None or "" in parts):
        return next(iter(parts.values()))
    raise WeightsError(
        f"{source} holds {', '.join(parts)}; "
        + (f"there is no {part!r}" if part is not None else "say which of them to load (part=)")
    )
