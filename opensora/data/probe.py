"""Find out frames, size and rate of media files that a table says nothing of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from opensora.data.batch import SampleError
from opensora.data.image import image_size, is_image
from opensora.data.table import Row, Table
from opensora.data.video import video_facts
from opensora.data.workers import Workers
from opensora.errors import OpenSoraError
from opensora.files import write_text
from opensora.progress import Progress


class Facts(NamedTuple):
    """Describe a media file; an image has 1 frame and 0 frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float


def probe(path: Path) -> Facts:
    """Read the facts of a media file from its container, without decoding it.

    Raises:
        SampleError: the file is missing or no clip; says why.
    """
    if is_image(path):
        height, width = image_size(path)
        return Facts(1, height, width, 0.0)
    return Facts(*video_facts(path))


def probe_table(
    table: Table, cache: str | Path | None = None, threads: int = 8
) -> tuple[list[Facts | None], dict[int, str]]:
    """Return the facts of all rows; files are opened only for rows that lack some.

    Args:
        table: says what is known.
        cache: json file that remembers what was found, by path, size and time of change.
        threads: files opened at once; most of the time goes into waiting for the disk.

    Returns:
        Facts by row, None where the file cannot be read, and row -> why.
    """
    facts = [_told(row) for row in table.rows]
    open_rows = [index for index, known in enumerate(facts) if known is None]
    if not open_rows:
        return list(facts), {}
    memory = _Memory(Path(cache)) if cache is not None else None
    problems: dict[int, str] = {}

    def find(index: int) -> tuple[int, Facts | str]:
        row = table.rows[index]
        try:
            found = memory.get(row.path) if memory else probe(row.path)
        except SampleError as error:
            return index, str(error)
        return index, _merged(row, found)

    done = 0
    with Workers(min(threads, len(open_rows)), "opensora-probe") as workers, Progress() as progress:
        report = progress.stage("probing files", "file")
        for start in range(0, len(open_rows), 4096):
            part = [workers.submit(partial(find, i)) for i in open_rows[start : start + 4096]]
            for index, found in (pending.result() for pending in part):
                if isinstance(found, Facts):
                    facts[index] = found
                else:
                    problems[index] = found
                done += 1
                report(done, len(open_rows))
    if memory is not None:
        memory.save()
    return list(facts), problems


def _told(row: Row) -> Facts | None:
    """Return the facts of a row that gives them all."""
    if row.height is None or row.width is None:
        return None
    if is_image(row.path):
        return Facts(1, row.height, row.width, 0.0)
    if row.num_frames is None:
        return None
    # The rate decides over no bucket: it can wait until the file is read.
    return Facts(row.num_frames, row.height, row.width, row.fps or 0.0)


def _merged(row: Row, found: Facts) -> Facts:
    """Return what the table says, completed by what was found."""
    if is_image(row.path):
        return Facts(1, row.height or found.height, row.width or found.width, 0.0)
    return Facts(
        row.num_frames or found.num_frames,
        row.height or found.height,
        row.width or found.width,
        row.fps or found.fps,
    )


class _Memory:
    """Remember facts of files over runs; a file that changed is probed again."""

    def __init__(self, path: Path) -> None:
        self.path, self._new = path, False
        self._known: dict[str, Sequence[float]] = {}
        with suppress(OSError, ValueError):
            known = json.loads(path.read_text("utf-8"))
            self._known = known if isinstance(known, dict) else {}

    def get(self, path: Path) -> Facts:
        """Return the facts of a file, probing it if need be."""
        try:
            status = path.stat()
        except OSError:
            return probe(path)  # says why
        key = f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}"
        with suppress(KeyError, TypeError, ValueError):
            frames, height, width, fps = self._known[key]
            return Facts(int(frames), int(height), int(width), float(fps))
        found = probe(path)
        self._known[key], self._new = found, True
        return found

    def save(self) -> None:
        """Write what was found; a folder that cannot be written costs time alone."""
        if self._new:
            with suppress(OpenSoraError):
                write_text(self.path, json.dumps(self._known))
