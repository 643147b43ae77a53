"""Show how far a run is and how long it will take, on a terminal only.

Bars go to stderr, so that stdout holds results alone. Where stderr is not a terminal, or bars are
switched off, every call does nothing and tqdm is not even imported.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

#: `report(done, total)`: how functions that take long tell their progress.
Report = Callable[[int, int], None]


class Progress:
    """Draw one bar at a time.

    Args:
        enabled: None draws bars if stderr is a terminal; False never does; True always does.

    Example:
        with Progress() as progress:
            report = progress.stage("decoding", "chunk")
            report(1, 4)
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
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


def _ignore(done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def bars_of(progress: bool | Progress) -> Iterator[Progress]:
    """Use the caller's bars, or draw and close our own."""
    if isinstance(progress, Progress):
        yield progress
        return
    with Progress(None if progress else False) as own:
        yield own
