"""Try a training step of every bucket on blank latents: does it fit, how long does it take.

Nothing is read from the table and nothing is saved; weights end up as noise, so no run follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opensora.data.batch import Batch, Size
from opensora.data.loader import conditions
from opensora.data.sampler import PlannedBatch, Sampler
from opensora.distributed.collectives import all_reduce
from opensora.training.batch_size import Found, OutOfMemory, search
from opensora.training.learner import Learner
from opensora.training.memory import MemoryModel, timed_step

#: Share of a device's memory that a step may take.
USABLE = 0.92


class StepTimer:
    """Time training steps of any bucket and batch size.

    Args:
        learner: takes the steps; its weights are spoilt.
        limit: bytes that a step may take; None: what the device has free.
    """

    def __init__(self, learner: Learner, limit: float | None = None) -> None:
        self.learner, self.models = learner, learner.models
        self.device = learner.world.device
        self.limit = usable_memory(self.device) if limit is None else limit
        self.peaks: dict[tuple[Size, int], int] = {}

    def __call__(self, size: Size, batch_size: int, active: int = 1) -> float:
        """Return the seconds of a step, of the slowest process.

        Raises:
            OutOfMemory: the step does not fit on some process.
        """
        batch = self.blank(size, batch_size)
        seconds, peak, failed = math.nan, 0, 0.0
        try:
            seconds, peak = timed_step(
                lambda: self._step(batch), self.device, active=active, limit=self.limit
            )
        except (OutOfMemory, torch.cuda.OutOfMemoryError):
            failed = 1.0
        self.learner.optimizer.zero_grad(set_to_none=True)
        if float(all_reduce(torch.tensor(failed), "whether the step fits", "max")):
            raise OutOfMemory(f"{batch_size} clips of {size} do not fit")
        self.peaks[size, batch_size] = peak
        return float(all_reduce(torch.tensor(seconds), "the time of the step", "max"))

    def blank(self, size: Size, batch_size: int) -> Batch:
        """Return a batch of latents and text states of zeros, the longest text there is."""
        model = self.models.transformer.config
        vae = self.models.vae
        latent = (-(-size.frames // 4), size.height // 8, size.width // 8)
        if vae is not None:
            frames, height, width = vae.get_latent_size(size)
            latent = (int(frames or 1), height, width)
        batch = Batch(
            0,
            0,
            "",
            [str(i) for i in range(batch_size)],
            size,
            latent=torch.zeros(batch_size, model.in_channels, *latent),
            conditions=conditions(size, [24.0] * batch_size),
        )
        if self.models.train_text:
            batch.text = ["a" * (model.model_max_length - 1)] * batch_size
        else:
            words = model.model_max_length
            width = model.hidden_size if model.skip_y_embedder else model.caption_channels
            batch.states = torch.zeros(batch_size, 1, words, width)
            batch.mask = torch.ones(batch_size, words, dtype=torch.int64)
        return batch

    def _step(self, batch: Batch) -> None:
        learner = self.learner
        learner.optimizer.zero_grad(set_to_none=True)
        learner.objective(batch).loss.mean().backward()
        learner.clip(p for m in learner.modules.values() for p in m.parameters())
        learner.optimizer.step()


def usable_memory(device: torch.device) -> float:
    """Return the bytes that a step may take: most of a GPU, or of what the machine has free."""
    if device.type == "cuda":
        return USABLE * torch.cuda.get_device_properties(device).total_memory
    for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return USABLE * 1024 * int(line.split()[1])
    return math.inf


def first_batches(sampler: Sampler) -> dict[Size, PlannedBatch]:
    """Return one batch of every size and batch size of an epoch, the largest tokens last."""
    found: dict[Size, PlannedBatch] = {}
    for batch in sampler.epoch(0):
        known = found.get(batch.size)
        if known is None or len(known.indices) < len(batch.indices):
            found[batch.size] = batch
    return dict(sorted(found.items(), key=lambda item: math.prod(item[0]) * len(item[1].indices)))


def try_buckets(timer: StepTimer, sampler: Sampler) -> dict[Size, tuple[int, Found]]:
    """Run a step of every size; one that does not fit is searched for the size that does.

    Returns:
        Size -> (batch size of the configuration, what was found).
    """
    found: dict[Size, tuple[int, Found]] = {}
    for size, batch in first_batches(sampler).items():
        wanted = len(batch.indices)
        try:
            seconds = timer(size, wanted)
            found[size] = (wanted, Found(wanted, seconds, {wanted: seconds}))
        except OutOfMemory:
            guess = _guess(timer, size, wanted)
            found[size] = (wanted, search(lambda n, s=size: timer(s, n), guess, wanted - 1))  # type: ignore[misc]
    return found


def table(found: Mapping[Size, tuple[int, Found]], peaks: Mapping[tuple[Size, int], int]) -> str:
    """Write a line a size: configured and fitting batch size, step time, peak memory."""
    lines = [f"{'frames x height x width':>24}  batch  fits  s/step  peak GiB"]
    for size, (wanted, one) in found.items():
        name = "x".join(str(side) for side in size)
        peak = peaks.get((size, one.batch_size))
        memory = "-" if peak is None else f"{peak / 2**30:.2f}"
        seconds = "-" if math.isnan(one.seconds) else f"{one.seconds:.3g}"
        lines.append(f"{name:>24}  {wanted:>5}  {one.batch_size:>4}  {seconds:>6}  {memory:>8}")
    return "\n".join(lines)


def fitted_buckets(
    config: Mapping[Any, Any], found: Mapping[Size, tuple[int, Found]], sampler: Sampler
) -> dict[Any, dict[Any, Any]]:
    """Return the bucket_config with the batch sizes that fit."""
    result = {name: dict(lengths) for name, lengths in config.items()}
    for size, batch in first_batches(sampler).items():
        resolution, frames = batch.bucket.split()[:2]
        keep, _ = result[resolution][int(frames)]
        known = result[resolution][int(frames)][1]
        result[resolution][int(frames)] = (keep, min(known, found[size][1].batch_size))
    return result


def _guess(timer: StepTimer, size: Size, wanted: int) -> int:
    """Guess a batch size from two steps that did fit."""
    measured = [
        (math.prod(tried) * count, float(peak)) for (tried, count), peak in timer.peaks.items()
    ]
    if len({tokens for tokens, _ in measured}) < 2:
        return max(1, wanted // 2)
    guess = MemoryModel.fit(measured).batch_size(timer.limit, math.prod(size), reserve=0.0)
    return min(max(1, guess), max(1, wanted - 1))
