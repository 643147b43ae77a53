"""What a run does every so many steps beside training: validation, plots, clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from opensora.data.batch import Dataset, Size
from opensora.data.sampler import Sampler
from opensora.distributed.collectives import all_reduce
from opensora.errors import UsageError
from opensora.pipeline import OpenSoraPipeline
from opensora.schedulers.rflow import RFlow
from opensora.train_config import TrainConfig
from opensora.training.data import build_validation, validation_settings
from opensora.training.models import Models
from opensora.training.plot import write_loss_plot
from opensora.training.sample_clips import sample_clips
from opensora.training.trainer import Hook, Trainer


def hooks_of(
    config: TrainConfig,
    models: Models,
    trainer: Trainer,
    scheduler: RFlow,
    encode: Callable[[Dataset, Models, str], None],
    dataset: Dataset | None,
) -> list[tuple[int, Hook]]:
    """Return (every how many steps, function) of a run's `validation` section.

    Args:
        config: of the run.
        models: of the run.
        trainer: of the run; its metrics are set.
        scheduler: of the run.
        encode: lets a dataset encode its clips into a folder of that name.
        dataset: of `validation_dataset`.

    Raises:
        UsageError: prompts without the models that draw them.
    """
    settings = validation_settings(config)
    if settings is None or dataset is None:
        return []
    encode(dataset, models, "validation-latents")
    world = trainer.learner.world
    folder = trainer.checkpointer.folder
    validation = build_validation(
        config,
        dataset,
        models,
        scheduler,
        world,
        lambda own: all_reduce(own, "validation losses") / world.sp_size,
    )

    def validate(step: int) -> None:
        result = validation(models.transformer, trainer.ema if settings["ema"] else None)
        trainer.metrics.record(step, result.line())
        if world.is_main:
            print(f"step {step}: validation loss {result.loss:.4f}", flush=True)
            write_loss_plot(folder)

    hooks: list[tuple[int, Hook]] = [(int(settings["every"]), validate)]
    if not settings["prompts"]:
        return hooks
    vae, encoder = models.vae, models.text_encoder
    if vae is None or encoder is None:
        raise UsageError(
            "validation.prompts needs vae and text_encoder; leave prompts out where training "
            "reads features"
        )

    defaults = {**_usual_size(trainer.loader.sampler), **(config.defaults or {})}

    def draw(step: int) -> None:
        pipeline = OpenSoraPipeline(models.transformer, vae, encoder, scheduler, defaults=defaults)
        with trainer.ema.swap():
            sample_clips(
                pipeline,
                settings["prompts"],
                folder,
                step,
                fps=float(defaults["fps"]),
                rank=world.rank,
            )

    hooks.append((int(settings["every"]), draw))
    return hooks


def _usual_size(sampler: Sampler) -> dict[str, float]:
    """Return the size that most clips of an epoch are read at, as the defaults of a request."""
    clips: Counter[Size] = Counter()
    for batch in sampler.epoch(0):
        clips[batch.size] += len(batch.indices)
    size = clips.most_common(1)[0][0]
    return {"num_frames": size.frames, "height": size.height, "width": size.width, "fps": 24.0}
