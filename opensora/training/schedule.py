"""Compute the learning rate of a step."""

from __future__ import annotations


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
