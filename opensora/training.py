"""Share what every training program needs: learning-rate schedule, EMA, log with ETA, resume.

One device for now; the state of a run is one file, written atomically and read with
``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from opensora.errors import NonFiniteError, UsageError, WeightsError


def learning_rate_factor(step: int, total: int, warmup: int, decay: float) -> float:
    """Compute the factor on the base learning rate: linear warm-up, constant, linear to zero.

    Args:
        step: Zero-based step about to be taken.
        total: Steps of the run.
        warmup: Steps of the warm-up; the factor is (step + 1) / (warmup + 1) there.
        decay: Fraction of the run, at its end, over which the factor falls to zero.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (total - step) / max(1.0, decay * total)
    return min(1.0, left)


class EMA:
    """Keep float32 exponential moving averages of all parameters and float buffers.

    The decay warms up: after n updates it is min(decay, (1 + n) / (10 + n)). A tensor that goes by
    two names (T5's embedding) is held once: swapping it twice would not give it back.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules, self.decay, self.updates = modules, decay, 0
        self.state = {key: value.detach().float().clone() for key, value in self._values()}

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        seen = set()
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                if value.is_floating_point() and value.data_ptr() not in seen:
                    seen.add(value.data_ptr())
                    yield f"{name}.{key}", value

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present values."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in self._values():
            self.state[key].lerp_(value.float(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the modules' values; a second call changes back."""
        for key, value in self._values():
            held = value.float().clone()
            value.copy_(self.state[key])
            self.state[key].copy_(held)


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


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale gradients down to a total norm of at most `limit`; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(parameters, limit))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
