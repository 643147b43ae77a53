"""Compute the learning rate of a step from its number alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from opensora.config_expression import suggest
from opensora.errors import UsageError

DECAYS = ("constant", "linear", "cosine")


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


@dataclass(frozen=True)
class Schedule:
    """Give the learning rate of every step; its only state is the step's number.

        warm-up:  (step + 1) / (warmup + 1)                  as Open-Sora, then 1
        linear:   floor + (1 - floor) * left                 left falls from 1 to 0 over the
        cosine:   floor + (1 - floor) * (1 - cos(pi left))/2   last `share` of the run

    Attributes:
        warmup: steps of the warm-up.
        decay: "constant", "linear" or "cosine".
        total: steps of the run; needed by a decay, not by "constant".
        share: fraction of the run, at its end, that the decay takes; at most what follows the
            warm-up.
        floor: factor at the end, 0 to 1.
    """

    warmup: int = 0
    decay: str = "constant"
    total: int | None = None
    share: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning, naming the setting."""
        if self.decay not in DECAYS:
            raise UsageError(
                f"lr schedule {self.decay!r} is unknown{suggest(str(self.decay), DECAYS)} "
                f"({', '.join(DECAYS)})"
            )
        if self.decay != "constant" and not self.total:
            raise UsageError(f"lr schedule {self.decay!r} needs the number of steps of the run")
        if self.warmup < 0 or not 0 < self.share <= 1 or not 0 <= self.floor <= 1:
            raise UsageError(
                "lr schedule: expected warmup >= 0, 0 < share <= 1 and 0 <= floor <= 1, got "
                f"{self.warmup}, {self.share} and {self.floor}"
            )

    def factor(self, step: int) -> float:
        """Return the factor on the base rate for the zero-based step about to be taken."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.decay == "constant":
            return 1.0
        assert self.total is not None
        length = max(1.0, min(self.share * self.total, float(self.total - self.warmup)))
        left = min(1.0, max(0.0, (self.total - step) / length))
        if self.decay == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.floor + (1 - self.floor) * left

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set every group's rate to its `initial_lr` times the factor; returns the first group's.

        `build_optimizer` and `Muon` set `initial_lr`. A resumed run that wants the rates of its
        new configuration sets `initial_lr` after loading the optimizer's state.
        """
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(optimizer.param_groups[0]["lr"])
