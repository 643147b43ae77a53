"""Check every kernel on this machine's GPU, then time it: the one command of a GPU machine.

    make gpu        # or: python -m bench.gpu

Builds the compiled library in place if a compiler is there, installs nothing and needs no network.
Runs the tests of all ops, compares every case of `bench/ops` with float64 (on a GPU in bfloat16 and
float16), repeats it on poisoned memory, times it beside its peers, and writes
`bench/baselines/<gpu>.json` and a plot beside it. Where all cases of an op passed, the file vouches
for its kernels on GPUs of this architecture (`opensora/verified.py`). The table comes last. All
cases are verified before the first is timed, and when the time is up the rest is left untimed and
says so. Without a GPU the same steps run on the CPU, where references serve most ops; nothing is
written then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench import cases
from bench.plot import bars
from bench.shapes import CPU
from opensora import trust
from opensora.ops import _library
from opensora.verified import describe

ROOT = Path(__file__).parent.parent
#: Larger inputs are left to GPUs.
CPU_BYTES = 4 * 2**20


def device_name(device: str) -> str:
    """Name a device for a file: "nvidia-h100-80gb-hbm3"."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def collect(only: str) -> dict[str, cases.Case]:
    """List the cases of all ops: "<op> <case>" -> case."""
    found: dict[str, cases.Case] = {}
    for path in sorted((Path(__file__).parent / "ops").glob("bench_*.py")):
        op = path.stem.removeprefix("bench_")
        if op.startswith(only):
            module = import_module(f"bench.ops.{path.stem}")
            found |= {f"{op} {name}": case for name, case in module.CASES.items()}
    return found


