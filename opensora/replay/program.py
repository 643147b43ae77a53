"""Replay a folder of recorded cases and print what agrees."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora.errors import UsageError
from opensora.program import run_program
from opensora.replay.judging import Result
from opensora.replay.kinds import replay_file

SUFFIXES = (".json", ".safetensors")
VERDICTS = ("pass", "fail", "unsupported")


def main(argv: Sequence[str] | None = None, *, program: str = "replay_golden.py") -> int:
    """Run the program; return its exit status: 0, or 1 if a case fails, or 2 for wrong usage."""
    return run_program(lambda: _main(sys.argv[1:] if argv is None else argv, program))


def _main(argv: Sequence[str], program: str) -> int:
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument("folder", type=Path, help="where the case files are")
    parser.add_argument("--only", metavar="PATTERN", help="glob over case names (file stems)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args(argv)
    files = find_cases(args.folder, args.only)
    width = max(len(path.stem) for path in files)
    print(f"{'case':{width}}  {'error':>9}  {'tolerance':>9}  verdict      detail")
    results = []
    for path in files:
        result = replay_file(path)
        results.append(result)
        print(
            f"{result.case:{width}}  {_number(result.error)}  {_number(result.tolerance)}  "
            f"{result.verdict:11}  {result.detail}",
            flush=True,
        )
    counts = {name: sum(r.verdict == name for r in results) for name in VERDICTS}
    print(", ".join(f"{name} {number}" for name, number in counts.items()))
    if args.json:
        print(json.dumps({**counts, "cases": [_as_json(result) for result in results]}))
    return 1 if counts["fail"] else 0


def find_cases(folder: Path, pattern: str | None) -> list[Path]:
    """List the case files of a folder whose stem matches the glob, by name.

    Raises:
        UsageError: no such folder, or nothing in it matches.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the folder of the recorded cases")
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise UsageError(f"{folder} holds no case: no file ends in {' or '.join(SUFFIXES)}")
    if pattern is None:
        return files
    chosen = [path for path in files if fnmatch.fnmatchcase(path.stem, pattern)]
    if not chosen:
        raise UsageError(
            f"--only {pattern}: none of the {len(files)} cases in {folder} has such a name; "
            f"they are called {files[0].stem}, ..."
        )
    return chosen


def _number(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2g}':>9}"


def _as_json(result: Result) -> dict[str, str | float | None]:
    """Return a result as JSON values; what is not a finite number becomes null."""
    values = dataclasses.asdict(result)
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
