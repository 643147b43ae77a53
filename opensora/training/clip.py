"""Limit the norm of gradients: at a fixed value, or where it stands out from its own history.

The idea of adaptive clipping is Open-Sora Plan 1.5's: mean and variance of the norm g move from
step to step, and a norm above mean + 3 sqrt(variance) is scaled down to that. Plan 1.5 starts from
a norm of 1, learns nothing from what it clips and ends the run at 5 standard deviations; a model
trained from random weights, whose first norms are 10, ends at its second step. `PlanClip` does just
that, recorded in `tests/golden/adaptive_clip.json`; `AdaptiveClip` finds its own scale.
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

        limit = min(mean + sigmas * sqrt(variance), max_norm)

    A norm beyond the limit is learned from as if it were the limit: one outlier hardly moves the
    statistics, and norms that stay ten times larger are followed within a hundred steps. Norms that
    are not finite leave no trace. The first steps learn a plain mean and variance, and may have
    twice the mean.

    Args:
        max_norm: Largest limit; None, 0 or infinity for none.
        decay: Of mean and variance, per step.
        sigmas: Standard deviations above the mean.
        warm_up: First steps.
    """

    def __init__(
        self,
        max_norm: float | None = None,
        *,
        decay: float = 0.99,
        sigmas: float = 3.0,
        warm_up: int = 50,
    ) -> None:
        super().__init__(max_norm)
        self.decay, self.sigmas, self.warm_up = decay, sigmas, warm_up
        self.steps, self.mean, self.variance = 0, 0.0, 0.0

    @property
    def limit(self) -> float:
        """Return the norm that the next step may have."""
        if self.steps == 0:
            return self.max_norm
        limit = self.mean + self.sigmas * math.sqrt(self.variance)
        if self.steps < self.warm_up:
            limit = max(limit, 2 * self.mean)
        return min(limit, self.max_norm)

    def _limit(self, norm: float) -> tuple[float, bool]:
        limit = self.limit
        if not math.isfinite(norm):
            return limit, True
        self._learn(min(norm, limit))
        return limit, False

    def _learn(self, norm: float) -> None:
        decay = min(self.decay, self.steps / (self.steps + 1))
        self.steps += 1
        self.variance = decay * (self.variance + (1 - decay) * (norm - self.mean) ** 2)
        self.mean = decay * self.mean + (1 - decay) * norm

    def state_dict(self) -> dict[str, float]:
        """Return the statistics."""
        return {"steps": self.steps, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` returned; {}, that of fixed clipping, starts anew."""
        self.steps = int(state.get("steps", 0))
        self.mean = float(state.get("mean", 0.0))
        self.variance = float(state.get("variance", 0.0))


class PlanClip(AdaptiveClip):
    """Clip as Open-Sora Plan 1.5.

        g <= mean + 3 sqrt(variance)                   kept and learned from
        g <= max(mean + 5 sqrt(variance), 5 max_norm)  scaled down, not learned from
        larger, or not finite                          extreme: the step is bad

    Args:
        max_norm: The first mean is three times the first norm, at most this.
        decay: Of mean and variance, per step.
    """

    def __init__(self, max_norm: float = 1.0, *, decay: float = 0.99) -> None:
        super().__init__(max_norm, decay=decay)

    def _limit(self, norm: float) -> tuple[float, bool]:
        deviation = math.sqrt(self.variance)
        limit = self.mean + 3 * deviation if self.steps else self.max_norm
        if not math.isfinite(norm):
            return limit, True
        if self.steps == 0:
            self.steps, self.mean = 1, min(3 * norm, self.max_norm)
            return max(norm, self.mean), False
        if norm <= limit:
            self.steps += 1
            self.mean = self.decay * self.mean + (1 - self.decay) * norm
            distance = (self.mean - norm) ** 2
            self.variance = self.decay * self.variance + (1 - self.decay) * distance
            return limit, False
        return limit, norm > max(self.mean + 5 * deviation, 5 * self.max_norm)


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
