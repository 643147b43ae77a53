"""Measure training steps of STDiT3-XL/2 on stored features: tokens/s, MFU and memory by policy.

    python -m bench.training                                # on a GPU: 360p and 480p, all policies
    python -m bench.training --width 64 --depth 1 --buckets 144p/17/1 --policies none full

Latents and text states are blank but for the noise that training adds: what a step costs does not
depend on them. One process; bf16 on a GPU, float32 on a CPU. Every figure is the mean of `--steps`
steps after one to warm up; memory is the peak of tensors (of the process on a CPU).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.data.batch import Size
from opensora.distributed import mesh
from opensora.errors import UsageError
from opensora.program import run_program
from opensora.recipe import describe_device
from opensora.schedulers.rflow import RFlow
from opensora.sizes import SIZES
from opensora.train_config import TrainConfig
from opensora.training.batch_size import OutOfMemory
from opensora.training.dry_run import StepTimer
from opensora.training.flops import count_tokens, peak_flops, training_flops
from opensora.training.learner import build_learner
from opensora.training.models import build_models

POLICIES = ("none", "every-2", "ops", "full")
BUCKETS = ("360p/51/8", "480p/51/5", "480p/102/2")


def measure(
    policy: str, bucket: tuple[Size, int], model: dict[str, Any], steps: int, compiled: bool
) -> dict[str, float | None]:
    """Return the figures of a policy on a bucket; None in all of them if it does not fit."""
    world = mesh.start()
    config = TrainConfig(
        model=model,
        load_video_features=True,
        load_text_features=True,
        scheduler={"type": "rflow", "use_timestep_transform": True},
        grad_clip=1.0,
        recompute=policy,
        compile=compiled,
        dtype="bf16" if world.device.type == "cuda" else "fp32",
    )
    scheduler = RFlow.from_dict(config.scheduler or {})
    models = build_models(config, world.device)
    timer = StepTimer(build_learner(config, world, models, scheduler))
    size, batch = bucket
    architecture = models.transformer.config
    latent = timer.blank(size, 1).latent
    assert latent is not None
    frames, height, width = latent.shape[2:]
    tokens = batch * count_tokens(architecture, (frames, height, width))
    words = architecture.model_max_length
    flops = batch * training_flops(architecture, (frames, height, width), words)
    try:
        seconds = timer(size, batch, active=steps)
    except OutOfMemory:
        seconds = math.nan
    peak = timer.peaks.get((size, batch))
    del timer, models
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    mesh.stop()
    if peak is None:
        return {"seconds": None, "tokens_per_second": None, "mfu": None, "gib": None}
    most = peak_flops(world.device, torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    return {
        "seconds": round(seconds, 6),
        "tokens_per_second": round(tokens / seconds, 1),
        "mfu": None if most is None else round(flops / seconds / most, 4),
        "gib": round(peak / 2**30, 3),
    }


def read_bucket(text: str) -> tuple[Size, int]:
    """Read "480p/51/5": resolution, frames, clips."""
    parts = text.split("/")
    if len(parts) != 3 or parts[0] not in SIZES or not all(p.isdecimal() for p in parts[1:]):
        raise UsageError(f"--buckets {text}: write resolution/frames/clips, as in 480p/51/5")
    table = SIZES[parts[0]]
    side = next(table[key] for key in ("0.56", "1.0", "1.00") if key in table)
    return Size(int(parts[1]), *side), int(parts[2])


def run(argv: Sequence[str] | None) -> int:
    """Measure every policy on every bucket and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="of recomputation")
    parser.add_argument("--buckets", nargs="+", default=BUCKETS, help="resolution/frames/clips")
    parser.add_argument("--width", type=int, help="hidden_size instead of XL's 1152")
    parser.add_argument("--depth", type=int, help="instead of XL's 28")
    parser.add_argument("--steps", type=int, default=3, help="timed (default 3)")
    parser.add_argument("--compile", action="store_true", help="compile every block")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    model: dict[str, Any] = {"type": "STDiT3-XL/2"}
    if args.width:
        model |= {"hidden_size": args.width, "num_heads": max(1, args.width // 32)}
    if args.depth:
        model["depth"] = args.depth
    found: dict[str, dict[str, float | None]] = {}
    print(f"{'bucket':>14} {'policy':>9}  s/step  tokens/s     MFU  peak GiB")
    for text in args.buckets:
        bucket = read_bucket(text)
        for policy in args.policies:
            figures = measure(policy, bucket, model, args.steps, args.compile)
            found[f"{text} {policy}"] = figures
            print(f"{text:>14} {policy:>9}  {_row(figures)}", flush=True)
    if args.output:
        device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        record = {"device": device, "torch": torch.__version__, "results": found}
        args.output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


def _row(figures: dict[str, float | None]) -> str:
    if figures["seconds"] is None:
        return "does not fit"
    mfu = "n/a" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    return (
        f"{figures['seconds']:6.3g}  {figures['tokens_per_second']:8.0f}  {mfu:>6}  "
        f"{figures['gib']:8.2f}"
    )


if __name__ == "__main__":
    sys.exit(run_program(lambda: run(None)))
