"""End a run between two steps when a signal asks for it, on all processes at the same one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from opensora.distributed.collectives import all_reduce


class Stopping:
    """Remember that SIGTERM or SIGINT came; a second one ends the process at once.

    Args:
        say: tells the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._asked = say, threading.Event()

    def agreed(self) -> bool:
        """Tell whether any process was asked to stop; all processes call it."""
        own = torch.tensor(float(self._asked.is_set()))
        return bool(all_reduce(own, "the wish to stop", "max") > 0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals within the block."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the business of whoever runs us in a thread
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked.is_set():
                raise KeyboardInterrupt
            self._asked.set()
            self._say("stopping after this step; once more to stop at once")

        before: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, ask)
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
