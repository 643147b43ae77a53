"""Search the batch sizes of all buckets: those that fit, and take equally long.

    python scripts/misc/search_bs.py configs/opensora-v1-2/misc/bs.py
    torchrun --nproc-per-node 8 scripts/misc/search_bs.py configs/opensora-v1-2/misc/bs.py

The configuration is one of training, its bucket_config {resolution: {frames: (guess, range)}}, with
`base` or `base_step_time`. Steps run on blank latents and text; no table, VAE or text encoder is
needed. The result is printed as the bucket_config of a training configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from opensora.config import parse_command_line, setting
from opensora.data.batch import Size
from opensora.distributed import mesh
from opensora.errors import UsageError
from opensora.program import run_program
from opensora.schedulers.rflow import RFlow
from opensora.sizes import SIZES
from opensora.train_config import TrainConfig
from opensora.training.batch_size import BucketSearch, search_buckets
from opensora.training.dry_run import StepTimer
from opensora.training.learner import build_learner
from opensora.training.models import build_models


@dataclass(frozen=True)
class SearchConfig(TrainConfig):
    """Hold the settings of a search: those of training, and the goal."""

    base: tuple[str, str] | None = setting(
        None, "resolution and frames of the bucket that sets the step time", group="search"
    )
    base_step_time: float | None = setting(
        None, "seconds that a step of every bucket takes", group="search", minimum=0
    )
    resolution: str | None = setting(None, "search this one's buckets alone", group="search")


def search(config: SearchConfig) -> BucketSearch:
    """Run the search that `config` describes.

    Raises:
        UsageError: no buckets, a wrong range, neither base nor base_step_time.
        DoesNotFitError: the base bucket does not fit.
    """
    if not config.bucket_config:
        raise UsageError(
            'bucket_config is not set: give {"240p": {51: (20, 4)}}, a guess and a range'
        )
    for name in config.bucket_config:
        if name not in SIZES:
            raise UsageError(f"bucket_config: unknown resolution {name!r}")
    world = mesh.start(config.device, config.sp_size, config.replicate, config.timeout)
    try:
        features = replace(
            config, vae=None, text_encoder=None, load_video_features=True, load_text_features=True
        )
        models = build_models(features, world.device)
        scheduler = RFlow.from_dict(config.scheduler or {})
        timer = StepTimer(build_learner(features, world, models, scheduler))

        def measure(resolution: str, frames: int, batch_size: int) -> float:
            table = SIZES[resolution]
            side = next(table[key] for key in ("0.56", "1.0", "1.00") if key in table)
            seconds = timer(Size(frames, *side), batch_size, active=2)
            if world.is_main:
                print(f"{resolution} {frames}: {batch_size} clips, {seconds:.3g} s", flush=True)
            return seconds

        return search_buckets(
            config.bucket_config,
            measure,
            base=config.base,
            base_step_time=config.base_step_time,
            resolution=config.resolution,
        )
    finally:
        mesh.stop()


def main(argv: Sequence[str] | None = None, program: str = "search_bs.py") -> int:
    """Read a configuration file and flags, then search; returns the exit status."""

    def run() -> int:
        config, _ = parse_command_line(
            SearchConfig,
            sys.argv[1:] if argv is None else argv,
            program,
            description="Search the batch sizes of all buckets.",
        )
        found = search(config)
        print(found.table())
        lines: dict[str, dict[int, Any]] = {
            name: {frames: (1.0, size) for frames, size in lengths.items()}
            for name, lengths in found.bucket_config.items()
        }
        print(f"bucket_config = {lines!r}")
        return 0

    return run_program(run)
