"""Limit the norm of gradients: at a fixed value, or where it stands out from its own history.

Adaptive clipping follows Open-Sora Plan 1.5; its recorded trace is
`tests/golden/adaptive_clip.json`. g is the norm of a step's gradients:

    limit = mean + 3 sqrt(variance)
    g <= limit                                     kept; mean and variance move towards it
    g <= max(mean + 5 sqrt(variance), 5 max_norm)  scaled down to the limit, not learned from
    larger, or not finite                          extreme: not learned from, the step is bad
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Clipped:
    """Say what clipping did to a step's gradients.

    Attributes:
        before: norm that the gradients had; not finite if one of them was not.
        after: norm that they have now.
        limit: norm that was allowed; infinite if none was set.
        extreme: the norm is so far out, or not finite, that the step should not be taken.
    """

    before: float
    after: float
    limit: float
    extreme: bool = False


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """Return the 2-norm of all gradients together, over the shards of all processes.

    Sharded parameters cost one number's all-reduce for every mesh they are on; all processes of
    these meshes must call. Waits for the device.
    """
    return _norm(_local_gradients(parameters))


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale gradients of one process down to a norm of at most `limit`; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(parameters, limit))


class GradientClip:
    """Scale gradients down to a fixed norm.

    Args:
        max_norm: Largest norm; None, 0 or infinity sets no limit, and norms are only measured.
    """

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = float(max_norm or math.inf)

    def __call__(self, parameters: Iterable[Tensor]) -> Clipped:
        """Clip the gradients in place; they stay as they are if their norm is not finite."""
        gradients = _local_gradients(parameters)
        before = _norm(gradients)
        limit, extreme = self._limit(before)
        if not math.isfinite(before):
            return Clipped(before, before, limit, True)
        if extreme or before <= limit:
            return Clipped(before, before, limit, extreme)
        for same in gradients.values():
            # The 1e-6 is torch's: a norm of the result never exceeds the limit by rounding.
            torch._foreach_mul_(same, limit / (before + 1e-6))
        return Clipped(before, before * (limit / (before + 1e-6)), limit)

    def _limit(self, norm: float) -> tuple[float, bool]:
        """Return the limit for a step and whether it is extreme; learn from its norm."""
        return self.max_norm, not math.isfinite(norm)

    def state_dict(self) -> dict[str, float]:
        """Return what later steps depend on: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` returned."""


class AdaptiveClip(GradientClip):
    """Scale gradients down whose norm stands out from a moving mean and variance of the norm.

    Args:
        max_norm: Norm that is taken for usual at the first step, and limit of the warm-up.
        decay: Of mean and variance, per step.
        sigmas: Spreads above the mean from which on gradients are scaled down.
        extreme_sigmas: Spreads above the mean from which on a step is bad; norms up to five times
            `max_norm` never are.
        warm_up: First steps, clipped at `max_norm` while every finite norm is learned from.
    """

    def __init__(
        self,
        max_norm: float = 1.0,
        *,
        decay: float = 0.99,
        sigmas: float = 3.0,
        extreme_sigmas: float = 5.0,
        warm_up: int = 0,
    ) -> None:
        super().__init__(max_norm)
        self.decay, self.sigmas, self.extreme_sigmas = decay, sigmas, extreme_sigmas
        self.warm_up, self.steps = warm_up, 0
        self.mean, self.variance = 0.0, 0.0

    def _limit(self, norm: float) -> tuple[float, bool]:
        if not math.isfinite(norm):
            return (self.max_norm if self.steps == 0 else self.limit), True
        if self.steps == 0:
            self.steps = 1
            self.mean = min(3 * norm, self.max_norm)
            return (self.max_norm if self.warm_up else max(norm, self.mean)), False
        if self.steps < self.warm_up:
            self._learn(norm)
            return self.max_norm, False
        limit = self.limit
        if norm <= limit:
            self._learn(norm)
            return limit, False
        furthest = self.mean + self.extreme_sigmas * math.sqrt(self.variance)
        return limit, norm > max(furthest, 5 * self.max_norm)

    @property
    def limit(self) -> float:
        """Return the norm that the next step may have."""
        return self.mean + self.sigmas * math.sqrt(self.variance)

    def _learn(self, norm: float) -> None:
        self.steps += 1
        self.mean = self.decay * self.mean + (1 - self.decay) * norm
        distance = (self.mean - norm) ** 2
        self.variance = self.decay * self.variance + (1 - self.decay) * distance

    def state_dict(self) -> dict[str, float]:
        """Return the statistics."""
        return {"steps": self.steps, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` returned."""
        self.steps = int(state["steps"])
        self.mean, self.variance = float(state["mean"]), float(state["variance"])


#: Meshes and their dimensions over which gradients are sharded -> their local parts.
_Gradients = dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]]


@torch.no_grad()
def _local_gradients(parameters: Iterable[Tensor]) -> _Gradients:
    found: _Gradients = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if not isinstance(gradient, DTensor):
            found[None, ()].append(gradient)
            continue
        if any(placement.is_partial() for placement in gradient.placements):
            raise ValueError("gradients that are still to be summed over processes have no norm")
        over = (d for d, p in enumerate(gradient.placements) if not p.is_replicate())
        found[gradient.device_mesh, tuple(over)].append(gradient.to_local())
    return found


@torch.no_grad()
def _norm(gradients: _Gradients) -> float:
    total = 0.0
    for (mesh, over), same in gradients.items():
        norms = torch.stack([n.double() for n in torch._foreach_norm(same)])
        square = norms.square().sum()
        if mesh is not None:
            square = square.to(mesh.device_type)
            for dimension in over:
                dist.all_reduce(square, group=mesh.get_group(dimension))
        total += float(square)
    return math.sqrt(total) if total >= 0 else total  # NaN stays NaN
