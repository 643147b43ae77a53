"""Gate what the compiled CUDA kernels use, on a machine without a GPU.

    python -m bench.static_cuda             # compare with bench/baselines/static_cuda.json
    python -m bench.static_cuda --update    # accept the present counts; say why in the commit

Reads the code for sm_80 and sm_90a out of `opensora/_C_cuda.abi3.so`, as it is shipped. A kernel
fails as in `bench.static`: by spills, growth, new kinds of memory access, fewer barriers. Shared
memory is asked for at launch; `csrc/cuda/harness` checks that it fits. Counts depend on nvcc's
version, so the baseline names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.static import problems
from opensora.launches import cubins, disassemble

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "opensora/_C_cuda.abi3.so"
BASELINE = ROOT / "bench/baselines/static_cuda.json"
COLUMNS = ("registers", "spills", "barriers", "instructions")


def count(library: Path = LIBRARY) -> dict[str, dict[str, Any]]:
    """Return the counts of every kernel: "qk_norm_rope::run<Bf16, 72> sm_90a" -> counts."""
    found = {}
    for stem, cubin in cubins(library).items():
        for symbol, resources in disassemble(cubin).items():
            counts = dataclasses.asdict(resources)
            counts |= {name: sorted(counts[name]) for name in ("accesses", "matrix")}
            del counts["macs"]  # counted in the text of Triton's kernels
            found[f"{_readable(symbol)} {stem.rpartition('.')[2]}"] = counts
    return found


def _readable(symbol: str) -> str:
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    return re.sub(r"opensora::|void |\([^()]*\)$", "", name.strip())


def load() -> dict[str, Any]:
    """Read the baseline: {"nvcc": version, "kernels": {name: counts}}."""
    baseline: dict[str, Any] = json.loads(BASELINE.read_text("utf-8"))
    return baseline


def compiler(library: Path = LIBRARY) -> str:
    """Return the version of ptxas that a library's code names: "13.0.88"."""
    (cubin, *_) = cubins(library).values()
    found = re.search(rb"V(\d+\.\d+\.\d+)", cubin)
    return "unknown" if found is None else found[1].decode()


def main(argv: Sequence[str] | None = None) -> int:
    """Count every kernel, print a table, and compare or update; 1 if a kernel fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.static_cuda", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--update", action="store_true", help="write the baseline")
    args = parser.parse_args(argv)
    if not LIBRARY.is_file():
        print(f"{LIBRARY.name} is not built: install nvcc (pip install '.[nvcc]') and build again")
        return 1
    found = count()
    baseline = {"nvcc": compiler(), "kernels": {}} if args.update else load()
    if baseline["nvcc"] != compiler():
        print(f"the baseline is of nvcc {baseline['nvcc']}, this is {compiler()}")
        return 1
    known = baseline["kernels"]
    bad = 0
    print(f"{'kernel':56}" + "".join(f"{name:>13}" for name in COLUMNS) + "  accesses")
    for title, counts in found.items():
        cells = "".join(f"{counts[column]:>13}" for column in COLUMNS)
        print(f"{title:56}{cells}  {' '.join(counts['matrix'] + counts['accesses'])}")
        failures = problems(counts, counts if args.update else known.get(title))
        bad += bool(failures)
        for failure in failures:
            print(f"    FAIL {failure}")
    if args.update:
        content = {"nvcc": compiler(), "kernels": dict(sorted(found.items()))}
        BASELINE.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(found)} kernels, {bad} failed")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main())
