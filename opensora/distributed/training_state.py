"""Take the state of a training run apart into named tensors and JSON, and put it back together.

Names: `model.NAME.KEY`, `ema.NAME.KEY`, `optimizer.NAME.KEY.FIELD`, `rng.RANK.GENERATOR`,
`extra.PATH`; NAME is the key in `modules`, KEY upstream's name of the tensor. Tensors that are
DTensors stay so: every rank saves and loads its own part.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from opensora.distributed.checkpoint_index import Index
from opensora.errors import WeightsError

log = logging.getLogger("opensora")
Tensors = dict[str, Tensor]

_TENSOR = "__tensor__"


class Averages(Protocol):
    """Moving averages of weights.

    Attributes:
        state: "NAME.KEY" -> float32 tensor, sharded as the weight is.
        updates: how often they were updated.
    """

    state: dict[str, Tensor]
    updates: int


def model_tensors(modules: Mapping[str, nn.Module]) -> Tensors:
    """Return the live weights and buffers, without what compile and checkpoint wrappers add.

    A weight that goes by two names (T5's embedding) is there by the first.
    """
    found: Tensors = {}
    for name, module in modules.items():
        if not module.state_dict():
            continue  # get_model_state_dict refuses it
        other_names = ties(module)
        for key, value in get_model_state_dict(module).items():
            if isinstance(value, Tensor) and key not in other_names:
                found[f"model.{name}.{key}"] = value
    return found


def average_tensors(ema: Averages | None, modules: Mapping[str, nn.Module]) -> Tensors:
    """Return the moving averages, live.

    Raises:
        ValueError: their names do not begin with names of modules.
        RuntimeError: weights and averages are swapped at present.
    """
    if ema is None:
        return {}
    if getattr(ema, "swapped", False):
        raise RuntimeError("a checkpoint was asked for while the modules hold the averages")
    stray = [key for key in ema.state if key.partition(".")[0] not in modules]
    if stray:
        raise ValueError(f"the average {stray[0]!r} is of none of the modules {list(modules)}")
    return {f"ema.{key}": value for key, value in ema.state.items()}


def ties(module: nn.Module) -> dict[str, str]:
    """Return the further names of weights that go by several -> their first name."""
    first: dict[Tensor, str] = {}
    others: dict[str, str] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        plain = _plain(key)
        if first.setdefault(parameter, plain) != plain:
            others[plain] = first[parameter]
    return others


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def describe_modules(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Return what exporting needs to know of each module: family, config, ties, as it has them."""
    found = {}
    for name, module in modules.items():
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        config = to_dict() if to_dict is not None else None
        found[name] = {
            "family": getattr(module, "family", None),
            "config": config if _is_json(config) else None,
            "ties": ties(module),
        }
    return found


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[Tensor, str]:
    """Name every parameter as `model_tensors` does; one that goes by two names has the first."""
    names: dict[Tensor, str] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            names.setdefault(parameter, f"{name}.{_plain(key)}")
    return names


def optimizer_tensors(
    optimizer: Optimizer, names: Mapping[Tensor, str]
) -> tuple[Tensors, dict[str, Any]]:
    """Return an optimizer's tensors by parameter name, and all else as JSON.

    `torch.distributed.checkpoint.state_dict` is not used here: it takes a step on an optimizer that
    has no state yet, and casts float32 state to the parameters' dtype on the way back.
    """
    tensors: Tensors = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise ValueError("the optimizer has a parameter that is in none of the modules")
        for field, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}.{field}"] = value
            else:
                values.setdefault(names[parameter], {})[field] = value
    groups = [
        {key: value for key, value in group.items() if key != "params" and _is_json(value)}
        for group in optimizer.param_groups
    ]
    return tensors, {"values": values, "groups": groups}


