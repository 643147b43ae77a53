"""Put the parts of a training run together, take its steps, and write what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoint import weights_digest
from opensora.data.batch import Batch, Dataset
from opensora.data.loader import Loader
from opensora.data.quarantine import Quarantine
from opensora.data.sampler import Sampler
from opensora.devices import DTYPES
from opensora.distributed.checkpoint import Checkpointer
from opensora.distributed.collectives import all_reduce, broadcast_object
from opensora.distributed.mesh import World
from opensora.distributed.run_folders import STATES, find_run, new_run_folder
from opensora.errors import OpenSoraError, UsageError
from opensora.files import check_folder
from opensora.models.vae.loading import find_trained
from opensora.pipeline_folder import pipeline_folder
from opensora.schedulers.rflow import RFlow
from opensora.train_config import TrainConfig
from opensora.training import dry_run
from opensora.training.data import dataset_of, sampler_of, validation_dataset
from opensora.training.dry_run import StepTimer, fitted_buckets, try_buckets
from opensora.training.ema import EMA
from opensora.training.flops import peak_flops, training_flops
from opensora.training.hooks import hooks_of
from opensora.training.learner import build_learner, check_sections
from opensora.training.metrics import Metrics
from opensora.training.models import Models, build_models, weights_of
from opensora.training.outcome import write_lora, write_weights
from opensora.training.place import plan_digest
from opensora.training.record import record_settings
from opensora.training.schedule import Schedule
from opensora.training.trackers import open_trackers
from opensora.training.trainer import Trainer
from opensora.training.watchdog import Watchdog


class Run:
    """Put the parts of a run together, those that can fail quickly first."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.scheduler = RFlow.from_dict(config.scheduler or {})
        self.dataset = dataset_of(config)
        self.sampler = sampler_of(config, self.dataset, world.dp_size * config.accumulation_steps)
        self.total = count_steps(config, self.sampler)
        check_sections(config)
        self.validation = validation_dataset(config)
        weights_of(config)
        if not config.dry_run and (config.load is None or config.start_from_scratch):
            _on_main(world, lambda: check_folder(Path(config.outputs), 0), "the folder of runs")

    def train(self) -> Path:
        """Take all steps, then write the averaged weights."""
        config, world = self.config, self.world
        resumed: Path | None = _on_main(world, self._resumed, "the run to go on with")
        models = build_models(config, world.device)
        self.folder: Path = resumed or _on_main(world, self._new_folder, "the run's folder")
        self._encode(self.dataset, models, "latents")
        self.learner = build_learner(config, world, models, self.scheduler)
        if config.dry_run:
            return self._dry_run()
        trainer = self._trainer(models)
        if resumed is not None:
            trainer.resume(self._checkpoint())
            for line in _on_main(world, lambda: record_settings(resumed, config), "settings"):
                if world.is_main:
                    print(f"changed since the run was last started: {line}", flush=True)
        trainer.metrics = self._metrics(trainer.progress.global_step)
        trainer.hooks = hooks_of(
            config, models, trainer, self.scheduler, self._encode, self.validation
        )
        modules = self.learner.modules
        count = sum(p.numel() for m in modules.values() for p in m.parameters() if p.requires_grad)
        if world.is_main and not config.quiet:
            print(
                f"training {count:,} parameters for {self.total} steps from step "
                f"{trainer.progress.global_step} on {world.size} "
                f"{'process' if world.size == 1 else 'processes'}: {self.folder}",
                flush=True,
            )
        if world.is_main and config.max_steps is not None and self.total < config.max_steps:
            print(
                f"the data ends after about {self.total} of {config.max_steps} steps; raise "
                "--epochs for more",
                flush=True,
            )
        with trainer.checkpointer:
            finished = trainer.run()
        trainer.metrics.close()
        if not finished:
            if world.is_main:
                print(f"stopped and saved; go on with --load {self.folder}", flush=True)
            return self.folder
        self._write(models, trainer.ema)
        return self.folder

    def _dry_run(self) -> Path:
        """Try a step of every bucket and print what fits."""
        timer = StepTimer(self.learner)
        found = try_buckets(timer, self.sampler)
        if self.world.is_main:
            print(dry_run.table(found, timer.peaks))
            small = [size for size, (wanted, one) in found.items() if one.batch_size < wanted]
            if small and self.config.bucket_config:
                fitted = fitted_buckets(self.config.bucket_config, found, self.sampler)
                print(f"these batch sizes fit:\nbucket_config = {fitted!r}")
            elif not small:
                print("every bucket fits")
        return self.folder

    def _resumed(self) -> Path | None:
        """Return the folder of the run that is gone on with, None for a new one."""
        config, outputs = self.config, Path(self.config.outputs)
        if config.load is None or config.start_from_scratch:
            return None
        if config.load == "latest":
            found = find_run(outputs)
            if found is None:
                raise UsageError(f"--load latest: {outputs} holds no run with a checkpoint")
            return found
        given = Path(config.load)
        if not given.is_dir():
            raise UsageError(f"--load {given}: no such folder; give a run or a checkpoint")
        return given.parent if (given / STATES).is_file() else given

    def _new_folder(self) -> Path:
        """Make the folder of a new run; a dry run writes nothing and has none of its own."""
        outputs = Path(self.config.outputs)
        if self.config.dry_run:
            return outputs
        folder = new_run_folder(outputs, str((self.config.model or {}).get("type", "STDiT3")))
        record_settings(folder, self.config)
        return folder

    def _checkpoint(self) -> str:
        """Return what to resume: a checkpoint's folder, or the latest of the run."""
        given = Path(str(self.config.load))
        return str(given) if (given / STATES).is_file() else "latest"

    def _encode(self, dataset: Dataset, models: Models, folder: str) -> None:
        """Let a dataset that makes its clips encode them; check what cached features are of."""
        text, vae = self.config.text_encoder, self.config.vae
        check = getattr(dataset, "check", None)
        if check is not None:
            check(
                vae=_digest(vae, "vae"),
                text_encoder=_digest(text, "text_encoder"),
                clean_captions=self.config.clean_captions,
            )
        prepare = getattr(dataset, "prepare", None)
        if prepare is None or models.vae is None:
            return
        prepare(models.vae, _digest(vae, "vae"), Path(self.config.outputs) / folder)

    def _trainer(self, models: Models) -> Trainer:
        config, world = self.config, self.world
        loader = Loader(
            self.dataset,
            self.sampler,
            rank=world.dp_rank,
            replicas=world.dp_size,
            workers=config.num_workers,
            prefetch=config.prefetch,
            seed=config.seed,
            quarantine=Quarantine(self.folder if world.is_main or world.sp_rank == 0 else None),
            epochs=config.epochs,
        )
        architecture = models.transformer.config

        def flops(batch: Batch) -> float:
            size = batch.size
            latent: Sequence[int | None] = size
            if batch.latent is not None:
                latent = batch.latent.shape[2:]
            elif models.vae is not None:
                latent = models.vae.get_latent_size(size)
            frames, height, width = [int(n or 1) for n in latent]
            words = architecture.model_max_length
            return len(batch) * training_flops(architecture, (frames, height, width), words)

        return Trainer(
            self.learner,
            loader,
            schedule_of(config, self.total),
            EMA(
                self.learner.modules,
                config.ema_decay,
                warm_up=config.ema_warm_up,
                trained_only=True,
            ),
            Watchdog(
                self.folder,
                patience=config.max_bad_steps,
                agree=lambda own: int(all_reduce(torch.tensor(float(own)), "verdicts", "max")),
                rank=world.rank,
            ),
            Checkpointer(
                self.folder,
                rank=world.rank,
                world_size=world.size,
                keep_last=config.keep_last,
                keep_every=config.keep_every or None,
            ),
            self.total,
            config.accumulation_steps,
            bool(weights_of(config)),
            config.ckpt_every,
            flops,
            plan_digest(self.sampler),
        )

    def _metrics(self, first_step: int) -> Metrics:
        config, world = self.config, self.world
        names = [name for name in ("tensorboard", "wandb") if getattr(config, name)]
        settings = dataclasses.asdict(config)
        return Metrics(
            self.folder,
            self.total,
            log_every=config.log_every,
            first_step=first_step,
            rank=world.rank,
            devices=world.size,
            sum_ranks=lambda own: all_reduce(own, "metrics") / world.sp_size,
            peak=peak_flops(world.device, DTYPES[config.dtype]),
            device=world.device,
            trackers=open_trackers(names, self.folder, config=settings, first_step=first_step)
            if world.is_main
            else (),
        )

    def _sizes(self) -> list[list[int]]:
        """List (frames, height, width) of what an epoch holds."""
        return [list(size) for size in sorted({batch.size for batch in self.sampler.epoch(0)})]

    def _write(self, models: Models, ema: EMA) -> None:
        """Write the averaged weights that inference loads."""
        if self.config.lora:
            written: Path | None = write_lora(models, ema, self.folder)
        else:
            defaults = {**(self.config.defaults or {}), "trained_sizes": self._sizes()}
            written = write_weights(models, self.scheduler, self.folder, defaults, self.world)
        if self.world.is_main and written is not None:
            print(f"saved {written}", flush=True)


