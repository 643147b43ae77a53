"""Fit the updates of LoRA files to a model, and add a weighted sum of them to its weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opensora.errors import UsageError, WeightsError
from opensora.lora_files import LoraFile, LoraUpdate, read_lora


class LoraBlend:
    """Hold a model's weights plus a weighted sum of updates, for inference at no extra cost.

    The sum is made anew in float32 at every change and rounded once, so the order does not matter
    and `clear` gives the first weights back bit for bit. That needs a copy of the weights that are
    touched, on the CPU.

    Args:
        model: changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: dict[str, Tensor] = {}
        self._parts: list[tuple[dict[str, LoraUpdate], float]] = []

    def add(self, source: str | os.PathLike[str], weight: float = 1.0) -> None:
        """Add the updates of a file, times `weight`.

        Raises:
            WeightsError: it cannot be read, or is of another model.
        """
        updates = match(self.model, read_lora(source))
        for name in updates:
            check_whole(get_linear(self.model, name).weight)
            if name not in self._kept:
                self._kept[name] = get_linear(self.model, name).weight.detach().to("cpu", copy=True)
        self._parts.append((updates, weight))
        self._sum(updates)

    def clear(self) -> None:
        """Put the first weights back."""
        self._parts.clear()
        self._sum(self._kept)
        self._kept.clear()

    def _sum(self, names: Iterable[str]) -> None:
        for name in names:
            terms = [(part[name], factor) for part, factor in self._parts if name in part]
            add_updates(get_linear(self.model, name).weight, self._kept[name], terms)


def match(model: nn.Module, file: LoraFile) -> dict[str, LoraUpdate]:
    """Return linear -> update of a file whose modules the model must have, with their shapes.

    Raises:
        WeightsError: it has not; lists the modules and shapes.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    flat = {name.replace(".", "_"): name for name in linears}  # kohya's names have no dots
    found: dict[str, LoraUpdate] = {}
    unknown, wrong = [], []
    for key, update in file.updates.items():
        name = key if key in linears else flat.get(key, "")
        if not name:
            unknown.append(key)
            continue
        shape = (update.up.shape[0], update.down.shape[1])
        own = (linears[name].out_features, linears[name].in_features)
        if shape != own:
            wrong.append(f"{name} is {list(shape)}, the model's {list(own)}")
        found[name] = update
    if unknown or wrong:
        problems = [f"{len(unknown)} modules that the model has not: {listing(unknown)}"] * bool(
            unknown
        )
        problems += [f"{len(wrong)} of another shape: {listing(wrong)}"] * bool(wrong)
        raise WeightsError(
            f"{file.path}: these updates are not of this model: {'; '.join(problems)}; take the "
            "checkpoint that they were trained on"
        )
    return found


@torch.no_grad()
def add_updates(weight: Tensor, kept: Tensor, terms: Sequence[tuple[LoraUpdate, float]]) -> None:
    """Set weight = kept + sum of factor * update, in float32 where there is anything to add."""
    if not terms:
        weight.copy_(kept)
        return
    total = kept.to(weight.device, torch.float32)
    for update, factor in terms:
        down, up = (half.to(weight.device, torch.float32) for half in (update.down, update.up))
        total = total.addmm(up, down, alpha=factor * update.scaling)
    weight.copy_(total)


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def check_whole(tensor: Tensor) -> None:
    if isinstance(tensor, DTensor):
        raise UsageError(
            "lora: the model is sharded; save the updates, and merge them where it is in one piece"
        )


def listing(names: Sequence[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if names[count:] else "")
