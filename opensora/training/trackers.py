"""Send metrics to TensorBoard or Weights & Biases, where they are installed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opensora.config_expression import suggest
from opensora.errors import UsageError
from opensora.files import write_text

TRACKERS = ("tensorboard", "wandb")


class Tracker(Protocol):
    """Take numbers under names, by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""

    def close(self) -> None:
        """Write what is still held."""


def open_trackers(
    names: Sequence[str],
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    project: str = "opensora",
    first_step: int = 0,
) -> list[Tracker]:
    """Open trackers; call it on the first process only.

    Args:
        names: "tensorboard", "wandb".
        folder: of the run; they write to its subfolders.
        config: effective configuration, shown with the run.
        project: name that wandb files the run under.
        first_step: of a resumed run; later points of TensorBoard are dropped.

    Raises:
        UsageError: an unknown name, or one whose package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(
                f"tracker {name!r} is unknown{suggest(name, TRACKERS)} ({', '.join(TRACKERS)})"
            )
    opened: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            opened.append(_TensorBoard(folder / "tensorboard", first_step))
        else:
            opened.append(_Wandb(folder, project, config or {}))
    return opened


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings under joined names, "bands/0-100"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)


class _TensorBoard:
    """Write TensorBoard's event files."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "tracker 'tensorboard' is not installed; type: pip install tensorboard, or leave "
                "it out: metrics.jsonl and loss.svg are always written"
            ) from error
        purge = first_step + 1 if first_step else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held."""
        self._writer.close()


def _run_id(folder: Path) -> str:
    """Return the name that a run keeps when it is resumed, from a file in its folder."""
    path = folder / "wandb_id"
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text("utf-8").strip()


class _Wandb:
    """Log to Weights & Biases; into the folder alone where there is no account or no network."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError(
                "tracker 'wandb' is not installed; type: pip install wandb, or leave it out: "
                "metrics.jsonl and loss.svg are always written"
            ) from error
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        settings = {"project": project, "dir": str(folder), "config": dict(config)}
        settings |= {"name": folder.name, "id": _run_id(folder), "resume": "allow"}
        try:
            self._run: Any = wandb.init(mode=mode, **settings)
        except Exception as error:  # its own classes differ between versions
            if mode == "offline":
                raise UsageError(f"tracker 'wandb' cannot write to {folder}: {error}") from error
            print(f"wandb cannot be reached ({error}); writing to {folder / 'wandb'} instead")
            mode, self._run = "offline", wandb.init(mode="offline", **settings)
        if mode == "offline":
            print(f"wandb is offline; later: wandb sync {folder / 'wandb'}/offline-*")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is still held."""
        self._run.finish()
