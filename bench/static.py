"""Gate what compiled Triton kernels use, on a machine without a GPU.

    python -m bench.static              # compile, print, compare with bench/baselines/static.json
    python -m bench.static --update     # accept the present counts; say why in the commit

Every `bench/ops/bench_<op>.py` lists under `STATIC` launches at the models' shapes. Each kernel is
compiled for sm_80, sm_90 and sm_100. A kernel fails if it spills, if more than 1.12 multiply-
accumulates are issued for each useful one, if a kind of memory access is new, if registers, shared
memory, barriers or instructions grew by more than 10 %, or if there are fewer barriers than before:
no test without a GPU sees a race. Counts depend on Triton's version, so the baseline names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from opensora.launches import CAPABILITIES, Launch, record

BASELINE = Path(__file__).parent / "baselines/static.json"
GROWTH = 1.10
MACS_PER_USEFUL = 1.12
#: Least growth that counts: a register more of 8 is no news.
SLACK = {"registers": 8, "shared": 512, "barriers": 2, "instructions": 64}
#: Growth of compile time that fails: a loaded machine alone makes a factor of three.
SECONDS = (4.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Static:
    """Name a launch to count.

    Attributes:
        launch: Calls a launcher on meta tensors.
        useful: Kernel name and its constants -> multiply-accumulates that the products in its text
            would need without padding; None where it has none.
    """

    launch: Callable[[], object]
    useful: Callable[[str, dict[str, Any]], int] | None = None


def cases(only: str = "") -> dict[str, Static]:
    """Collect the cases of ops whose name begins with `only`: "<op> <case>" -> case."""
    found: dict[str, Static] = {}
    for path in sorted((Path(__file__).parent / "ops").glob("bench_*.py")):
        op = path.stem.removeprefix("bench_")
        if op.startswith(only):
            module = import_module(f"bench.ops.{path.stem}")
            found |= {f"{op} {name}": case for name, case in module.STATIC.items()}
    return found


def kernels(case: Static) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of a case, a kernel launched twice as "kernel", "kernel 2"."""
    seen: dict[str, int] = {}
    for launch in record(case.launch):
        seen[launch.name] = seen.get(launch.name, 0) + 1
        yield launch.name + (f" {seen[launch.name]}" if seen[launch.name] > 1 else ""), launch


def count(case: Static, launch: Launch, capability: int) -> dict[str, Any]:
    """Compile one kernel and return its counts as JSON values."""
    counts = dataclasses.asdict(launch.compile(capability))
    counts |= {name: sorted(counts[name]) for name in ("accesses", "matrix")}
    macs = counts.pop("macs")
    if macs and case.useful is not None:
        counts["macs_per_useful"] = round(macs / case.useful(launch.name, launch.constants), 4)
    return counts


def problems(counts: dict[str, Any], known: dict[str, Any] | None) -> list[str]:
    """List what is wrong with a kernel's counts, beside its baseline if there is one."""
    found = []
    if counts["spills"]:
        found.append(f"{counts['spills']} spill instructions")
    if counts.get("macs_per_useful", 1.0) > MACS_PER_USEFUL:
        found.append(f"{counts['macs_per_useful']:.3f} multiply-accumulates a useful one")
    if known is None:
        return [*found, "not in the baseline (python -m bench.static --update)"]
    for name, slack in SLACK.items():
        if counts[name] > max(known[name] * GROWTH, known[name] + slack):
            found.append(f"{name} grew from {known[name]} to {counts[name]}")
    if counts["barriers"] < known["barriers"]:  # values of one thread may go unseen by others
        found.append(f"barriers fell from {known['barriers']} to {counts['barriers']}")
    new = set(counts["accesses"]) - set(known["accesses"])
    if new:
        found.append(f"new memory accesses {', '.join(sorted(new))}")
    if not counts["matrix"] and known["matrix"]:
        found.append(f"no longer uses {', '.join(known['matrix'])}")
    factor, floor = SECONDS
    if counts["seconds"] > max(known["seconds"] * factor, floor):
        found.append(f"compiling took {counts['seconds']} s, it was {known['seconds']}")
    return found


def load() -> dict[str, Any]:
    """Read the baseline: {"triton": version, "kernels": {name: counts}}."""
    baseline: dict[str, Any] = json.loads(BASELINE.read_text("utf-8"))
    return baseline


def main(argv: Sequence[str] | None = None) -> int:
    """Count every kernel, print a table, and compare or update; 1 if a kernel fails."""
    import triton

    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--only", default="", help="ops whose name begins so")
    args = parser.parse_args(argv)
    known = load() if BASELINE.exists() else {"triton": triton.__version__, "kernels": {}}
    if known["triton"] != triton.__version__ and not args.update:
        print(f"the baseline is of Triton {known['triton']}, this is {triton.__version__}")
        return 1
    found: dict[str, Any] = {}
    bad = 0
    columns = ("registers", "spills", "shared", "barriers", "instructions", "seconds")
    print(f"{'kernel':72}" + "".join(f"{name:>13}" for name in columns) + "  MACs  accesses")
    for name, case in cases(args.only).items():
        for kernel, launch in kernels(case):
            for capability in CAPABILITIES:
                title = f"{name}: {kernel} sm_{capability}"
                counts = found[title] = count(case, launch, capability)
                cells = "".join(f"{counts[column]:>13}" for column in columns)
                macs = f"{counts['macs_per_useful']:.2f}" if "macs_per_useful" in counts else "-"
                print(f"{title:72}{cells}{macs:>6}  {' '.join(counts['accesses'])}", flush=True)
                before = known["kernels"].get(title)
                failures = problems(counts, counts if args.update else before)
                bad += bool(failures)
                for failure in failures:
                    print(f"    FAIL {failure}")
    if args.update:
        kept = {
            title: counts
            for title, counts in known["kernels"].items()
            if args.only and not title.startswith(args.only)
        }
        content = {"triton": triton.__version__, "kernels": dict(sorted((kept | found).items()))}
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(found)} kernels, {bad} failed")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main())
