"""Write files so that a final name only ever holds a finished file."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora.errors import DoesNotFitError, OpenSoraError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, else it is removed.

    The file is flushed to the disk before it is renamed, so a crash leaves the old file or the new
    one. Any way out of the block but the normal one, Ctrl-C included, removes the temporary file.

    Raises:
        DoesNotFitError: no space is left.
        UsageError: the folder cannot be made or written.
    """
    partial = path.parent / f".opensora-{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        partial.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        _remove(partial)


def flush(path: Path) -> None:
    """Force a file's content to the disk; OSError tells what the disk did not take."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file through `atomic`."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_error(path: Path, error: OSError) -> OpenSoraError:
    """Return the typed error for a failed write, in one sentence."""
    if error.errno in _FULL:
        return DoesNotFitError(
            f"cannot write {path}: no space left for it; free some, or give another output folder"
        )
    why = error.strerror or str(error)
    return UsageError(f"cannot write {path}: {why}; give another output folder")


def check_folder(folder: Path, needed: int) -> None:
    """Check that files can be made in a folder, or in the nearest parent that exists.

    Nothing is left behind and the folder is not made.

    Args:
        folder: where results will go.
        needed: bytes they will take, estimated.

    Raises:
        UsageError: the folder or a part of its path is a file, or cannot be written.
        DoesNotFitError: fewer than `needed` bytes are free.
    """
    if "\0" in str(folder):
        raise UsageError(f"cannot write to {str(folder)!r}: a path holds no null byte")
    try:
        existing = folder
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise UsageError(
                f"cannot write to {folder}: {existing} is a file; give another output folder"
            )
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".opensora-", suffix=".partial"):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise write_error(folder, error) from error
    if free < needed:
        raise DoesNotFitError(
            f"cannot write to {folder}: about {_size(needed)} are needed and {_size(free)} are "
            "free; free some, ask for fewer or smaller clips, or give another output folder"
        )


def _size(count: int) -> str:
    """Format bytes with a unit."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return (
        f"{value:.0f} {units[0]}"
        if value >= 10 or units[0] == "bytes"
        else f"{value:.1f} {units[0]}"
    )


def _remove(path: Path) -> None:
    """Remove a file that may not exist; a failure here must not hide the error that led here."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
