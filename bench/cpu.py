"""Time every kernel of the CPU beside copies and peers, and compare with what was recorded.

    python -m bench.cpu                   # the table of `make bench` without a GPU
    python -m bench.cpu --update          # record, after a change that is meant

All figures are ratios of times that were taken in turns in one process. `share` is the time of
copying the bytes that an op must move (into memory that is allocated, like the op's result) over
the time of the op; of the others, how many times as long as the op they took. The record in
`bench/baselines/cpu.json` holds them for one processor; a figure under `KEPT` of it fails, after
being taken again a while later (see `PAUSES`). On a processor that it does not name no time fails.
A plot goes beside it.
The peak memory of models (`bench/memory.py`) follows, and may nowhere exceed the references'.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cases, memory
from bench.gpu import collect
from bench.plot import bars
from bench.shapes import CPU
from opensora import _extension, testing
from opensora.progress import Progress

BASELINE = Path(__file__).parent / "baselines/cpu.json"
#: Least part of a recorded figure: what a busy neighbour takes from one side of a pair alone.
KEPT = 0.6
DTYPES = (torch.bfloat16, torch.float32)
#: Seconds before each measurement of what was too slow so far: busy neighbours leave.
PAUSES = (0.0, 0.0, 5.0, 10.0, 20.0)
#: Measurements whose median is recorded: one alone may be a lucky one, which no later one reaches.
RECORDED_OF = 3
#: What PyTorch offers without a GPU.
PEERS = ("sdpa flash", "inductor + sdpa flash")

Figures = dict[str, float]


def processor() -> str:
    """Name this processor by its model, instruction set and threads."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {_extension.instruction_set()}, {torch.get_num_threads()} threads"


def chosen(only: str) -> dict[str, tuple[cases.Case, torch.dtype]]:
    """List what is timed: title -> case and dtype, of all ops that have a kernel here."""
    found = {}
    for title, case in collect(only).items():
        if f" {CPU} " not in title:
            continue
        for dtype in DTYPES:
            name = f"{title} {str(dtype).removeprefix('torch.')}".replace(f" {CPU} ", " ")
            found[name] = (case, dtype)
    return found


