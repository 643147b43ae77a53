"""Measure whether generated clips show what their prompts say.

    python bench/quality.py --num 144 --seed 0

Every group gets `--num` fresh prompts: combinations of shape, colour and motion that training saw,
triples it never saw, and (shape, colour) pairs it never saw. The clips are judged from their pixels
(`opensora.data.shapes_judge`). A clip is all right if one steady object is in every frame and every
attribute that its prompt names is as named. Prints accuracies, then reconstructions by the VAE, and
exits 1 if any figure is below its bar.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import quality_tasks
from opensora.data.contact_sheet import save_contact_sheet
from opensora.data.shape_captions import caption
from opensora.data.shapes import Scene, combinations, render, sample_scene
from opensora.data.shapes_judge import ATTRIBUTES, judge
from opensora.errors import UsageError
from opensora.pipeline import OpenSoraPipeline
from opensora.program import run_program
from opensora.train_shapes_vae import to_model

#: Least share of clips with every named attribute right; least PSNR in dB of reconstructions.
BARS = {"seen": 0.95, "triple": 0.93, "pair": 0.88, "reconstructed": 0.98}
PSNR_BAR = 31.0
#: Shares, and dB of given frames.
TASK_BARS = {"images": 0.95, "given": 27.0, "given motion": 0.90, "sizes": 0.85, "pairs": 0.70}
GROUPS = {
    "seen": "combinations seen in training",
    "triple": "held-out (shape, colour, motion)",
    "pair": "held-out (shape, colour)",
}


def draw_requests(group: str, num: int, seed: int) -> list[tuple[Scene, str, tuple[str, ...]]]:
    """Draw scenes of a group with their prompts and the attributes that these name."""
    rng = random.Random(f"quality/{group}/{seed}")
    triples = combinations(group)
    rng.shuffle(triples)
    scenes = [sample_scene(rng, triples[i % len(triples)]) for i in range(num)]
    return [(scene, *caption(scene, rng)) for scene in scenes]


def score(
    clips: Sequence[Tensor], wanted: Sequence[tuple[Scene, tuple[str, ...]]]
) -> dict[str, list[bool]]:
    """Judge clips against scenes: attribute -> right or wrong of every clip that names it."""
    results: dict[str, list[bool]] = {name: [] for name in ("present", *ATTRIBUTES, "all")}
    for clip, (scene, names) in zip(clips, wanted, strict=True):
        verdict = judge(clip)
        results["present"].append(verdict.present)
        named = [name for name in ATTRIBUTES if name in names]
        for name in named:
            results[name].append(verdict.right(name, getattr(scene, name)))
        results["all"].append(all(results[name][-1] for name in named))
    return results


def rates(results: dict[str, list[bool]]) -> dict[str, float]:
    """Turn lists of right or wrong into shares."""
    return {name: sum(values) / len(values) for name, values in results.items() if values}


def generate(
    pipeline: OpenSoraPipeline, prompts: Sequence[str], args: argparse.Namespace, first_seed: int
) -> list[Tensor]:
    """Generate one clip a prompt at the checkpoint's default size: uint8 [T, H, W, 3] each."""
    output = pipeline(
        list(prompts),
        seed=first_seed,
        num_inference_steps=args.num_sampling_steps,
        guidance_scale=args.cfg_scale,
        batch_size=args.batch_size,
    )
    return [torch.from_numpy(frames) for frames in output.frames]


@torch.no_grad()
def reconstruct(pipeline: OpenSoraPipeline, num: int, seed: int) -> tuple[dict[str, float], float]:
    """Send rendered clips through the VAE; returns the judge's rates and the mean PSNR in dB."""
    rng = random.Random(f"quality/reconstructed/{seed}")
    triples = combinations("all")
    rng.shuffle(triples)
    scenes = [sample_scene(rng, triples[i % len(triples)]) for i in range(num)]
    clips, decibels = [], 0.0
    for scene in scenes:
        truth = render(scene)
        x = to_model(truth[None])
        z = pipeline.vae.encode(x, sample=False)
        out = pipeline.vae.decode(z, num_frames=len(truth)).float().clamp(-1, 1)
        decibels += float(10 * torch.log10(4 / (out - x).square().mean()))
        clips.append((out[0].permute(1, 2, 3, 0) * 127.5 + 128).to(torch.uint8))
    return rates(score(clips, [(scene, ATTRIBUTES) for scene in scenes])), decibels / num


