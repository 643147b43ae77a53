"""Name, find, put in place and remove run folders and the checkpoints in them.

{outputs}/{NNN}-{model}/epoch{e}-global_step{g}/. Hidden names are states on the way:
`.NAME.partial` is being written, `.NAME.replaced` makes room for a new NAME, `.NAME.removed` goes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opensora.errors import UsageError, WeightsError
from opensora.files import write_error
from opensora.weight_files import read_json

INDEX, STATES = "index.json", "running_states.json"
log = logging.getLogger("opensora")

_CHECKPOINT = re.compile(r"epoch\d+-global_step(\d+)")
_HIDDEN = re.compile(r"\.(epoch\d+-global_step\d+)\.(partial|replaced|removed)")
_RUN = re.compile(r"(\d{3,})-.+")
# safetensors writes to a `.tmp` name and renames; a kill leaves that.
_OURS = re.compile(rf"\d{{5}}\.safetensors|\.tmp\w+|{re.escape(INDEX)}|{re.escape(STATES)}")


def new_run_folder(outputs: Path, model_name: str) -> Path:
    """Make and return {outputs}/{NNN}-{model_name}; NNN is one above the highest there.

    Two programs that start together get two numbers.

    Raises:
        UsageError, DoesNotFitError: the folder cannot be made.
    """
    name = re.sub(r"[^\w.-]+", "-", model_name).strip("-.") or "model"
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        with _locked(outputs, fcntl.LOCK_EX):
            folder = outputs / f"{max(_runs(outputs), default=-1) + 1:03d}-{name}"
            folder.mkdir()
            return folder
    except OSError as error:
        raise write_error(outputs, error) from error


def find_run(outputs: Path, which: str = "latest") -> Path | None:
    """Return a run's folder by "latest", number or name; None if there is none.

    "latest" is the highest number that has a checkpoint.

    Raises:
        UsageError: a run that is named does not exist.
    """
    runs = _runs(outputs) if outputs.is_dir() else {}
    if which == "latest":
        return next((runs[n] for n in sorted(runs, reverse=True) if checkpoints(runs[n])), None)
    if which.isdecimal() and int(which) in runs:
        return runs[int(which)]
    if (outputs / which).is_dir():
        return outputs / which
    known = ", ".join(runs[n].name for n in sorted(runs)[-5:]) or "none"
    raise UsageError(f"{outputs} has no run {which!r} (the last ones: {known})")


def _runs(outputs: Path) -> dict[int, Path]:
    return {int(m[1]): p for p in outputs.iterdir() if (m := _RUN.fullmatch(p.name))}


@dataclass(frozen=True)
class Saved:
    """A checkpoint folder, perhaps damaged.

    Attributes:
        folder: its path.
        step: optimizer steps taken, from its name.
        serial: how many checkpoints the run had saved with it. A run that goes back to an earlier
            step saves smaller steps later, so the serial number, not the step, tells the newest.
            None if the folder is too damaged to say.
    """

    folder: Path
    step: int
    serial: int | None


def checkpoint_name(epoch: int, global_step: int) -> str:
    """Return upstream's name of a checkpoint folder."""
    return f"epoch{epoch}-global_step{global_step}"


def partial_name(name: str) -> str:
    """Return the name under which a checkpoint is written."""
    return f".{name}.partial"


def checkpoints(run: Path) -> list[Saved]:
    """List a run's checkpoints, the newest last; folders that we did not make are left out.

    Those of unknown age come last of all, so that who looks for the newest meets and reports them.
    """
    found = []
    for folder in run.iterdir() if run.is_dir() else ():
        match = _CHECKPOINT.fullmatch(folder.name)
        if match and is_ours(folder):
            try:
                serial: int | None = int(read_json(folder / STATES)["serial"])
            except (WeightsError, KeyError, TypeError, ValueError):
                serial = None
            found.append(Saved(folder, int(match[1]), serial))
    return sorted(found, key=lambda saved: (saved.serial is None, saved.serial or 0, saved.step))


def is_ours(folder: Path) -> bool:
    """Tell whether a folder is a checkpoint that `Checkpointer` made."""
    return (folder / INDEX).is_file() and not folder.is_symlink()


def put_in_place(partial: Path, final: Path) -> None:
    """Give a folder that is complete its final name, in place of an earlier one, durably."""
    sync(partial)
    replaced = final.parent / f".{final.name}.replaced"
    if final.exists():
        remove_files(replaced)
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    remove_files(replaced)


def clean(run: Path) -> None:
    """Remove what killed writes and deletions left in a run's folder."""
    for path in list(run.iterdir()) if run.is_dir() else ():
        match = _HIDDEN.fullmatch(path.name)
        if not match or path.is_symlink() or not path.is_dir():
            continue
        if match[2] == "replaced" and not (run / match[1]).exists():
            path.rename(run / match[1])
            log.warning("%s: put back, its replacement was not finished", run / match[1])
        else:
            remove_files(path)
            log.info("removed %s, left by a killed run", path)


def remove(folder: Path) -> bool:
    """Remove a checkpoint; False if someone reads it or it is none of ours."""
    if not is_ours(folder) or not _CHECKPOINT.fullmatch(folder.name):
        return False
    try:
        with _locked(folder / INDEX, fcntl.LOCK_EX | fcntl.LOCK_NB):
            going = folder.parent / f".{folder.name}.removed"
            remove_files(going)
            folder.rename(going)
    except BlockingIOError:
        return False
    remove_files(going)
    return True


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep a checkpoint from being removed, by this or another process, while it is read."""
    with _locked(folder / INDEX, fcntl.LOCK_SH):
        yield


def remove_files(folder: Path) -> None:
    """Remove a checkpoint's files, and the folder if nothing else is in it; it may not exist."""
    if folder.is_symlink() or not folder.is_dir():
        return
    # The index goes first: without it the rest is no checkpoint.
    for path in sorted(folder.iterdir(), key=lambda path: path.name != INDEX):
        if _OURS.fullmatch(path.name):
            path.unlink()
    try:
        folder.rmdir()
    except OSError:
        log.warning("%s is kept: it holds files that opensora did not make", folder)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    """Hold a lock on a file or folder; it goes with the process.

    Some network file systems have no locks; nothing is held there.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, operation)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(handle)
