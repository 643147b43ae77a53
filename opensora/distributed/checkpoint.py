"""Save and resume a training run: in the background, atomically, on any number of processes.

`save` copies the state and returns; a thread writes the copy while training goes on. A kill at any
moment leaves the last complete checkpoint. See `checkpoint_files` for what a folder holds.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save as save_planned
from torch.optim import Optimizer

from opensora.distributed import run_folders as folders
from opensora.distributed import training_state as parts
from opensora.distributed.agreement import Ranks, first_failure
from opensora.distributed.checkpoint_files import SafetensorsWriter, StagedPlanner
from opensora.distributed.checkpoint_loading import Progress, choose, read
from opensora.errors import DoesNotFitError, OpenSoraError, UsageError

__all__ = ["Checkpointer", "Progress"]

log = logging.getLogger("opensora")
T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpointer:
    """Write and read the checkpoints of one run's folder.

    All ranks make one, and call its methods in the same order; a with block closes it.

    Args:
        folder: the run's folder, on a file system that all ranks share; made if missing.
        rank, world_size: of this process among those that train together; 1 needs no
            `torch.distributed`.
        process_group: of all of them, for CPU tensors, used by nothing else (a thread uses it
            while training communicates); None makes one.
        keep_last: checkpoints to keep, the newest; None keeps all.
        keep_every: those whose step is divisible by it are kept for good.

    Raises:
        UsageError: keep_last or keep_every is below 1, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        for name, value in (("--keep-last", keep_last), ("--keep-every", keep_every)):
            if value is not None and value < 1:
                raise UsageError(
                    f"{name} must be at least 1, got {value}; leave it out to keep all"
                )
        self.folder, self.rank, self.world_size = Path(folder), rank, world_size
        self.keep_last, self.keep_every = keep_last, keep_every
        self._ranks = Ranks(rank, world_size, process_group)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, Tensor] = {}
        self._ranks.on_first(self._prepare_folder)

    def save(
        self,
        progress: Progress,
        modules: Mapping[str, nn.Module],
        optimizers: Optimizer | Mapping[str, Optimizer],
        ema: parts.Averages | None = None,
        *,
        wait: bool = False,
    ) -> float:
        """Copy the state and start to write `epoch{e}-global_step{g}`; one write is in flight.

        The copy stays in memory (pinned where the state is on a GPU) for the next save.

        Args:
            progress: counters and `extra`.
            modules: name -> model; weights may be DTensors.
            optimizers: of parameters of `modules`; several by name.
            ema: moving averages.
            wait: return when the checkpoint is complete.

        Returns:
            Seconds that training stood still: for the earlier write to end and for the copy.

        Raises:
            DoesNotFitError, UsageError, WeightsError: the earlier write failed (or this one, with
                `wait`). What was complete before is still there; the training state is untouched.
        """
        started = time.monotonic()
        if self.in_flight():
            self.wait()
            log.warning(
                "waited %.1f s for the checkpoint before this one; save less often or to a "
                "faster disk",
                time.monotonic() - started,
            )
        self.wait()
        tensors: dict[str, Tensor] = {}
        values = dataclasses.asdict(dataclasses.replace(progress, extra={}))
        values["modules"] = parts.describe_modules(modules)
        values["extra"] = parts.split_extra(progress.extra, "extra", tensors)
        tensors |= parts.model_tensors(modules)
        values["optimizers"] = {}
        names = parts.parameter_names(modules)
        for name, optimizer in _by_name(optimizers).items():
            found, values["optimizers"][name] = parts.optimizer_tensors(optimizer, names)
            tensors |= {f"optimizer.{name}.{key}": value for key, value in found.items()}
        tensors |= parts.average_tensors(ema, modules)
        values["ema_updates"] = ema.updates if ema is not None else 0
        tensors |= parts.read_generators(self.rank)
        values |= {"world_size": self.world_size, "serial": self._next_serial()}
        staged = self._stage(tensors)
        folder = self.folder / folders.checkpoint_name(progress.epoch, progress.global_step)
        self._thread = threading.Thread(
            target=self._write, args=(folder, values, tensors, staged), name="checkpoint"
        )
        self._thread.start()
        if wait:
            self.wait()
        return time.monotonic() - started

    def in_flight(self) -> bool:
        """Tell whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the write in flight, and raise what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the write in flight and let go of the copies."""
        try:
            self.wait()
        finally:
            self._buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OpenSoraError as failed:
            if error is None:
                raise
            log.error("%s", failed)  # what ended the run is what the user must see

    def load(
        self,
        which: str | os.PathLike[str] | None,
        modules: Mapping[str, nn.Module],
        optimizers: Optimizer | Mapping[str, Optimizer] | None = None,
        ema: parts.Averages | None = None,
    ) -> Progress | None:
        """Put a checkpoint's state into the modules, optimizers, averages and random generators.

        Args:
            which: "latest" of this run's folder, where a damaged one is reported and the one
                before it is taken; a checkpoint's folder; another run's folder, whose latest is
                taken; None loads nothing.
            modules: as at `save`; any sharding.
            optimizers: as at `save`; None leaves their state on the disk.
            ema: as at `save`; None leaves it on the disk.

        Returns:
            Where the run stood; None if "latest" finds no checkpoint, or for None.

        Raises:
            WeightsError: a named checkpoint is missing or damaged, or is of another model; all
                that "latest" found are damaged. The state is undefined after a damaged read.
        """
        self.wait()
        if which is None:
            return None
        chosen = self._ranks.on_first(lambda: choose(self.folder, which))
        if chosen is None:
            return None
        started = time.monotonic()
        named = _by_name(optimizers) if optimizers is not None else {}
        progress = self._ranks.on_all(lambda: read(chosen, self.rank, modules, named, ema))
        if self.rank == 0:
            seconds = time.monotonic() - started
            log.info("resumed from %s, step %d (%.1f s)", chosen, progress.global_step, seconds)
        return progress

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folders.clean(self.folder)
        except OSError as error:
            raise _explain(self.folder, error, None) from error

    def _next_serial(self) -> int:
        """Return one more than the highest serial number in the folder; rank 0's is written."""
        if self.rank != 0:
            return 0
        return 1 + max((saved.serial or 0 for saved in folders.checkpoints(self.folder)), default=0)

    def _stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy this rank's parts of the tensors into buffers on the CPU that are used again."""
        staged, on_gpu = {}, False
        with torch.no_grad():
            for name, tensor in tensors.items():
                part = parts.local(tensor).detach()
                buffer = self._buffers.get(name)
                if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                    pinned = part.is_cuda
                    buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
                staged[name] = buffer.copy_(part, non_blocking=True)
                on_gpu |= part.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        self._buffers = staged
        return staged

    def _write(
        self,
        folder: Path,
        values: dict[str, Any],
        tensors: dict[str, Tensor],
        staged: dict[str, Tensor],
    ) -> None:
        """Write a checkpoint; runs in the thread and leaves its error for the next call."""
        writer = SafetensorsWriter(folder, values)
        try:
            save_planned(
                dict(tensors),
                storage_writer=writer,
                planner=StagedPlanner(staged),
                process_group=self._ranks.group,
                no_dist=self.world_size == 1,
            )
        except BaseException as error:
            # DCP's own exception is a BaseException; in a thread nothing may be lost.
            self._error = self._failed(writer, error)
            log.error("%s", self._error)  # at once: the next call may be long in coming
            return
        if self.rank == 0:
            self._retire(folder)

    def _failed(self, writer: SafetensorsWriter, error: BaseException) -> BaseException:
        """Remove a failed write and say what failed."""
        if self.rank == 0:
            try:
                folders.remove_files(writer.partial)
            except OSError as left:
                log.warning("cannot remove %s: %s", writer.partial, left)
        error = first_failure(error)
        good = folders.checkpoints(self.folder)
        if isinstance(error, OSError):
            return _explain(writer.folder, error, good[-1].folder if good else None)
        return error

    def _retire(self, newest: Path) -> None:
        """Remove checkpoints that need not be kept; trouble with that is no failure to save."""
        if self.keep_last is None:
            return
        try:
            whole = [s for s in folders.checkpoints(self.folder) if s.serial is not None]
            for saved in whole[: -self.keep_last]:
                for_good = self.keep_every is not None and saved.step % self.keep_every == 0
                if not for_good and saved.folder != newest and not folders.remove(saved.folder):
                    log.info("%s is being read: kept until the next checkpoint", saved.folder)
        except OSError as error:
            log.warning("cannot remove old checkpoints of %s: %s", self.folder, error)


def _by_name(optimizers: Optimizer | Mapping[str, Optimizer]) -> Mapping[str, Optimizer]:
    return {"main": optimizers} if isinstance(optimizers, Optimizer) else optimizers


def _explain(folder: Path, error: OSError, good: Path | None) -> OpenSoraError:
    """Say why a checkpoint was not written and what is left."""
    kept = f"the last good one is {good.name}" if good else "there is no earlier one"
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return DoesNotFitError(
            f"cannot write the checkpoint {folder}: {why}; {kept}. Free some space, keep fewer "
            "(--keep-last), or give another --outputs folder"
        )
    return UsageError(
        f"cannot write the checkpoint {folder}: {why}; {kept}. Make the folder writable or give "
        "another --outputs folder"
    )