def count_steps(config: TrainConfig, sampler: Sampler) -> int:
    """Return the steps of a run; buckets with probabilities give a few more or less."""
    steps = config.epochs * sampler.length(0) // sampler.replicas
    return steps if config.max_steps is None else min(steps, config.max_steps)


def schedule_of(config: TrainConfig, total: int) -> Schedule:
    """Return the learning rate's course."""
    warmup = config.warmup_steps or 0
    if config.decay == 0:
        return Schedule(warmup)
    return Schedule(warmup, "linear", total, config.decay)


def _digest(section: Mapping[str, Any] | None, part: str) -> str | None:
    """Return the digest of the weights that a section names, None if it names none."""
    source = (section or {}).get("from_pretrained")
    if not source:
        return None
    if part == "vae":
        return weights_digest(find_trained(str(source)))
    folder = pipeline_folder(str(source))
    return weights_digest(folder or source, part if folder else None)


def _on_main(world: World, action: Any, what: str) -> Any:
    """Run on the first process; its result, or its error, is everyone's."""
    result: tuple[Any, Exception | None] = (None, None)
    if world.is_main:
        try:
            result = (action(), None)
        except (OpenSoraError, OSError) as error:
            result = (None, error)
    value, problem = broadcast_object(result, what)
    if problem is not None:
        raise problem
    return value
