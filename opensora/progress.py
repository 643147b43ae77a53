"""Show how far a run is and how long it will take.

A terminal gets bars. Elsewhere, as in the log of a cluster, stages that last get a plain line now
and then:

    encoding 17x64x64: 1024/16384 clips, 33.1 clips/s, 7 min left

Both go to stderr, so that stdout holds results alone.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

#: `report(done, total)`: how functions that take long tell their progress.
Report = Callable[[int, int], None]

FIRST = 10.0  # seconds until the first line of a stage; shorter stages say nothing
BETWEEN = 30.0  # at least, between two lines
LONGEST = 300.0  # and at most: between the two, a tenth of what has passed

_WANTED = ContextVar("progress is wanted", default=True)


class Progress:
    """Draw one bar at a time, or write lines where bars cannot be drawn.

    Args:
        enabled: None draws bars if stderr is a terminal, and writes lines otherwise, in the first
            of torchrun's processes and not below `silenced`; False does neither; True always
            draws.

    Example:
        with Progress() as progress:
            report = progress.stage("decoding", "chunk")
            report(1, 4)
    """

    def __init__(self, enabled: bool | None = None) -> None:
        wanted = _WANTED.get() and os.environ.get("RANK", "0") == "0"
        self.enabled = wanted if enabled is None else enabled
        self._draws = sys.stderr.isatty() if enabled is None else enabled
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def stage(self, name: str, unit: str = "step") -> Report:
        """Begin a stage, closing the one before; returns the function that reports its progress."""
        self.close()
        if not self.enabled:
            return _ignore
        return self._bars(name, unit) if self._draws else _Lines(name, unit)

    def _bars(self, name: str, unit: str) -> Report:
        def report(done: int, total: int) -> None:
            if self._bar is None:
                from tqdm import tqdm

                # tqdm draws nothing on terminals that say they are 0 x 0; this says 80 x 24 then.
                columns, rows = shutil.get_terminal_size()
                self._bar = tqdm(
                    desc=name,
                    unit=unit,
                    unit_scale=unit == "B",
                    total=total,
                    file=sys.stderr,
                    ncols=columns,
                    nrows=rows,
                )
            self._bar.total = total
            self._bar.update(done - self._bar.n)

        return report

    def close(self) -> None:
        """Finish the bar that is on the screen, if any."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines:
    """Write a line about a stage now and then, the more rarely the longer it lasts."""

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit
        self._started = time.monotonic()
        self._due = self._started + FIRST

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._due or not done:
            return
        passed = now - self._started
        self._due = now + min(LONGEST, max(BETWEEN, passed / 10))
        size, unit = (1e6, "MB") if self.unit == "B" else (1, f"{self.unit}s")
        rate = done / passed
        slow = self.unit != "B" and rate < 1
        speed = f"{1 / rate:.1f} s/{self.unit}" if slow else f"{rate / size:.1f} {unit}/s"
        print(
            f"{self.name}: {done / size:.0f}/{total / size:.0f} {unit}, {speed}, "
            f"{duration((total - done) / rate)} left",
            file=sys.stderr,
            flush=True,
        )


def duration(seconds: float) -> str:
    """Format a length of time in words: 40 s, 7 min, 2 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _ignore(done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def silenced(quiet: bool = True) -> Iterator[None]:
    """Show no progress within the block, if asked not to: `--quiet` of a program."""
    token = _WANTED.set(_WANTED.get() and not quiet)
    try:
        yield
    finally:
        _WANTED.reset(token)


@contextmanager
def bars_of(progress: bool | Progress) -> Iterator[Progress]:
    """Use the caller's bars, or draw and close our own."""
    if isinstance(progress, Progress):
        yield progress
        return
    with Progress(None if progress else False) as own:
        yield own