def build() -> str:
    """Compile csrc into the checkout; says what happened."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (run.stdout + run.stderr).strip().splitlines()
    if run.returncode:
        return f"failed: {lines[-1] if lines else run.returncode}"
    return next((line for line in lines if line.startswith("opensora: ")), "done")


def run_tests(seconds: float) -> str:
    """Run the tests of all ops in a process of their own; says how it went."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "tests/ops"]
    # The interpreter's turn is on machines without a GPU.
    command += ["-k", "not interpreter", "-p", "no:cacheprovider"]
    try:
        status = subprocess.run(command, cwd=ROOT, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    return "failed" if status else "passed"


def verify(title: str, case: cases.Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Compare one case with float64; a failure is part of the answer."""
    entry: dict[str, Any] = {"case": title, "dtype": str(dtype).removeprefix("torch.")}
    checked = [dtype]
    if device == "cuda" and dtype == torch.bfloat16:
        checked.append(torch.float16)
    started = time.monotonic()
    # One kernel that is wrong or cannot run must not cost the figures of all others.
    try:
        with torch.no_grad():
            for each in checked:
                cases.verify(case, each, device)
        entry |= {"correct": True, "checked": [str(t).removeprefix("torch.") for t in checked]}
    except Exception as error:
        where = "" if each == dtype else f"{each}: "
        entry |= {"correct": False, "error": where + _first_line(error)}
    _report(entry, "verified", started, device)
    return entry


def measure(entry: dict[str, Any], case: cases.Case, dtype: torch.dtype, device: str) -> None:
    """Time one case and add the figures to its entry."""
    started = time.monotonic()
    try:
        with torch.no_grad():
            result = cases.measure(case, dtype, device, rounds=9 if device == "cuda" else 3)
        entry |= dataclasses.asdict(result)
    except Exception as error:
        entry |= {"correct": False, "error": _first_line(error)}
    _report(entry, "timed", started, device)


def _report(entry: dict[str, Any], done: str, started: float, device: str) -> None:
    took, state = time.monotonic() - started, entry.get("error", "correct")
    print(f"{done} {entry['case']} {entry['dtype']}: {took:.1f} s  {state}", flush=True)
    if device == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return name + (text[0] if text else "")


def vouch(entries: Sequence[dict[str, Any]], passed: bool) -> dict[str, dict[str, Any]]:
    """Return, for each op, the version of its GPU kernels and the dtypes that its cases checked.

    Args:
        entries: Of `verify`, all cases of an op.
        passed: Whether the tests of the ops did, or were not run.
    """
    ops = {op.family: op for op in reversed(_library.registry)}
    found: dict[str, dict[str, Any]] = {}
    for family in sorted({entry["case"].partition(" ")[0] for entry in entries} & set(ops)):
        own = [entry for entry in entries if entry["case"].partition(" ")[0] == family]
        known = describe(family, ops[family].version, torch.device("cuda"), torch.float32)
        found[family] = {
            "version": known.version,
            "architecture": known.architecture,
            "dtypes": sorted({dtype for entry in own for dtype in entry.get("checked", ())}),
            "passed": passed and all(entry["correct"] for entry in own),
        }
    return found


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Write the results as lines: time, share of copy or product speed, times faster than peers."""
    lines = [f"{'case':58}{'us':>10}{'share':>7}  times faster than"]
    for entry in entries:
        title = f"{entry['case']} {entry['dtype']}"
        if "seconds" not in entry:
            state = f"FAILED  {entry['error']}" if "error" in entry else "not timed: time was up"
            lines.append(f"{title:58}    {state}")
            continue
        share = "-" if entry["share"] is None else f"{entry['share']:.2f}"
        peers = "  ".join(f"{name} {ratio:.2f}" for name, ratio in entry["ratios"].items())
        peers += "".join(f"  {name} -" for name in entry["missing"])
        wrong = "" if entry["correct"] else f"  WRONG: {entry['error']}"
        lines.append(f"{title:58}{entry['seconds'] * 1e6:>10.1f}{share:>7}  {peers}{wrong}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Build, test, verify, time, write; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=main.__doc__)
    parser.add_argument("--only", default="", help="ops whose name begins so")
    parser.add_argument("--no-tests", action="store_true", help="skip the tests of the ops")
    parser.add_argument("--minutes", type=float, default=9, help="timing ends then; 9 if not given")
    parser.add_argument("--output", type=Path, help="folder of the json and the plot")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    print(f"torch {torch.__version__}, {device_name(device)}, compiled library: {build()}")
    if device == "cpu":
        print("no GPU here: CPU kernels and references are checked on small shapes; no figure is")
        print("kept, and Triton's values are tested in the interpreter (make test)")
    tested = "not run" if args.no_tests else run_tests(24 * args.minutes)
    chosen = [
        (title, case, dtype)
        for title, case in collect(args.only).items()
        for dtype in case.dtypes
        if f" {CPU} " not in f" {title} " and (device == "cuda" or case.size(dtype) <= CPU_BYTES)
    ]
    # What the models run first; the embedded model's sizes last.
    chosen.sort(key=lambda entry: "tiny" in entry[0])
    with trust.suspend():  # the cases are the check
        entries = [verify(title, case, dtype, device) for title, case, dtype in chosen]
        for entry, (_, case, dtype) in zip(entries, chosen, strict=True):
            if time.monotonic() < end:
                measure(entry, case, dtype, device)
    copy, product = cases.copy_speed(device), cases.product_speed(device)
    summary = {
        "device": device_name(device),
        "torch": torch.__version__,
        "copy_bytes_per_second": copy,
        "product_flops_per_second": product,
        "results": entries,
    }
    if device == "cuda":
        summary["verified"] = vouch(entries, tested != "failed")
    folder = args.output or (Path(__file__).parent / "baselines" if device == "cuda" else None)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{device_name(device)}.json"
        path.write_text(json.dumps(summary, indent=1) + "\n")
        path.with_suffix(".svg").write_text(bars(entries, f"Kernels on {device_name(device)}"))
        print(f"wrote {path} and {path.with_suffix('.svg').name}")
    print(f"copy {copy / 1e9:.0f} GB/s, bfloat16 product {product / 1e12:.2f} TFLOP/s")
    print(table(entries))
    wrong = sum(not entry["correct"] for entry in entries)
    print(f"{len(entries)} cases, {wrong} wrong; tests of the ops: {tested}")
    return 1 if tested not in ("passed", "not run") or wrong or not entries else 0


if __name__ == "__main__":
    sys.exit(main())
