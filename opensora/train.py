"""Train a text-to-video transformer with rectified flow, on one process or many.

    python scripts/train.py configs/opensora-v1-2/train/stage1.py --data-path meta.csv
    torchrun --nproc-per-node 8 scripts/train.py ...

The table, the buckets and all settings are checked before weights are read. A run has a folder
under `outputs`, with its configuration, log, checkpoints and, at the end, averaged weights.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from opensora.config import parse_command_line
from opensora.distributed import mesh
from opensora.program import run_program
from opensora.progress import silenced
from opensora.train_config import TrainConfig
from opensora.training.assembly import Run


def train(config: TrainConfig) -> Path:
    """Run the training that `config` describes.

    Returns:
        The folder of the run.

    Raises:
        UsageError: settings that do not fit, a table that gives no step, an output folder that
            cannot be written.
        WeightsError: weights or a checkpoint that cannot be read.
        NonFiniteError: losses stayed NaN or infinite after all returns to checkpoints.
    """
    world = mesh.start(config.device, config.sp_size, config.replicate, config.timeout)
    # Of initial weights; every batch sets the generators anew.
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    try:
        with silenced(config.quiet):
            return Run(config, world).train()
    finally:
        mesh.stop()


def main(argv: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Read a configuration file and flags, then train; returns the exit status."""

    def run() -> int:
        config, sources = parse_command_line(
            TrainConfig,
            sys.argv[1:] if argv is None else argv,
            program,
            description="Train a text-to-video transformer.",
        )
        main_process = os.environ.get("RANK", "0") == "0"
        if main_process and not config.quiet:
            print(sources.table(config), flush=True)
            for note in sources.notes:
                print(note, flush=True)
        folder = train(config)
        if main_process and not config.dry_run:
            print(folder)
        return 0

    return run_program(run)
