"""Measure a model on fixed noise, so that two runs, or two moments of one, can be compared.

The training loss says little: most of its variance comes from the timesteps and the noise drawn.
Here every sample meets the same noise at the same timesteps each time, so that the numbers differ
only where the weights do.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from opensora.errors import UsageError
from opensora.training.ema import EMA

#: How noise is made from a sample; it is part of the digest.
_RECIPE = "sha256(seed/name/timestep) seeds randn on the CPU in float32"


class Planned(NamedTuple):
    """Name the samples of one batch.

    Attributes:
        bucket: name of their size.
        names: of the samples, the same in every run.
    """

    bucket: str
    names: tuple[str, ...]


class Prepared(NamedTuple):
    """Hold the samples of one batch as the model takes them.

    Attributes:
        latent: [B, C, t, h, w].
        kwargs: of the model: y, mask, fps, height, width.
        num_frames: of the clips, for schedulers that read it.
        names: of the samples that could be read, B of them in their order; None: all planned.
    """

    latent: Tensor
    kwargs: Mapping[str, Any]
    num_frames: int | None = None
    names: Sequence[str] | None = None


class Scheduler(Protocol):
    """Compute the losses of samples at given timesteps with given noise."""

    def training_losses(
        self,
        model: Any,
        x_start: Tensor,
        model_kwargs: Mapping[str, Any],
        *,
        num_frames: Any = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return {"loss": [B]}."""


@dataclass(frozen=True)
class ValidationResult:
    """Hold mean losses over the samples of all replicas.

    Attributes:
        loss: mean over samples and timesteps.
        buckets: bucket -> mean loss.
        timesteps: timestep -> mean loss.
        samples: how many there were.
        digest: of all that the numbers depend on besides weights and model: equal digests can be
            compared.
    """

    loss: float
    buckets: dict[str, float] = field(default_factory=dict)
    timesteps: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    digest: str = ""

    def line(self) -> dict[str, Any]:
        """Return the values as `Metrics.record` and `write_loss_plot` take them."""
        return {
            "validation_loss": self.loss,
            "validation_buckets": self.buckets,
            "validation_timesteps": self.timesteps,
            "validation_samples": self.samples,
            "validation_digest": self.digest,
        }


class Validation:
    """Compute the loss on fixed samples, timesteps and noise, in evaluation mode.

    The numbers are the same on any number of replicas: batches stay whole, and the losses of all
    samples are brought together before they are averaged.

    Args:
        plan: the batches, the same list on every process.
        prepare: returns batch i of the plan on the device. The global generators are seeded for it,
            from the batch's names, and put back afterwards.
        scheduler: of the training.
        steps: timesteps, evenly spaced: (i + 1/2) * 1000 / steps.
        seed: of the noise.
        replica: of this process among the data-parallel ones; batch i is of replica
            i % replicas. All make equally many model calls, as sharded models need.
        replicas: how many there are.
        sum_ranks: adds a float64 tensor over the replicas; None for one.
        autocast: opened around the model's calls.
        key: of what else the samples depend on, for the digest: that of the VAE and of the text
            encoder, say.

    Raises:
        UsageError: the plan is empty, or names a sample of a bucket twice.
    """

    def __init__(
        self,
        plan: Sequence[Planned],
        prepare: Callable[[int], Prepared],
        scheduler: Scheduler,
        *,
        steps: int = 10,
        seed: int = 0,
        replica: int = 0,
        replicas: int = 1,
        sum_ranks: Callable[[Tensor], Tensor] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        key: str = "",
    ) -> None:
        self.plan, self.prepare, self.scheduler = list(plan), prepare, scheduler
        self.replica, self.replicas, self.seed = replica, replicas, seed
        self.timesteps = [(i + 0.5) * 1000 / steps for i in range(steps)]
        self._sum_ranks = sum_ranks or (lambda own: own)
        self._autocast = autocast
        samples = [(planned.bucket, name) for planned in self.plan for name in planned.names]
        self._rows = {sample: row for row, sample in enumerate(samples)}
        if not samples or len(self._rows) != len(samples):
            raise UsageError(
                "validation: a sample is planned twice for one size"
                if samples
                else "validation: there is no sample; check the table and the bucket_config of val"
            )
        self._key = json.dumps([key, self.plan, self.timesteps, seed, _RECIPE])

    def __call__(self, model: nn.Module, ema: EMA | None = None) -> ValidationResult:
        """Evaluate the present weights, or the averages of `ema`.

        Random generators, training modes and weights are afterwards as they were. Every process
        calls it.
        """
        table = torch.zeros(len(self._rows), len(self.timesteps) + 1, dtype=torch.float64)
        with (
            torch.no_grad(),
            kept_generators(),
            ema.swap() if ema is not None else nullcontext(),
            _evaluating(model),
        ):
            for first in range(0, len(self.plan), self.replicas):
                index = first + self.replica
                counts = index < len(self.plan)
                losses = self._batch(model, min(index, len(self.plan) - 1))
                if counts:
                    for row, values in losses.items():
                        table[row] = values
        return self._average(self._sum_ranks(table))

    def _batch(self, model: nn.Module, index: int) -> dict[int, Tensor]:
        """Return row -> [1, losses at all timesteps] of the samples of a batch."""
        planned = self.plan[index]
        torch.manual_seed(_seed(self.seed, *planned.names))
        batch = self.prepare(index)
        names = planned.names if batch.names is None else batch.names
        if not names:
            raise UsageError(
                f"validation: no sample of a batch of {planned.bucket} could be read, first "
                f"{planned.names[0]}; mend or remove them"
            )
        latent, found = batch.latent, []
        for t in self.timesteps:
            noise = torch.stack([self._noise(name, t, latent.shape[1:]) for name in names])
            with self._autocast():
                losses = self.scheduler.training_losses(
                    model,
                    latent,
                    batch.kwargs,
                    num_frames=batch.num_frames,
                    t=torch.full((len(names),), t, device=latent.device),
                    noise=noise.to(latent.device, latent.dtype),
                )
            found.append(losses["loss"].detach().double().cpu())
        values = torch.stack([torch.ones(len(names), dtype=torch.float64), *found], dim=1)
        rows = (self._rows[planned.bucket, name] for name in names)
        return dict(zip(rows, values, strict=True))

    def _noise(self, name: str, t: float, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(_seed(self.seed, name, f"{t:g}"))
        return torch.randn(tuple(shape), generator=generator)

    def _average(self, table: Tensor) -> ValidationResult:
        seen = table[:, 0] == 1
        losses = table[:, 1:]
        buckets: dict[str, list[int]] = {}
        for (bucket, _), row in self._rows.items():
            if seen[row]:
                buckets.setdefault(bucket, []).append(row)
        read = json.dumps([i for i, was in enumerate(seen.tolist()) if was])
        return ValidationResult(
            loss=float(losses[seen].mean()),
            buckets={name: float(losses[rows].mean()) for name, rows in buckets.items()},
            timesteps={
                f"{t:g}": float(losses[seen, i].mean()) for i, t in enumerate(self.timesteps)
            },
            samples=int(seen.sum()),
            digest=hashlib.sha256((self._key + read).encode()).hexdigest()[:16],
        )


def _seed(seed: int, *words: str) -> int:
    """Return a seed that depends on all words."""
    text = "/".join((str(seed), *words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put the global generators of torch, numpy and Python back at the end."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and every module back to its own mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
