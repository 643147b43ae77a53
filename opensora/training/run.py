"""Keep the folder, the log with ETA and the resumable state of a run on one device.

The state is one file, written atomically and read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from opensora.errors import NonFiniteError, UsageError, WeightsError
from opensora.training.ema import EMA


class TrainingRun:
    """Hold the folder, the log and the resumable state of one training run.

    The folder gets `config.json`, `metrics.jsonl` (one object a log line) and `state.pt`.

    Args:
        folder: Output folder; made if missing.
        config: Effective configuration, JSON values.
        total: Steps of the run.
        log_every: Steps between log lines.

    Raises:
        UsageError: The folder cannot be written.
    """

    def __init__(self, folder: Path, config: dict[str, Any], total: int, log_every: int) -> None:
        self.folder, self.total, self.log_every = folder, total, log_every
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._count, self._first = 0, 0
        self._started: float | None = None  # set before the first step: data may take minutes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
        except OSError as error:
            raise UsageError(
                f"cannot write the output folder {folder}: {error.strerror}"
            ) from error

    def start(self) -> None:
        """Start the clock that the time left is reckoned from."""
        self._started = time.monotonic()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Average `values` over `log_every` steps, then print and record them with the time left.

        Raises:
            NonFiniteError: A value is NaN or infinite; nothing of this step has been saved.
        """
        for name, value in values.items():
            if value != value or abs(value) == float("inf"):
                raise NonFiniteError(
                    f"{name} is {value} at step {step}: training stopped; resume from "
                    f"{self.folder / 'state.pt'} with a lower learning rate"
                )
            self._sums[name] += value
        self._count += 1
        if (step + 1) % self.log_every and step + 1 < self.total:
            return
        means = {name: total / self._count for name, total in self._sums.items()}
        self.record(step + 1, means)
        elapsed = self._elapsed()
        left = elapsed / (step + 1 - self._first) * (self.total - step - 1)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(
            f"step {step + 1}/{self.total}  {shown}  "
            f"elapsed {_clock(elapsed)}  left {_clock(left)}",
            flush=True,
        )
        self._sums.clear()
        self._count = 0

    def record(self, step: int, values: dict[str, float]) -> None:
        """Append one object to metrics.jsonl."""
        line = {"step": step, "seconds": round(self._elapsed(), 1), **values}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _elapsed(self) -> float:
        return 0.0 if self._started is None else time.monotonic() - self._started

    def save(
        self, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, ema: EMA
    ) -> None:
        """Write everything that resuming needs, atomically."""
        state = {
            "step": step,
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "ema": ema.state,
            "ema_updates": ema.updates,
            "torch_rng": torch.get_rng_state(),
        }
        temporary = self.folder / "state.pt.partial"
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.folder / "state.pt")
        finally:
            temporary.unlink(missing_ok=True)

    def resume(
        self, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, ema: EMA
    ) -> int:
        """Read `state.pt` of the folder back; returns the number of steps taken, 0 without a file.

        Raises:
            WeightsError: The file is damaged or of another model.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            rates = [group["initial_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizer"])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["initial_lr"] = rate  # the configuration's, which may have been changed
            for key, value in state["ema"].items():
                ema.state[key].copy_(value)
        except (RuntimeError, KeyError, ValueError, OSError, EOFError, UnpicklingError) as error:
            raise WeightsError(
                f"cannot resume from {path}: {str(error).splitlines()[0]}; give another "
                "--outputs or the configuration that the run was started with"
            ) from error
        ema.updates = int(state["ema_updates"])
        torch.set_rng_state(state["torch_rng"])
        self._first = int(state["step"])
        return self._first


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