def run(argv: Sequence[str] | None) -> int:
    """Generate, judge, print; 0 if every figure reaches its bar, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num", type=int, default=144, help="prompts a group (default 144)")
    parser.add_argument("--seed", type=int, default=0, help="makes the prompts and the noise")
    parser.add_argument(
        "--ckpt-path", default="tiny", help="pipeline folder (default: the embedded one)"
    )
    parser.add_argument("--num-sampling-steps", type=int, default=25)
    parser.add_argument("--cfg-scale", type=float, default=None, help="default: the checkpoint's")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sheet", type=Path, help="write a png of all wrong clips of up to 40")
    parser.add_argument(
        "--gallery", type=Path, help="write a png of each group's first four clips, right or wrong"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    if args.num < 1 or args.batch_size < 1:
        raise UsageError("--num and --batch-size must be at least 1")
    pipeline = OpenSoraPipeline.from_pretrained(args.ckpt_path)
    report: dict[str, dict[str, float]] = {}
    wrong: list[tuple[Tensor, str]] = []
    gallery: list[tuple[Tensor, str]] = []
    columns = ("all", "present", *ATTRIBUTES)
    print(f"{args.num} prompts a group, seed {args.seed}, {args.num_sampling_steps} steps")
    print(f"{'':34}" + "".join(f"{name:>11}" for name in columns) + f"{'bar':>8}{'s/clip':>8}")
    for number, (group, title) in enumerate(GROUPS.items()):
        requests = draw_requests(group, args.num, args.seed)
        started = time.perf_counter()
        first_seed = (args.seed * len(GROUPS) + number) * 1_000_000
        clips = generate(pipeline, [text for _, text, _ in requests], args, first_seed)
        seconds = (time.perf_counter() - started) / args.num
        results = score(clips, [(scene, names) for scene, _, names in requests])
        report[group] = rates(results)
        _print_row(title, report[group], columns, BARS[group], f"{seconds:8.2f}")
        prompts = [text for _, text, _ in requests]
        gallery += list(zip(clips, prompts, strict=True))[:4]
        wrong += [
            (c, r[1]) for c, r, ok in zip(clips, requests, results["all"], strict=True) if not ok
        ]
    if args.gallery:
        save_contact_sheet(args.gallery, [c for c, _ in gallery], [t for _, t in gallery])
        print(f"first clips: {args.gallery}")
    report["reconstructed"], psnr = reconstruct(pipeline, args.num, args.seed)
    _print_row("reconstructions", report["reconstructed"], columns, BARS["reconstructed"], "")
    print(f"reconstructions: {psnr:.2f} dB, bar {PSNR_BAR:.0f}")
    report["tasks"], more = tasks(pipeline, args)
    wrong += more
    below = [name for name, bar in BARS.items() if report[name]["all"] < bar]
    below += [name for name, bar in TASK_BARS.items() if report["tasks"][name] < bar]
    if args.sheet and wrong:
        save_contact_sheet(args.sheet, [c for c, _ in wrong[:60]], [t for _, t in wrong[:60]])
        print(f"wrong clips: {args.sheet}")
    below += ["psnr"] if psnr < PSNR_BAR else []
    print("below the bar: " + ", ".join(below) if below else "every figure reaches its bar")
    if args.json:
        print(json.dumps({**report, "psnr": psnr, "below": below}))
    return 1 if below else 0


def tasks(
    pipeline: OpenSoraPipeline, args: argparse.Namespace
) -> tuple[dict[str, float], list[tuple[Tensor, str]]]:
    """Run the further tasks and print them; returns name of a bar -> figure, and wrong clips."""
    found, wrong = {}, []
    for name in ("images", "pairs"):
        share, bad = getattr(quality_tasks, name)(pipeline, args.num, args.seed, args.batch_size)
        found[name] = share
        wrong += bad[:10]
        print(f"{name}: {share:.1%} right, bar {TASK_BARS[name]:.0%}", flush=True)
    psnr, moved, bad = quality_tasks.conditioned(pipeline, args.num, args.seed, args.batch_size)
    found |= {"given": psnr, "given motion": moved}
    wrong += bad[:10]
    print(
        f"from a given first frame: {psnr:.1f} dB, bar {TASK_BARS['given']:.0f}; "
        f"{moved:.1%} move as told, bar {TASK_BARS['given motion']:.0%}",
        flush=True,
    )
    shares, bad = quality_tasks.sizes(pipeline, args.num, args.seed, args.batch_size)
    found["sizes"] = sum(shares.values()) / len(shares)
    wrong += bad[:10]
    each = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    print(f"other sizes: {found['sizes']:.1%}, bar {TASK_BARS['sizes']:.0%} ({each})", flush=True)
    return found, wrong


def _print_row(
    title: str, shares: dict[str, float], columns: Sequence[str], bar: float, end: str
) -> None:
    cells = "".join(
        f"{100 * shares[name]:10.1f}%" if name in shares else f"{'-':>11}" for name in columns
    )
    print(f"{title:34}{cells}{100 * bar:7.0f}%{end}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(lambda: run(None)))
