"""Train a video VAE on a table of clips, in Open-Sora 1.2's three stages.

    python scripts/train_vae.py configs/vae/train/stage1.py --data-path meta.csv
    torchrun --nproc-per-node 8 scripts/train_vae.py configs/vae/train/stage3.py --data-path T.csv

Stage 1 trains the temporal VAE on the 2D latents of a frozen 2D VAE, stage 2 both on 2D latents,
stage 3 both on pixels, on clips of random length. A configuration with `stages` trains the small
embedded VAE on rendered shapes instead (`opensora.train_shapes_vae`).

Every process holds all weights and gradients are averaged: a VAE of 393M parameters takes 6.3 GB
with AdamW's state, little beside its activations, and sharding would put communication into the
several passes through the last layer that the adaptive weight needs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from opensora.checkpoint import save_model
from opensora.config import load_config_file, parse_command_line
from opensora.data.batch import Batch, Dataset, Size
from opensora.data.dataset import build_dataset
from opensora.data.loader import Loader
from opensora.data.quarantine import Quarantine
from opensora.data.sampler import FixedSampler
from opensora.distributed import mesh
from opensora.distributed.checkpoint import Checkpointer, Progress
from opensora.distributed.collectives import all_reduce, barrier, broadcast_object
from opensora.distributed.run_folders import find_run, is_ours, new_run_folder
from opensora.errors import NonFiniteError, UsageError
from opensora.files import atomic, write_text
from opensora.models.vae.loading import TRAINED
from opensora.program import run_program, stop_if_requested
from opensora.train_vae_config import TrainVAEConfig
from opensora.training.metrics import Metrics
from opensora.training.plot import write_loss_plot
from opensora.training.trackers import open_trackers
from opensora.training.vae_learner import VAELearner
from opensora.training.watchdog import Verdict, Watchdog


def train_vae(config: TrainVAEConfig, dataset: Dataset | None = None) -> Path:
    """Run the training that `config` describes.

    Args:
        config: settings.
        dataset: clips of one size; None builds the one that the configuration names.

    Returns:
        The folder of the trained VAE (`config.json`, `model.safetensors`) in the run's folder.

    Raises:
        UsageError: settings that do not fit, a table that cannot be used or gives no step, or
            folders that cannot be written.
        WeightsError: weights or a checkpoint are missing, damaged or of another model.
        NonFiniteError: the loss stayed NaN or infinite after returns to a checkpoint.
    """
    config.check()
    world = mesh.start(config.device)
    try:
        return _Training(config, world, dataset).run()
    finally:
        mesh.stop()


class _Training:
    """Hold the parts of one run."""

    def __init__(self, config: TrainVAEConfig, world: mesh.World, dataset: Dataset | None) -> None:
        self.config, self.world = config, world
        frames, height, width = config.clip()
        self.replicas = world.dp_size * config.accumulation_steps
        if dataset is None:
            dataset = build_dataset(config.dataset_settings())
        sampler = FixedSampler(
            dataset.entries(),
            Size(frames, height, width),
            config.batch_size,
            seed=config.seed,
            replicas=self.replicas,
        )
        self.steps = config.epochs * (sampler.length(0) // self.replicas)
        if self.steps == 0:
            raise UsageError(
                f"the run would take no step: {len(dataset.entries())} rows are fewer than "
                f"batch_size {config.batch_size} x {self.replicas} (processes x "
                "accumulation_steps); use a smaller --batch-size, or more rows"
            )
        self.learner = VAELearner(config, world.device)
        self.folder = self._choose_folder()
        self.loader = Loader(
            dataset,
            sampler,
            rank=world.dp_rank,
            replicas=world.dp_size,
            workers=config.num_workers,
            prefetch=config.prefetch,
            seed=config.seed,
            quarantine=Quarantine(self.folder if world.is_main else None),
            epochs=config.epochs,
        )
        self.watchdog = Watchdog(
            self.folder,
            agree=lambda own: int(all_reduce(torch.tensor(own), "the verdict on a step", "max")),
            rank=world.rank,
        )
        self.progress = Progress(batch_size=config.batch_size)
        self.saved: int | None = None
        self.state = self.learner.modules, self.learner.optimizers, self.learner.ema
        tokens, high, wide = self.learner.vae.get_latent_size((frames, height, width))
        self._latents = (tokens or 0) * high * wide
        sizes = [(p.numel(), p.requires_grad) for p in self.learner.vae.parameters()]
        self._say(
            f"{self.learner.origin}: {sum(size for size, learns in sizes if learns):,} of "
            f"{sum(size for size, _ in sizes):,} parameters learn, "
            f"{self.steps} steps, {self.folder}"
        )

    def run(self) -> Path:
        """Train to the end of the last epoch; returns the folder of the trained VAE."""
        config = self.config
        with Checkpointer(
            self.folder,
            rank=self.world.rank,
            world_size=self.world.size,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
        ) as checkpointer:
            if config.load is not None:
                self._resume(checkpointer, config.load)
            metrics = self._open_metrics()
            try:
                for batches in self._steps(metrics):
                    stop_if_requested()
                    self._count(self._step(batches, metrics), batches[-1].number, checkpointer)
                    if self._is_due():
                        with metrics.paused():
                            self._save(checkpointer)
                if self.saved != self.progress.global_step:
                    self._save(checkpointer)
            finally:
                metrics.close()
        return self._export()

    def _steps(self, metrics: Metrics) -> Iterator[list[Batch]]:
        """Yield the batches that this process takes in every step."""
        batches = self.loader.batches(self.progress.batch)
        while True:
            with metrics.waiting():
                step = list(islice(batches, self.config.accumulation_steps))
            if not step:
                return
            yield step

    def _count(self, verdict: Verdict, number: int, checkpointer: Checkpointer) -> None:
        """Move the counters behind a step whose last batch had this number."""
        progress, per_epoch = self.progress, self.steps // self.config.epochs
        taken = number // self.replicas + 1
        progress.batch = taken * self.replicas
        progress.epoch, progress.step = divmod(taken, per_epoch)
        if verdict is Verdict.OK:
            progress.global_step += 1
        elif verdict is Verdict.REWIND:
            # To the weights of the last good checkpoint; on with the next batch.
            found = checkpointer.load("latest", *self.state)
            if found is None:
                raise NonFiniteError(
                    f"{self.watchdog.patience} bad steps in a row and no checkpoint to return to; "
                    f"the samples are in {self.watchdog.path}. Try a lower --lr, or --dtype fp32"
                )
            progress.global_step = self.saved = found.global_step

    def _is_due(self) -> bool:
        step, every = self.progress.global_step, self.config.ckpt_every
        return every > 0 and step > 0 and step % every == 0 and step != self.saved

    def _step(self, batches: list[Batch], metrics: Metrics) -> Verdict:
        """Take one optimizer step, unless it is bad."""
        number = self.progress.global_step
        told = self.learner.backward(batches, number)
        means, norms = self.learner.average(told)
        verdict = self.watchdog.check(
            [values[name] for values in told for name in ("loss", "disc") if name in values],
            max(norms),
            [name for batch in batches for name in batch.names],
            number,
            details={"batches": [batch.number for batch in batches]},
        )
        if verdict is Verdict.OK:
            rate = self.learner.update(means, number)
            metrics.step(
                number,
                means.pop("loss", math.nan),
                grad_norm=norms[0],
                lr=rate,
                tokens=self._latents * sum(len(batch) for batch in batches),
                bucket=batches[0].bucket,
                values=means,
            )
        return verdict

    def _open_metrics(self) -> Metrics:
        config, world, first = self.config, self.world, self.progress.global_step
        names = [name for name in ("tensorboard", "wandb") if getattr(config, name)]
        return Metrics(
            self.folder,
            self.steps,
            log_every=config.log_every,
            first_step=first,
            rank=world.rank,
            devices=world.size,
            sum_ranks=lambda own: all_reduce(own, "metrics"),
            device=world.device,
            trackers=open_trackers(
                names if world.is_main else [],
                self.folder,
                config=dataclasses.asdict(config),
                first_step=first,
            ),
        )

    def _choose_folder(self) -> Path:
        """Return the run's folder: that of the checkpoint to go on from, or a new one."""

        def choose() -> str:
            outputs, load = Path(self.config.outputs), self.config.load
            if load == "latest" and (found := find_run(outputs)):
                return str(found)
            if load not in (None, "latest"):
                given = Path(load).expanduser()
                run = given.parent if is_ours(given) else given
                if run.resolve().parent == outputs.resolve():
                    return str(run)
            name = str(self.config.model.get("type", "VideoAutoencoderPipeline"))
            folder = new_run_folder(outputs, name)
            text = json.dumps(dataclasses.asdict(self.config), indent=1, default=str)
            write_text(folder / "config.json", text + "\n")
            return str(folder)

        return Path(broadcast_object(choose() if self.world.is_main else "", "the run's folder"))

    def _resume(self, checkpointer: Checkpointer, which: str) -> None:
        found = checkpointer.load(which, *self.state)
        if found is None:
            self._say(f"{self.config.outputs} holds no checkpoint yet; training from the start")
            return
        self.progress = found
        self.watchdog.load_state_dict(found.extra["watchdog"])
        self._say(f"resumed at step {found.global_step}, batch {found.batch}")

    def _save(self, checkpointer: Checkpointer) -> None:
        if self.watchdog.in_row == 0:
            self.progress.extra = {"watchdog": self.watchdog.state_dict()}
            checkpointer.save(self.progress, *self.state)
            self.saved = self.progress.global_step

    def _export(self) -> Path:
        """Write the VAE, its averages if there are any, and the discriminator."""
        folder = self.folder / TRAINED
        if self.learner.ema is not None:
            self.learner.ema.swap()
        if self.world.is_main:
            write_loss_plot(self.folder)
            save_model(self.learner.vae, folder)
            if self.learner.judge is not None:
                tensors = {
                    k: v.cpu().contiguous() for k, v in self.learner.judge.state_dict().items()
                }
                with atomic(self.folder / "discriminator.safetensors") as partial:
                    save_file(tensors, partial)
        barrier("the end")
        self._say(f"saved {folder}")
        return folder

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def main(argv: Sequence[str] | None = None, program: str = "train_vae.py") -> int:
    """Read a configuration file and flags, then train; returns the exit status."""

    def run() -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        files = [word.rpartition("=")[2] for word in words if word.endswith(".py")]
        if files and "stages" in load_config_file(files[0]):
            from opensora import train_shapes_vae

            return train_shapes_vae.run(words, program)
        config, sources = parse_command_line(
            TrainVAEConfig,
            words,
            program,
            description="Train a video VAE on a table of clips.",
        )
        print(sources.table(config), *sources.notes, sep="\n", flush=True)
        train_vae(config)
        return 0

    return run_program(run)
