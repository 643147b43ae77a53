"""Choose a checkpoint and read this rank's parts of it."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_planned
from torch.optim import Optimizer

from opensora.checkpoint import describe_mismatch
from opensora.distributed import run_folders as folders
from opensora.distributed import training_state as parts
from opensora.distributed.agreement import first_failure
from opensora.distributed.checkpoint_files import SafetensorsReader
from opensora.distributed.checkpoint_index import Index, check_sums, read_index
from opensora.errors import WeightsError
from opensora.weight_files import read_json

log = logging.getLogger("opensora")

# Without a process group DCP warns on every call that there is none.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module=r"torch\.distributed")


@dataclasses.dataclass
class Progress:
    """Where a run stands. All counters name the next thing to do.

    Attributes:
        epoch: zero-based.
        step: optimizer steps taken in this epoch.
        global_step: optimizer steps taken in all.
        batch: `Batch.number` of the next batch, of all replicas together.
        accumulated: micro-batches taken towards the next optimizer step.
        batch_size: of one process, for readers of upstream's format; 0 where buckets decide.
        extra: anything else, equal on all ranks: nested dicts and lists of JSON values and
            tensors - schedule, clip statistics, watchdog. Tuples come back as lists.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    batch: int = 0
    accumulated: int = 0
    batch_size: int = 0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def choose(run: Path, which: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint's folder to read, checked; None if "latest" finds none.

    Raises:
        WeightsError: it is missing or damaged.
    """
    path = run if which == "latest" else Path(which).expanduser()
    if which != "latest" and not path.is_dir():
        raise WeightsError(f"folder not found: {path}; give a checkpoint's folder or 'latest'")
    if folders.is_ours(path):
        check_sums(path, read_index(path))
        return path
    found = folders.checkpoints(path)
    if not found and which != "latest":
        raise WeightsError(
            f"{path} holds no checkpoint of opensora to resume from (no {folders.INDEX}); "
            "weights of other programs are loaded without --load, as a model's source"
        )
    return newest_good(path)


def newest_good(run: Path) -> Path | None:
    """Return a run's newest checkpoint that is whole; None if there is none at all.

    Raises:
        WeightsError: there are some, and all are damaged.
    """
    found = folders.checkpoints(run)
    why = ""
    for saved in reversed(found):
        try:
            check_sums(saved.folder, read_index(saved.folder))
            read_json(saved.folder / folders.STATES)
        except WeightsError as error:
            log.error("CHECKPOINT NOT USABLE, taking the one before it: %s", error)
            why = why or str(error)
            continue
        return saved.folder
    if found:
        raise WeightsError(
            f"all {len(found)} checkpoints of {run} are damaged, the newest: {why}; start without "
            "--load"
        )
    return None


def read(
    folder: Path,
    rank: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    ema: parts.Averages | None,
) -> Progress:
    """Read this rank's parts of a checkpoint; see `Checkpointer.load`.

    Raises:
        WeightsError: it is damaged, or of another model.
    """
    index, values = read_index(folder), read_json(folder / folders.STATES)
    targets = parts.model_tensors(modules) | parts.average_tensors(ema, modules)
    names = parts.parameter_names(modules)
    begun = {} if ema is None else _begin_averages(targets, index)
    check_names(folder, targets, index, ("model.", *(("ema.",) if ema is not None else ())))
    for name, optimizer in optimizers.items():
        targets |= parts.optimizer_targets(optimizer, names, index, f"optimizer.{name}.")
    rng = f"rng.{rank}."
    for name, stored in index.tensors.items():
        if name.startswith(("extra.", rng)):
            targets[name] = torch.empty(stored.shape, dtype=stored.dtype)
    fill(targets, folder, index)
    for name, average in begun.items():
        parts.local(average).copy_(parts.local(targets[name]).detach())

    def under(prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): value
            for key, value in targets.items()
            if key.startswith(prefix)
        }

    try:
        for name, optimizer in optimizers.items():
            prefix = f"optimizer.{name}."
            parts.restore_optimizer(optimizer, names, under(prefix), values["optimizers"][name])
        if ema is not None:
            ema.updates = int(values["ema_updates"])
        counters = [field.name for field in dataclasses.fields(Progress)[:-1]]
        progress = Progress(
            **{name: int(values[name]) for name in counters},
            extra=parts.join_extra(values["extra"], targets),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"cannot resume from {folder}: {folders.STATES} does not fit this run ({error!r}); "
            "start it with the configuration that it was started with"
        ) from error
    generators = {key: value for key, value in targets.items() if key.startswith(rng)}
    try:
        parts.restore_generators(rank, generators)
    except (ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{folder} is damaged: no random state ({error})") from error
    if not generators:
        log.warning(
            "%s is of %d processes: process %d keeps its own random state",
            folder,
            index.world_size,
            rank,
        )
    return progress


def fill(targets: Mapping[str, Tensor], folder: Path, index: Index) -> None:
    """Read tensors by name, of DTensors this rank's parts; the checkpoint stays meanwhile.

    Raises:
        WeightsError: a file is damaged.
    """
    reader = SafetensorsReader(folder, index)
    try:
        with folders.reading(folder):
            load_planned(dict(targets), storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # a BaseException
        raise first_failure(error) from None


def _begin_averages(targets: dict[str, Tensor], index: Index) -> dict[str, Tensor]:
    """Take out averages that are not stored and begin at the weights; return them by weight.

    They are of weights that were frozen when the checkpoint was saved, and are trained now.
    """
    names = [
        name
        for name in targets
        if name.startswith("ema.")
        and name not in index.tensors
        and "model." + name.removeprefix("ema.") in index.tensors
    ]
    if len(names) == sum(name.startswith("ema.") for name in targets):
        return {}  # none is stored at all: it is of a run without averages
    return {"model." + name.removeprefix("ema."): targets.pop(name) for name in names}


def check_names(
    folder: Path, targets: Mapping[str, Tensor], index: Index, prefixes: tuple[str, ...]
) -> None:
    """Check that a checkpoint holds just the tensors wanted, of their shapes.

    It may hold averages of weights that are not trained now; they stay on the disk.

    Raises:
        WeightsError: says which are missing, unexpected or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    frozen = {name.replace("model.", "ema.", 1) for name in wanted} - wanted.keys()
    given = {
        name: stored.shape
        for name, stored in index.tensors.items()
        if name.startswith(prefixes) and name not in frozen
    }
    if wanted != given:
        raise WeightsError(
            f"cannot resume from {folder}: it is of another model: "
            f"{describe_mismatch(wanted, given)}; start with the configuration it was saved with"
        )