def measure(case: cases.Case, dtype: torch.dtype, rounds: int = 7) -> Figures | None:
    """Return the figures of one case; None where no kernel takes it.

    Raises:
        AssertionError: The kernel's result is wrong.
    """
    arguments = case.arguments(dtype, "cpu", 0)
    functions: dict[str, Any] = {"op": case.run, "eager": case.reference}
    functions |= {name: peer for name, peer in case.peers.items() if name in PEERS}
    with torch.no_grad():
        with testing.require():
            try:
                result = cases.tensors(case.run(*arguments))
            except NotImplementedError:
                return None
        # What is fast and wrong is not fast.
        for one, other in zip(result, cases.tensors(case.reference(*arguments)), strict=True):
            loose = 2e-2 if dtype == torch.bfloat16 else 1e-3
            scale = other.abs().max().item()
            assert (one.float() - other.float()).abs().max().item() <= loose * max(scale, 1e-6)
        calls = {name: (lambda f=function: f(*arguments)) for name, function in functions.items()}
        if case.moved is not None:
            itemsize = torch.empty((), dtype=dtype).element_size()
            calls["copy"] = testing.randn(case.moved(itemsize) // 8, dtype=torch.float32).clone
        ratios = testing.median_ratios(testing.interleave(calls, rounds=rounds), to="op")
    figures = {name: round(ratio, 3) for name, ratio in ratios.items() if name != "op"}
    if "copy" in figures:
        figures = {"share": figures.pop("copy"), **figures}
    return figures


def fallen(figures: Figures, recorded: Figures) -> list[str]:
    """Say which figures are under `KEPT` of what was recorded.

    A share above 1 is a matter of which caches hold what; as fast as a copy is all it says. Where
    the share holds, a peer that comes nearer has itself become faster (eager code does by half,
    with what the allocator kept); it may not overtake.
    """
    least = {
        name: KEPT * (min(value, 1.0) if name == "share" else value)
        for name, value in recorded.items()
    }
    if "share" in least and figures.get("share", 0.0) >= least["share"]:
        least |= {name: min(value, 1.0) for name, value in least.items() if name != "share"}
    return [
        f"{name} {figures.get(name, 0.0):.2f}, recorded {value:.2f}"
        for name, value in recorded.items()
        if figures.get(name, 0.0) < least[name]
    ]


def check(
    case: cases.Case, dtype: torch.dtype, recorded: Figures
) -> tuple[Figures | None, list[str]]:
    """Measure until every figure was good enough once; return the best ones and what stays low."""
    best: Figures = {}
    for pause in PAUSES:
        time.sleep(pause)
        figures = measure(case, dtype)
        if figures is None:
            return None, ["no kernel takes it"] if recorded else []
        best = {name: max(value, best.get(name, 0.0)) for name, value in figures.items()}
        if not fallen(best, recorded):
            break
    return best, fallen(best, recorded)


def typical(case: cases.Case, dtype: torch.dtype) -> Figures | None:
    """Return the median of each figure over several measurements, for the record."""
    several = [measure(case, dtype) for _ in range(RECORDED_OF)]
    taken = [figures for figures in several if figures is not None]
    if not taken:
        return None
    return {name: statistics.median(figures[name] for figures in taken) for name in taken[0]}


def table(results: Mapping[str, Figures]) -> str:
    """Write figures as lines."""
    lines = [f"{'case':58}{'share':>7}  times faster than"]
    for name, figures in results.items():
        share = f"{figures['share']:.2f}" if "share" in figures else "-"
        others = "  ".join(f"{n} {ratio:.2f}" for n, ratio in figures.items() if n != "share")
        lines.append(f"{name:58}{share:>7}  {others}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, compare; 1 if a figure has fallen."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=main.__doc__)
    parser.add_argument("--only", default="", help="ops whose name begins so, or memory")
    parser.add_argument("--update", action="store_true", help="record instead of comparing")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="file of the record")
    args = parser.parse_args(argv)
    if _extension.path is None:
        print("no compiled kernels: pip install --no-build-isolation . with a C++ compiler")
        return 1
    record = json.loads(args.baseline.read_text("utf-8")) if args.baseline.is_file() else {}
    known = record.get("processor") == processor() and not args.update
    recorded: dict[str, Figures] = record.get("results", {}) if known else {}
    results: dict[str, Figures] = {}
    failures: list[str] = []
    work = chosen(args.only)
    with Progress() as progress:
        report = progress.stage("timing", "case")
        for done, (name, (case, dtype)) in enumerate(work.items(), 1):
            if args.update:
                found, low = typical(case, dtype), []
            else:
                found, low = check(case, dtype, recorded.get(name, {}))
            report(done, len(work))
            failures += [f"{name}: {reason}" for reason in low]
            if found is not None:
                results[name] = found
    print(f"{processor()}, torch {torch.__version__}")
    peaks: dict[str, dict[str, float]] = {}
    if args.only in ("", "memory") and memory.supported():
        peaks = {job: memory.measure(job) for job in memory.JOBS}
    failures += memory.fallen(peaks)
    if results:
        print(table(results))
    if peaks:
        print(memory.table(peaks))
    if args.update:
        kept = {} if not args.only else record.get("results", {})
        record = {
            "processor": processor(),
            "torch": torch.__version__,
            "results": dict(sorted((kept | results).items())),
            "memory": peaks or record.get("memory", {}),
        }
        args.baseline.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        entries = [
            {"case": name, "dtype": "", "share": figures.get("share"), "correct": True}
            for name, figures in record["results"].items()
        ]
        title = "Kernels on a CPU"
        args.baseline.with_suffix(".svg").write_text(bars(entries, title), "utf-8")
        print(f"wrote {args.baseline} and {args.baseline.with_suffix('.svg').name}")
    elif not known:
        print(f"nothing compared: {args.baseline.name} was recorded on {record.get('processor')}")
    for line in failures:
        print(f"FALLEN  {line}")
    print(f"{len(results) + len(peaks)} cases, {len(failures)} figures fell")
    return 1 if failures or not (results or peaks) else 0


if __name__ == "__main__":
    sys.exit(main())
