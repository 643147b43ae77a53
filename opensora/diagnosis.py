"""Find the layer where NaN or infinity first appears, by running a call once more with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class _Found(Exception):  # noqa: N818  it stops the run, it is no error
    """Carry the name of the first bad layer out of the forward."""


def is_finite(x: Tensor) -> bool:
    """Tell whether every value is finite: one sum, and a look at each value only if that fails."""
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def find_bad_layer(model: nn.Module, call: Callable[[], Any]) -> str | None:
    """Name the first layer whose output is not finite, in the order in which layers finish.

    Args:
        model: its submodules are watched; compiled blocks are run as they are.
        call: runs the model once more on the inputs that went wrong.

    Returns:
        "temporal_blocks.3.mlp.fc1", with what is known about the cause, or None if every layer
        was finite this time.
    """
    handles = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(not is_finite(tensor) for tensor in _tensors(output)):
                raise _Found(_describe(name, module, inputs))

        return hook

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(watch(name)))
        with torch.no_grad():
            call()
    except _Found as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
    return None


def _describe(name: str, module: nn.Module, inputs: Any) -> str:
    """Say whether the layer's own weights, its inputs or its arithmetic are at fault."""
    for key, weight in module.named_parameters():
        if not is_finite(weight.detach()):
            return f"{name} (its weight {key} holds NaN or infinity)"
    if any(not is_finite(tensor) for tensor in _tensors(inputs)):
        return f"{name} (its input already was not finite)"
    return name


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
