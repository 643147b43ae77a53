"""Set rows aside that cannot be read, with the reason, and remember them over restarts."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from opensora.data.batch import SampleError
from opensora.errors import UsageError

FILE_NAME = "quarantine.jsonl"


class UnreadableError(SampleError):
    """A row fails whatever is asked of it: its file is missing, cut off, or no clip at all.

    Such a row is not read a second time. Any other SampleError may depend on the frames that were
    drawn, and the row gets its chance again: what a run sees must not depend on which of its reads
    came first.
    """


class Quarantine:
    """Collect rows that could not be read: one JSON object a line in the run's folder.

    Delete the file, or a line of it, to have the rows read again.

    Args:
        folder: of the run; nothing is written if None. Lines that an earlier run left are read.

    Attributes:
        unreadable: name -> reason of the rows that are not read again.

    Raises:
        UsageError: the file is there and cannot be read.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = folder / FILE_NAME if folder else None
        self.unreadable: dict[str, str] = {}
        self._written: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        if self.path is None or not self.path.exists():
            return
        try:
            lines = self.path.read_text("utf-8", "replace").splitlines()
        except OSError as error:
            raise UsageError(f"cannot read {self.path}: {error.strerror or error}") from error
        for line in lines:
            try:
                fact = json.loads(line)
                name, reason = str(fact["name"]), str(fact["reason"])
            except (ValueError, KeyError, TypeError):
                continue  # the end of a line that a crash cut off
            self._written.add((name, reason))
            if fact.get("unreadable"):
                self.unreadable[name] = reason

    def add(self, name: str, error: SampleError) -> None:
        """Note a row that could not be read; the same failure is written once."""
        reason, forever = str(error), isinstance(error, UnreadableError)
        with self._lock:
            if forever:
                self.unreadable[name] = reason
            if self.path is None or (name, reason) in self._written:
                return
            self._written.add((name, reason))
            fact = {"name": name, "reason": reason, "unreadable": forever}
            text = json.dumps(fact, ensure_ascii=False) + "\n"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # One write a line: several processes append to the file.
                with self.path.open("ab", buffering=0) as file:
                    file.write(text.encode("utf-8", "replace"))
            except OSError as failure:
                raise UsageError(
                    f"cannot write {self.path}: {failure.strerror or failure}"
                ) from failure

    def __len__(self) -> int:
        return len({name for name, _ in self._written} | self.unreadable.keys())
