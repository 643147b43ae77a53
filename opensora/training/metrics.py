"""Measure a training run: a line on the console, a line in metrics.jsonl, trackers if wanted."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.errors import UsageError
from opensora.files import write_error, write_text
from opensora.training.memory import peak_memory
from opensora.training.trackers import Tracker, flatten

BANDS = 10  # of the timesteps, 0-100 to 900-1000


class Metrics:
    """Average what steps measure and report it every `log_every` steps.

    Every process makes one and calls `step`: at reports the sums of all are added. Only the first
    process prints and writes. The file is `metrics.jsonl`: one JSON object a line, each written at
    once, so a kill loses none that was shown; a resumed run drops the lines after its first step.

    Args:
        folder: of the run.
        total: steps of the run; None if unknown, and no time left is shown.
        log_every: steps between reports.
        first_step: steps taken before this process started.
        rank: of this process.
        devices: how many work on the run, for MFU.
        sum_ranks: adds a float64 tensor over the replicas (data-parallel processes) and returns
            it; called by every process at reports. None for one process.
        peak: dense FLOP/s of one device (`flops.peak_flops`); None shows n/a.
        device: whose memory is reported.
        trackers: of `open_trackers`.

    Raises:
        UsageError: metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        total: int | None,
        *,
        log_every: int = 10,
        first_step: int = 0,
        rank: int = 0,
        devices: int = 1,
        sum_ranks: Callable[[Tensor], Tensor] | None = None,
        peak: float | None = None,
        device: torch.device | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.path, self.total, self.log_every = folder / "metrics.jsonl", total, max(1, log_every)
        self.first, self.rank, self.devices, self.peak = first_step, rank, devices, peak
        self.device, self.trackers = device or torch.device("cpu"), trackers
        self._sum_ranks = sum_ranks or (lambda own: own)
        self._earlier = 0.0  # seconds of the run before this process
        if rank == 0:
            try:
                self._earlier = _trim(self.path, first_step)
            except OSError as error:
                raise write_error(self.path, error) from error
        self.start()

    def start(self) -> None:
        """Start the clocks: before the first step, after what is done once."""
        self._started = self._reported = self._stepped = self._shown = time.monotonic()
        self._done, self._pace = self.first, 0.0  # steps at the last line; seconds a step, lately
        self._clear()

    def _clear(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._buckets: defaultdict[str, list[float]] = defaultdict(list)
        self._extra: defaultdict[str, list[float]] = defaultdict(list)
        self._last: dict[str, float] = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._sums["wait"] += time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside (checkpoints, validation) out of speeds and step times."""
        start = time.monotonic()
        try:
            yield
        finally:
            away = time.monotonic() - start
            self._reported += away
            self._stepped += away

    def losses(self, timesteps: Tensor, losses: Tensor) -> None:
        """Add the losses [B] of samples at timesteps [B] in [0, 1000] to their bands.

        They are read at the next report, so the device is not waited for.
        """
        self._samples.append((timesteps.detach(), losses.detach()))

    def step(
        self,
        step: int,
        loss: float,
        *,
        grad_norm: float,
        lr: float,
        tokens: float = 0.0,
        flops: float = 0.0,
        bucket: str = "",
        values: Mapping[str, float] | None = None,
    ) -> dict[str, Any] | None:
        """Count a step and report if it is time; a loss that is not finite counts as skipped.

        Args:
            step: zero-based.
            loss: of this replica's samples.
            grad_norm: before clipping.
            lr: of the step.
            tokens: of this replica: patches of its latents.
            flops: of this replica, recomputation not counted (`flops.training_flops`).
            bucket: name of the size, for step times; of one micro-batch if there are several.
            values: more to average, the same names on every process.

        Returns:
            The line that was reported, None between reports and on other processes.
        """
        now = time.monotonic()
        self._buckets[bucket].append(now - self._stepped)
        self._stepped = now
        fine = math.isfinite(loss)
        sums = {"loss": loss if fine else 0.0, "fine": float(fine), "steps": 1.0}
        for name, value in {**sums, "tokens": tokens, "flops": flops}.items():
            self._sums[name] += value
        for name, value in (values or {}).items():
            self._extra[name].append(value)
        self._last = {"grad_norm": grad_norm, "lr": lr}
        done = step + 1
        if done % self.log_every and done != self.total:
            return None
        return self._report(done, now)

    def _report(self, done: int, now: float) -> dict[str, Any] | None:
        names = ("loss", "fine", "steps", "tokens", "flops", "wait")
        means = [sum(each) / len(each) for each in self._extra.values()]
        own = torch.tensor([self._sums[name] for name in names] + means, dtype=torch.float64)
        both = self._sum_ranks(torch.cat([own, _band_sums(self._samples).flatten()]))
        sums = dict(zip(names, both.tolist(), strict=False))
        replicas = sums["steps"] / self._sums["steps"]
        extra = both[len(names) : len(own)] / replicas
        bands = both[len(own) :].view(2, BANDS)
        seconds = max(now - self._reported, 1e-9)
        self._reported = now
        speed = sums["flops"] / seconds / self.devices
        line: dict[str, Any] = {
            "step": done,
            "seconds": round(self._earlier + now - self._started, 2),
            "loss": sums["loss"] / sums["fine"] if sums["fine"] else None,
            **{name: _finite(value) for name, value in self._last.items()},
            "step_seconds": seconds / self._sums["steps"],
            "tokens_per_second": sums["tokens"] / seconds,
            "tflops": speed / 1e12,
            "mfu": speed / self.peak if self.peak and sums["flops"] else None,
            "data_wait": min(1.0, sums["wait"] / replicas / seconds),
            "memory_gib": peak_memory(self.device) / 2**30,
            "skipped": round((sums["steps"] - sums["fine"]) / replicas),
            **{name: _finite(v) for name, v in zip(self._extra, extra.tolist(), strict=True)},
            "bands": _band_means(bands),
            "buckets": {n: sum(each) / len(each) for n, each in self._buckets.items() if n},
        }
        self._clear()
        if self.rank:
            return None
        self._append(line)
        print(self._console(line, now), flush=True)
        return line

    def _console(self, line: Mapping[str, Any], now: float) -> str:
        done = line["step"]
        left = "?"
        if self.total is not None:
            pace = (now - self._shown) / max(1, done - self._done)
            # Not the mean since the start: a run that stood still for an hour is not slow.
            self._pace = 0.8 * self._pace + 0.2 * pace if self._done > self.first else pace
            self._shown, self._done = now, done
            left = clock(self._pace * (self.total - done))
        loss = "n/a" if line["loss"] is None else f"{line['loss']:.4f}"
        norm = "not finite" if line["grad_norm"] is None else f"{line['grad_norm']:.3g}"
        mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
        skipped = f"  skipped {line['skipped']}" if line["skipped"] else ""
        return (
            f"step {done}/{self.total or '?'}  loss {loss}  grad {norm}  lr {line['lr']:.3g}  "
            f"{line['step_seconds']:.3g} s/step  {_short(line['tokens_per_second'])} tok/s  "
            f"MFU {mfu}  wait {line['data_wait']:.0%}  {line['memory_gib']:.2f} GiB{skipped}  "
            f"elapsed {clock(line['seconds'])}  left {left}"
        )

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write an object of its own, such as a validation; `step` counts steps taken."""
        if self.rank == 0:
            seconds = round(self._earlier + time.monotonic() - self._started, 2)
            self._append({"step": step, "seconds": seconds, **values})

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error
        numbers = dict(flatten({k: v for k, v in line.items() if k != "step"}))
        for tracker in self.trackers:
            tracker.log(line["step"], numbers)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics.jsonl; a last line that a crash cut short is left out.

    Raises:
        UsageError: another line is not JSON.
    """
    objects = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(lines, 1):
        try:
            objects.append(json.loads(text))
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{path}, line {number}, is no JSON: remove it") from error
    return objects


def clock(seconds: float) -> str:
    """Format a duration, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _trim(path: Path, first_step: int) -> float:
    """Drop the lines after a step and a torn last one; return the seconds of the last kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    kept = [line for line in read_metrics(path) if line["step"] <= first_step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return float(kept[-1].get("seconds", 0.0)) if kept else 0.0


def _band_sums(samples: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sums and counts [2, BANDS] of the finite losses of every band."""
    bands = torch.zeros(2, BANDS, dtype=torch.float64)
    if samples:
        t, loss = (torch.cat(each).double().cpu() for each in zip(*samples, strict=True))
        fine = loss.isfinite()
        band = (t[fine] * BANDS / 1000).long().clamp(0, BANDS - 1)
        bands[0].index_add_(0, band, loss[fine])
        bands[1].index_add_(0, band, torch.ones_like(loss[fine]))
    return bands


def _band_means(bands: Tensor) -> dict[str, float]:
    """Return the mean loss of the bands that had samples, by name, from sums and counts [2, n]."""
    width = 1000 // BANDS
    return {
        f"{i * width}-{(i + 1) * width}": total / count
        for i, (total, count) in enumerate(zip(*bands.tolist(), strict=True))
        if count
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
