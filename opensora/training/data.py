"""Find the batches of a run, and the fixed ones that it is validated on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opensora.config_file import suggest
from opensora.data.batch import Dataset
from opensora.data.dataset import build_dataset
from opensora.data.explain import require_steps
from opensora.data.loader import Loader
from opensora.data.plan import make_plan
from opensora.data.sampler import PlannedBatch, Sampler, Step
from opensora.distributed.mesh import World
from opensora.errors import UsageError
from opensora.schedulers.rflow import RFlow
from opensora.train_config import TrainConfig
from opensora.training.models import Models, precision
from opensora.training.objective import conditions_of
from opensora.training.validation import Planned, Prepared, Validation

#: Keys of the configuration's `validation`, and what they are without one.
VALIDATION = {
    "every": 1000,
    "dataset": None,
    "data_path": None,
    "samples": 8,
    "timesteps": 10,
    "seed": 0,
    "ema": True,
    "prompts": (),
}


def dataset_of(config: TrainConfig, **changes: Any) -> Dataset:
    """Build the dataset, with what flags set and `changes` over its section."""
    settings = dict(config.dataset or {})
    if config.data_path is not None:
        settings["data_path"] = config.data_path
    return build_dataset({**settings, **changes})


def sampler_of(config: TrainConfig, dataset: Dataset, replicas: int) -> Sampler:
    """Return the order of a dataset's batches.

    Args:
        config: its buckets, batch size and seed.
        dataset: rows; caches plan their batches themselves.
        replicas: data-parallel processes times accumulation steps.

    Raises:
        UsageError: there is no batch, with the smallest change that makes one.
    """
    own: Callable[..., Sampler] | None = getattr(dataset, "sampler", None)
    sampler: Sampler
    settings: dict[str, Any] = {"bucket_config": config.bucket_config}
    settings |= {"batch_size": config.batch_size, "seed": config.seed, "replicas": replicas}
    if own is None:
        plan = make_plan(dataset, **settings)
        require_steps(dataset, plan)
        return plan.sampler(dataset.entries())
    if getattr(dataset, "fixed_batches", False):
        settings = {"seed": config.seed, "replicas": replicas}
    sampler = own(**settings)
    if not sampler.length(0):
        raise UsageError(
            f"there would be 0 steps: the features fill fewer than {replicas} batches, one for "
            "each process and accumulation step; lower batch sizes, or cache more clips"
        )
    return sampler


def validation_settings(config: TrainConfig) -> dict[str, Any] | None:
    """Return `validation` with its defaults, None where there is none.

    Raises:
        UsageError: an unknown key, or a number below 1.
    """
    if not config.validation:
        return None
    for key in config.validation:
        if key not in VALIDATION:
            raise UsageError(f"validation: unknown key {key!r}{suggest(str(key), VALIDATION)}")
    settings = {**VALIDATION, **config.validation}
    if isinstance(settings["prompts"], str):
        settings["prompts"] = (settings["prompts"],)
    for key in ("every", "samples", "timesteps"):
        if not isinstance(settings[key], int) or settings[key] < 1:
            raise UsageError(
                f"validation.{key} must be a whole number of at least 1, got {settings[key]!r}"
            )
    return settings


def validation_dataset(config: TrainConfig) -> Dataset | None:
    """Return what a run is validated on; None where it is not.

    Raises:
        UsageError: an unknown key, or a table that gives nothing.
    """
    settings = validation_settings(config)
    if settings is None:
        return None
    changes = dict(settings["dataset"] or {})
    if settings["data_path"] is not None:
        changes["data_path"] = settings["data_path"]
    try:
        dataset = dataset_of(config, **changes)
        sampler_of(config, dataset, 1)
    except UsageError as error:
        raise UsageError(f"validation: {error}") from error
    return dataset


def build_validation(
    config: TrainConfig,
    dataset: Dataset,
    models: Models,
    scheduler: RFlow,
    world: World,
    sum_ranks: Callable[[Tensor], Tensor],
) -> Validation:
    """Build the validation of a run: the first batch of every bucket, at most `samples` clips.

    Args:
        config: of the run; its `validation` is not None.
        dataset: that is validated on.
        models: of the run.
        scheduler: of the run.
        world: processes; batches are shared out over its replicas.
        sum_ranks: adds a tensor over the replicas.
    """
    settings = validation_settings(config)
    assert settings is not None
    sampler = sampler_of(dataclasses.replace(config, seed=settings["seed"]), dataset, 1)
    first: dict[str, PlannedBatch] = {}
    for batch in sampler.epoch(0):
        first.setdefault(batch.bucket, batch)
    kept = [
        batch._replace(indices=batch.indices[: settings["samples"]])
        for _, batch in sorted(first.items())
    ]
    entries = dataset.entries()
    plan = [Planned(b.bucket, tuple(entries[i].name for i in b.indices)) for b in kept]
    loader = Loader(dataset, sampler, workers=0, seed=settings["seed"])

    def prepare(index: int) -> Prepared:
        batch = loader.read(Step(index, 0, kept[index]))
        given = conditions_of(config, batch, world.device)
        with precision(config, world.device):
            y, mask = models.text(batch, world.device)
        return Prepared(
            models.latent(batch, world.device),
            {"y": y, "mask": mask, **given},
            batch.size.frames,
            batch.names,
        )

    return Validation(
        plan,
        prepare,
        scheduler,
        steps=int(settings["timesteps"]),
        seed=int(settings["seed"]),
        replica=world.dp_rank,
        replicas=world.dp_size,
        sum_ranks=sum_ranks,
        autocast=lambda: precision(config, torch.device(world.device)),
    )
