"""List the videos and images of a folder as a table: `opensora data table FOLDER -o meta.csv`."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opensora.data.batch import SampleError
from opensora.data.image import SUFFIXES as IMAGES
from opensora.data.image import is_image
from opensora.data.probe import Facts, probe
from opensora.data.table import MEDIA
from opensora.data.video_index import check_end
from opensora.data.workers import Workers
from opensora.errors import UsageError
from opensora.files import atomic
from opensora.progress import Report

#: Suffixes of what is listed.
SUFFIXES = frozenset((*MEDIA.split(), *IMAGES))
COLUMNS = ("path", "text", "num_frames", "height", "width", "fps")
#: Files probed at once: most of the time goes into waiting for the disk.
THREADS = 8
#: Files handed to the threads at once, so that an interrupt need not wait for a whole folder.
_PART = 256


@dataclass(frozen=True)
class Listed:
    """Hold a media file of a folder.

    Attributes:
        path: of the file.
        text: caption.
        told: whether the caption comes from a file beside it, not from its name.
        facts: frames, size and rate.
    """

    path: Path
    text: str
    told: bool
    facts: Facts


def find_media(folder: Path) -> list[Path]:
    """Return videos and images below a folder in order of their names, without hidden ones.

    Links to folders are followed, each folder once.

    Raises:
        UsageError: there is no such folder, or none of its files is a video or an image.
    """
    if not folder.is_dir():
        what = "is a file; name the folder it is in" if folder.exists() else "does not exist"
        raise UsageError(f"the folder of clips, {folder}, {what}")
    found, seen, others = [], set(), 0
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        media = [n for n in names if Path(n).suffix.lower() in SUFFIXES and n[0] != "."]
        others += len(names) - len(media)
        found += [Path(place, name) for name in media]
    if not found:
        raise UsageError(
            f"{folder}: no video or image among its {others} files; known are "
            f"{' '.join(sorted(SUFFIXES))}"
        )
    return sorted(found)


def caption_of(path: Path) -> tuple[str, bool]:
    """Return the caption of a media file, and whether it has one of its own.

    It is the text of the .txt file of the same name beside it, on one line. Where there is none, or
    it is empty, it is the file's name: "a_red-car.mp4" says "a red car".

    Raises:
        SampleError: the .txt file cannot be read.
    """
    beside = path.with_suffix(".txt")
    try:
        text = " ".join(beside.read_text("utf-8-sig").split())
    except FileNotFoundError:
        text = ""
    except UnicodeDecodeError as error:
        raise SampleError(f"{beside.name} is not UTF-8") from error
    except OSError as error:
        raise SampleError(f"{beside.name}: {error.strerror or error}") from error
    if text:
        return text, True
    return " ".join(path.stem.replace("_", " ").replace("-", " ").split()), False


def list_media(
    paths: Iterable[Path], report: Report = lambda done, total: None, threads: int = THREADS
) -> tuple[list[Listed], list[tuple[Path, str]]]:
    """Read captions and facts of media files; of videos one frame is decoded.

    Args:
        paths: of `find_media`.
        report: called with how many are done, and of how many.
        threads: files opened at once.

    Returns:
        What can be trained on, and (file, reason) of the rest.
    """
    paths = list(paths)
    good: list[Listed] = []
    bad: list[tuple[Path, str]] = []
    with Workers(max(1, min(threads, len(paths))), "opensora-list") as workers:
        for start in range(0, len(paths), _PART):
            part = [(p, workers.submit(partial(_read, p))) for p in paths[start : start + _PART]]
            for path, pending in part:
                found = pending.result()
                if isinstance(found, Listed):
                    good.append(found)
                else:
                    bad.append((path, found))
                report(len(good) + len(bad), len(paths))
    return good, bad


def _read(path: Path) -> Listed | str:
    """Return what is known of a file, or why it cannot be trained on."""
    name = str(path)
    if name != name.strip() or not name.isprintable():
        return "its name holds characters that a table cannot; rename it"
    try:
        text, told = caption_of(path)
        facts = probe(path)
        if not is_image(path):
            check_end(path)
        return Listed(path, text, told, facts)
    except SampleError as error:
        return str(error)


def write_listing(listed: Iterable[Listed], path: Path) -> None:
    """Write the table, all of it or nothing.

    Files below the table's folder are named from there on, so that both can be moved together;
    others by their whole path.

    Raises:
        UsageError: the folder cannot be written.
        DoesNotFitError: no space is left.
    """
    folder = path.parent.resolve()
    with atomic(path) as partial_file, partial_file.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in listed:
            whole = Path(os.path.abspath(one.path))
            inside = whole.is_relative_to(folder)
            name = (whole.relative_to(folder) if inside else whole).as_posix()
            facts = one.facts
            fps = f"{facts.fps:.7g}" if facts.fps else ""
            writer.writerow([name, one.text, *facts[:3], fps])
