"""Generate on the processes that torchrun started.

    torchrun --nproc-per-node 4 scripts/inference.py --sp-size 2 --prompt-path prompts.txt

Ranks of one sequence group share the tokens of their clips, and the first of them decodes and
writes; groups take turns at the batches.
"""

from __future__ import annotations

from opensora.distributed.mesh import World, divide, start
from opensora.distributed.sequence import Sequence
from opensora.errors import UsageError
from opensora.pipeline import OpenSoraPipeline
from opensora.sample_config import SampleConfig


def join(config: SampleConfig) -> World:
    """Join the run.

    Raises:
        UsageError: an `sp_size` that does not divide the processes; several groups with noise that
            is drawn in one stream.
    """
    world = start(config.device)
    world = divide(world, world.size if config.sp_size is None else config.sp_size)
    if world.dp_size > 1 and config.noise == "upstream":
        raise UsageError(
            "--noise upstream draws the noise of all clips in one stream, which several groups "
            f"cannot share: use --noise per-sample, or --sp-size {world.size}"
        )
    return world


def share_tokens(pipe: OpenSoraPipeline, world: World) -> None:
    """Let the transformer compute this rank's part of the tokens."""
    pipe.transformer.sequence = Sequence.of(world)
