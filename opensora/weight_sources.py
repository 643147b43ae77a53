"""Read weights, averaged or not, from anything that training begins with or that is exported.

A checkpoint folder of ours or of upstream (ColossalAI's layout), a run's folder, an HF-style
folder, a lone file, a hub id. Only tensors and JSON are read; pickles with `weights_only=True`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.errors import WeightsError
from opensora.weight_files import locate, read_json, read_tensors, resolve

_EMA_FILES = ("ema.safetensors", "ema.pt")
_STATES = "running_states.json"


@dataclass(frozen=True)
class Weights:
    """What a source holds.

    Attributes:
        source: what the user gave, or the checkpoint taken of a run, for messages.
        parts: name of the model in the run -> its tensors on the CPU; "" where there is but one
            model and no name.
        families: part -> `family` of its class, where the source says so.
        configs: part -> what its config.json would hold, where the source says so.
        averaged: the tensors are moving averages.
        step: optimizer steps taken, None if unknown.
    """

    source: str
    parts: dict[str, dict[str, Tensor]]
    families: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    averaged: bool = False
    step: int | None = None


def read_weights(source: str | os.PathLike[str], *, ema: bool | None = None) -> Weights:
    """Read the weights that `source` names.

    Args:
        source: folder, file or hub id.
        ema: take moving averages; None takes them if there are any. A lone file that holds both
            gives its averages in any case.

    Raises:
        WeightsError: they are missing, damaged or unsafe, or there are no averages.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        # Imported here: most programs read no checkpoint, and DCP takes a second to import.
        from opensora.distributed.checkpoint_loading import choose
        from opensora.distributed.run_folders import checkpoints, is_ours

        if is_ours(path) or checkpoints(path):
            chosen = choose(path, path)
            assert chosen is not None
            return _read_ours(chosen, ema)
    found = locate(source)
    tensors = read_tensors(found.files)
    configs = {} if found.config is None else {"": read_json(found.config)}
    folder = resolve(source)
    averages = next((folder / n for n in _EMA_FILES if (folder / n).is_file()), None)
    if averages is None and ema:
        raise WeightsError(f"{source} has no averaged weights ({' or '.join(_EMA_FILES)})")
    averaged = averages is not None and ema is not False
    if averages is not None and averaged:
        # Upstream averages trained parameters alone; the rest is that of the model.
        tensors |= read_tensors((averages,))
    step = None
    if folder.is_dir() and (folder / _STATES).is_file():
        step = read_json(folder / _STATES).get("global_step")
    return Weights(os.fspath(source), {"": tensors}, configs=configs, averaged=averaged, step=step)


def _read_ours(folder: Path, ema: bool | None) -> Weights:
    """Read a checkpoint of `opensora.distributed.checkpoint`, all ranks' parts put together."""
    from opensora.distributed.checkpoint_index import read_index
    from opensora.distributed.checkpoint_loading import fill

    index, states = read_index(folder), read_json(folder / _STATES)
    has_averages = any(name.startswith("ema.") for name in index.tensors)
    if ema and not has_averages:
        raise WeightsError(f"{folder} has no averaged weights; take the plain ones (--no-ema)")
    averaged = has_averages and ema is not False
    names = {}  # plain name -> stored name
    for prefix in ("model.", "ema.") if averaged else ("model.",):
        for name in index.tensors:
            if name.startswith(prefix):
                names[name.removeprefix(prefix)] = name
    stored = {name: index.tensors[name] for name in names.values()}
    targets = {name: torch.empty(row.shape, dtype=row.dtype) for name, row in stored.items()}
    fill(targets, folder, index)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, place in names.items():
        part, _, key = name.partition(".")
        if part.startswith("_"):
            continue  # of use to training alone: discriminators
        # Averages are float32; a model in bfloat16 stays one.
        dtype = index.tensors[f"model.{name}"].dtype if f"model.{name}" in index.tensors else None
        parts.setdefault(part, {})[key] = targets[place].to(dtype)
    kinds = {name: row for name, row in states.get("modules", {}).items() if name in parts}
    for name, row in kinds.items():
        for other, first in row["ties"].items():
            parts[name][other] = parts[name][first].clone()
    return Weights(
        os.fspath(folder),
        parts,
        {name: row["family"] for name, row in kinds.items() if row["family"]},
        {name: row["config"] for name, row in kinds.items() if row["config"]},
        averaged,
        states.get("global_step"),
    )
