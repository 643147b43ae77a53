"""Do work in threads that an interrupt ends, whenever it comes.

Not concurrent.futures: a Ctrl-C that hits its locks at the wrong moment leaves one of them held,
and the process waits for its threads for ever. Here threads share with their user nothing but
queues written in C and a flag that they look at several times a second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")

#: Seconds after which an idle thread looks whether it is still wanted.
_LOOK = 0.2


class Pending(Generic[R]):
    """Hold work that may not be done yet."""

    def __init__(self, work: Callable[[], R]) -> None:
        self.work = work
        self.done: SimpleQueue[tuple[R | None, BaseException | None]] = SimpleQueue()

    def result(self) -> R:
        """Wait for the result and return it, once; what the work raised is raised here."""
        value, error = self.done.get()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]


class Workers:
    """Run work in threads, in the order in which it was given; use it in a `with` block.

    Leaving the block drops the work that nobody has begun and waits for the rest. Within an
    operation of torch every thread works alone.

    Args:
        count: threads.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._wanted = True
        self._work: SimpleQueue[Pending[Any] | None] = SimpleQueue()
        self._ready: SimpleQueue[None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(count)
        ]

    def __enter__(self) -> Workers:
        try:
            for thread in self._threads:
                thread.start()
            for _ in self._threads:
                self._ready.get()
            # Threads that are yet to come take the number that was set last, by anyone: this one's.
            torch.set_num_threads(torch.get_num_threads())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def submit(self, work: Callable[[], R]) -> Pending[R]:
        """Have work done."""
        pending = Pending(work)
        self._work.put(pending)
        return pending

    def _stop(self) -> None:
        self._wanted = False
        for _ in self._threads:
            self._work.put(None)  # wakes an idle one
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _run(self) -> None:
        # How many threads an operation takes is its caller's own affair, once that has asked.
        torch.get_num_threads()
        torch.set_num_threads(1)
        self._ready.put(None)
        while self._wanted:
            try:
                pending = self._work.get(timeout=_LOOK)
            except Empty:
                continue
            if pending is None or not self._wanted:
                continue
            try:
                pending.done.put((pending.work(), None))
            except BaseException as error:
                pending.done.put((None, error))
