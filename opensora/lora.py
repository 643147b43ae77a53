"""Train small updates of a frozen model's linears: W + (alpha / rank) * B A (Hu et al., 2021).

    add_lora(model, rank=16)                   # only the new matrices train
    save_lora(model, "style")                  # PEFT's layout: one safetensors, adapter_config.json
    load_lora(model, "style")                  # to go on training
    with_them = LoraBlend(model); with_them.add("style", 0.8)   # inference at the cost of none

Names of the model's own tensors do not change: beside `attn.qkv.weight` there are then
`attn.qkv.lora_A.weight` [rank, in] and `attn.qkv.lora_B.weight` [out, rank].
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from opensora.errors import UsageError, WeightsError
from opensora.linear import Linear
from opensora.lora_blend import (
    LoraBlend,
    add_updates,
    check_whole,
    get_linear,
    listing,
    match,
    replace_module,
)
from opensora.lora_files import read_lora, write_lora
from opensora.lora_layer import LoraLinear

__all__ = [
    "TARGETS",
    "LoraBlend",
    "LoraLinear",
    "add_lora",
    "find_targets",
    "load_lora",
    "lora_layers",
    "merge_lora",
    "remove_lora",
    "save_lora",
    "unmerge_lora",
]

#: Every linear of STDiT's blocks, by the end of its name.
TARGETS = (
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "mlp.fc1",
    "mlp.fc2",
)
ALL_LINEAR = "all-linear"


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] | str = TARGETS,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[str]:
    """Freeze a model and give linears updates that train; the output is what it was, as B is zero.

    Call it before `compile` and `fully_shard`.

    Args:
        model: changed in place; all its parameters stop requiring gradients.
        rank: of the updates.
        alpha: the updates are scaled by alpha / rank; None: alpha = rank.
        targets: names, or ends of names, of linears; "all-linear"; or, as one string, a regular
            expression of whole names, e.g. "temporal_blocks.+".
        dropout: of the inputs of the updates, [0, 1).
        dtype: of the updates; None: that of the linears.
        seed: of the matrices A, which are the same on every rank whatever was drawn before.

    Returns:
        Names of the linears.

    Raises:
        UsageError: nothing matches, a target matches nothing or no linear, or updates are there.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UsageError(f"lora: rank must be a whole number >= 1, got {rank!r}")
    if not 0 <= dropout < 1:
        raise UsageError(f"lora: dropout must be in [0, 1), got {dropout!r}")
    if next(lora_layers(model), None):
        raise UsageError("lora: the model has updates already; remove_lora(model) takes them off")
    names = find_targets(model, targets)
    scaling = (rank if alpha is None else alpha) / rank
    model.requires_grad_(False)
    for name in names:
        layer = LoraLinear(get_linear(model, name), rank, scaling, dropout, dtype)
        layer.reset(zlib.crc32(name.encode()) + seed)
        replace_module(model, name, layer)
    return names


def find_targets(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Return the names of linears that targets mean, in the model's order; see `add_lora`.

    Raises:
        UsageError: a target matches nothing, or nothing that is a linear.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if targets == ALL_LINEAR:
        return names
    if isinstance(targets, str):
        try:
            found = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise UsageError(f"lora: {targets!r} is no regular expression: {error}") from None
        if not found:
            raise UsageError(f"lora: no linear has a name of the form {targets!r}; {_some(names)}")
        return found
    matched = {t: [n for n in names if n == t or n.endswith(f".{t}")] for t in targets}
    wrong = [target for target, found in matched.items() if not found]
    if wrong or not matched:
        raise UsageError(
            f"lora: no linear is named {', '.join(map(repr, wrong)) or 'by an empty list'}; "
            f"{_some(names)}"
        )
    chosen = set().union(*matched.values())
    return [name for name in names if name in chosen]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield name and layer of every linear with an update."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            # torch.compile and checkpoint wrappers put themselves into names.
            yield re.sub(r"(_orig_mod|_checkpoint_wrapped_module)\.", "", name), module


def merge_lora(model: nn.Module) -> None:
    """Add the updates to the weights: rounded once, and then as fast as without updates.

    Raises:
        UsageError: the model has none, or is sharded.
    """
    for layer in _layers(model):
        if not layer.merged:
            check_whole(layer.weight)
            kept = layer.weight.detach().clone()
            add_updates(layer.weight, kept, [(layer.update(), 1.0)])
            layer.kept = kept


def unmerge_lora(model: nn.Module) -> None:
    """Put the weights back, bit for bit; the updates stay beside them and can train again.

    Raises:
        UsageError: the model has no updates.
    """
    for layer in _layers(model):
        if layer.kept is not None:
            with torch.no_grad():
                layer.weight.copy_(layer.kept)
            layer.kept = None


def remove_lora(model: nn.Module) -> None:
    """Make plain linears of the layers again, with the weights they have now (merged or not)."""
    for name, layer in list(lora_layers(model)):
        plain = Linear(layer.in_features, layer.out_features, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        replace_module(model, name, plain.train(layer.training))


def save_lora(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the updates under PEFT's names; see `opensora.lora_files.write_lora`.

    Of a sharded model every rank must call it; the first one writes.

    Raises:
        UsageError: the model has none, or the path cannot be written.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise UsageError("lora: the model has no updates to save; add_lora(model) makes them")
    updates = {name: layer.update() for name, layer in layers.items()}
    ranked = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not ranked or torch.distributed.get_rank() == 0:
        rate = next(iter(layers.values())).dropout_rate
        write_lora(path, updates, dropout=rate, metadata=metadata)


def load_lora(
    model: nn.Module,
    source: str | os.PathLike[str],
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Give a model the updates of a file, to go on training them.

    A model that has updates must have them where the file has; one without gets layers like the
    file's, and is frozen but for them.

    Returns:
        Names of the linears.

    Raises:
        WeightsError: the file cannot be read, or is of another model: names and shapes are listed.
    """
    updates = match(model, read_lora(source))
    layers = dict(lora_layers(model))
    if not layers:
        model.requires_grad_(False)
        for name, update in updates.items():
            rank = update.down.shape[0]
            layers[name] = LoraLinear(get_linear(model, name), rank, update.scaling, dropout, dtype)
            replace_module(model, name, layers[name])
    differing = sorted(layers.keys() ^ updates.keys()) or [
        f"{name} of rank {updates[name].down.shape[0]} instead of {layer.rank}"
        for name, layer in layers.items()
        if updates[name].down.shape[0] != layer.rank
    ]
    if differing:
        raise WeightsError(
            f"{source}: the model's updates differ from the file's: {listing(differing)}"
        )
    for name, layer in layers.items():
        layer.scaling = updates[name].scaling
        _fill(layer.lora_A.weight, updates[name].down)
        _fill(layer.lora_B.weight, updates[name].up)
    return list(updates)


def _layers(model: nn.Module) -> list[LoraLinear]:
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise UsageError("lora: the model has no updates; add_lora or load_lora makes them")
    return layers


@torch.no_grad()
def _fill(parameter: Tensor, value: Tensor) -> None:
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )  # every rank has read the file
    parameter.copy_(value)


def _some(names: Sequence[str]) -> str:
    return f"its linears are {listing(names, 8)}"