def optimizer_targets(
    optimizer: Optimizer, names: Mapping[Tensor, str], index: Index, prefix: str
) -> Tensors:
    """Return empty tensors for the optimizer state that is stored, sharded as the parameters are.

    Args:
        optimizer: as it was when the state was saved, with or without state of its own.
        names: of its parameters.
        index: of the checkpoint.
        prefix: of the names in the index.
    """
    fields: dict[str, list[str]] = {}
    for key in index.tensors:
        if key.startswith(prefix):
            name, _, field = key.removeprefix(prefix).rpartition(".")
            fields.setdefault(name, []).append(field)
    targets: Tensors = {}
    for group in optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            for field in fields.get(names[parameter], ()):
                stored = index.tensors[f"{prefix}{names[parameter]}.{field}"]
                if stored.shape == tuple(parameter.shape) and field != "step":
                    target = torch.empty_like(parameter, dtype=stored.dtype, requires_grad=False)
                else:
                    device = parameter.device if on_device or field != "step" else "cpu"
                    target = torch.empty(stored.shape, dtype=stored.dtype, device=device)
                targets[f"{prefix}{names[parameter]}.{field}"] = target
    if unused := sum(key.startswith(prefix) for key in index.tensors) - len(targets):
        log.warning("%d tensors of the optimizer state are of parameters not trained now", unused)
    return targets


def restore_optimizer(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Give an optimizer its state back; hyperparameters of the present configuration stay.

    Args:
        optimizer: its state is replaced.
        names: of its parameters.
        tensors: "NAME.KEY.FIELD" -> tensor, taken over without a copy.
        values: the JSON of `optimizer_tensors`.

    Raises:
        WeightsError: it is of an optimizer of another kind.
    """
    count, stored = len(optimizer.param_groups), len(values["groups"])
    if count != stored:
        raise WeightsError(
            f"the optimizer has {count} groups of parameters, that of the checkpoint had {stored}: "
            "go on with the optimizer it was saved with, or take the weights alone "
            "(--start-from-scratch)"
        )
    fields: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        fields.setdefault(name, {})[field] = tensor
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            state = {**fields.get(name, {}), **values["values"].get(name, {})}
            if state:
                optimizer.state[parameter] = state
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        for key, value in saved.items():
            present = group.get(key)
            if isinstance(present, tuple):
                value = tuple(value)
            configured = key in optimizer.defaults or key == "initial_lr"
            if key == "lr" or not configured:
                group[key] = value
            elif value != present:
                log.warning(
                    "%s was %s in the checkpoint and is %s in the configuration: %s is taken",
                    key,
                    value,
                    present,
                    present,
                )


def read_generators(rank: int) -> Tensors:
    """Return the state of this rank's random generators as uint8 tensors."""
    states: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    states["python"] = _text_tensor([version, list(words), gauss])
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = _text_tensor([kind, keys.tolist(), *rest])
    return {f"rng.{rank}.{name}": state for name, state in states.items()}


def restore_generators(rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Set this rank's generators to the states of `read_generators`."""
    for name, state in tensors.items():
        match name.removeprefix(f"rng.{rank}."):
            case "cpu":
                torch.set_rng_state(state)
            case "cuda" if torch.cuda.is_available():
                torch.cuda.set_rng_state(state)
            case "python":
                version, words, gauss = _read_text_tensor(state)
                random.setstate((version, tuple(words), gauss))
            case "numpy" if numpy := sys.modules.get("numpy"):
                kind, keys, *rest = _read_text_tensor(state)
                numpy.random.set_state((kind, numpy.array(keys, dtype="uint32"), *rest))


def split_extra(value: Any, path: str, tensors: Tensors) -> Any:
    """Return `value` with its tensors moved to `tensors` under `path` and named in their place.

    Raises:
        TypeError: something in it is neither JSON nor a tensor.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {str(k): split_extra(v, f"{path}.{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [split_extra(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
    if not _is_json(value):
        raise TypeError(f"{path} is a {type(value).__name__}; expected JSON values or tensors")
    return value


def join_extra(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `split_extra`; tuples come back as lists."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: join_extra(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [join_extra(inner, tensors) for inner in value]
    return value


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    return value is None or isinstance(value, str | bool | int | float)


def _text_tensor(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _read_text_tensor(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
