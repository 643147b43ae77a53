"""Limit the norm of gradients."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale gradients down to a total norm of at most `limit`; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(parameters, limit))
