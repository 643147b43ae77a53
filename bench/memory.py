"""Measure the peak memory of kernels beside that of references, each in a process of its own.

    python -m bench.memory              # bytes and ratios; `python -m bench.cpu` keeps them

A process prepares its inputs, resets the peak that Linux keeps of it (`/proc/self/clear_refs`),
runs the job once, and prints by how much the peak exceeds what it had before. Large blocks come
from the system and go back at once, so this is what was alive together, and no rest of a heap.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.shapes import CPU, TEXT, TOKENS
from opensora import OpenSoraPipeline, testing
from opensora.models.stdit import PRESETS
from opensora.models.stdit.block import Modulation, STDiT3Block
from opensora.nn import PackedText

#: The kernels may take this many times the references' peak.
MOST = 1.05
MODES = ("kernels", "reference")
#: Frames of a block's tokens.
FRAMES = TOKENS[f"{CPU} 480p"][1]

Run = Callable[[], object]


def supported() -> bool:
    """Tell whether this system keeps a peak that a process may reset."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def _block(temporal: bool, training: bool, frames: int) -> Run:
    """Prepare a bfloat16 block of STDiT3-XL/2 in the middle of others, as sampling or training."""
    config, dtype = PRESETS["STDiT3-XL/2"], torch.bfloat16
    batch, _, patches, channels = TOKENS[f"{CPU} 480p"]
    heads, longest = config.num_heads, max(TEXT[f"{CPU} 480p"])

    def randn(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_()

    block = STDiT3Block(channels, heads, temporal=temporal).to(dtype).requires_grad_(training)
    x, normed = (randn(batch, frames * patches, channels) for _ in range(2))
    width = channels // heads
    text = PackedText(
        randn(batch * longest, channels),
        torch.zeros(batch, dtype=torch.int32),
        torch.full((batch,), longest, dtype=torch.int32),
        longest,
        None if training else randn(batch * longest, 2, heads, width),
    )
    modulation = Modulation(randn(batch, 6, channels))
    angles = torch.randn(frames, width // 2).repeat_interleave(2, dim=-1)
    rotary = (angles.cos(), angles.sin()) if temporal else None
    grads = [randn(*x.shape) for _ in range(2)] if training else []

    def run() -> None:
        with torch.set_grad_enabled(training):
            tokens = block(
                x.requires_grad_(training), text, modulation, frames,
                rotary=rotary, normed=normed.requires_grad_(training), following=modulation,
            )  # fmt: skip
            if training:
                torch.autograd.backward(tokens, grads)

    return run


def _clip(_: int) -> Run:
    """Prepare the clip of `opensora generate`, made for the second time: the first loads code."""
    pipe = OpenSoraPipeline.from_pretrained("tiny", device="cpu")

    def run() -> None:
        pipe("a red circle moving right", seed=0, progress=False)

    run()
    return run


JOBS: dict[str, Callable[[int], Run]] = {
    "spatial block 480p forward": partial(_block, False, False),
    "spatial block 480p forward and backward": partial(_block, False, True),
    "temporal block 480p forward": partial(_block, True, False),
    "temporal block 480p forward and backward": partial(_block, True, True),
    "clip of the embedded model": _clip,
}


def peak(job: str, mode: str, frames: int = FRAMES) -> int:
    """Return the bytes by which a job raises the peak of a new process.

    Raises:
        RuntimeError: The process failed; its last words.
    """
    command = [sys.executable, "-m", "bench.memory", "--job", job, "--mode", mode]
    command += ["--frames", str(frames)]
    # Blocks from here on are the system's, whatever was freed before (glibc).
    limits = {name: str(2**17) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    run = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=os.environ | limits,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {run.stderr[-2000:]}")
    return int(run.stdout)


def measure(job: str, frames: int = FRAMES) -> dict[str, float]:
    """Return the peaks of both modes in MB, and the kernels' as a part of the references'."""
    kernels, reference = (peak(job, mode, frames) for mode in MODES)
    figures = {"kernels": kernels / 1e6, "reference": reference / 1e6}
    return {k: round(v, 1) for k, v in figures.items()} | {"ratio": round(kernels / reference, 3)}


def fallen(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Say where kernels take more than they may."""
    return [
        f"{job}: {f['ratio']} of the references' peak memory, allowed {MOST}"
        for job, f in results.items()
        if f["ratio"] > MOST
    ]


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Write figures as lines."""
    lines = [f"{'peak memory beside inputs and weights':44}{'kernels':>11}{'reference':>11}  ratio"]
    for job, f in results.items():
        lines.append(f"{job:44}{f['kernels']:>8.1f} MB{f['reference']:>8.1f} MB{f['ratio']:>7.2f}")
    return "\n".join(lines)


def _status(field: str) -> int:
    """Return a size that the kernel keeps of this process, in bytes."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def _growth(run: Run) -> int:
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    run()
    return _status("VmHWM") - before


def main(argv: Sequence[str] | None = None) -> int:
    """Print the peaks of all jobs, or of one; 1 where the kernels take more than they may."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=main.__doc__)
    parser.add_argument(
        "--job", choices=JOBS, help="run it here and print its bytes; all if not given"
    )
    parser.add_argument("--mode", choices=MODES, default="kernels", help="of --job")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of the blocks")
    args = parser.parse_args(argv)
    if not supported():
        print("this system keeps no peak that can be reset: Linux does")
        return 1
    if args.job is not None:
        with testing.reference() if args.mode == "reference" else testing._mode("auto"):
            print(_growth(JOBS[args.job](args.frames)))
        return 0
    results = {job: measure(job, args.frames) for job in JOBS}
    print(table(results))
    return 1 if fallen(results) else 0


if __name__ == "__main__":
    sys.exit(main())
