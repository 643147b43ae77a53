"""Measure how far a replay is from its recording, and judge it.

float32:  max |ours - recorded| / max |recorded|, at most TOLERANCE[...] of the kind
float64:  the same, at most 1e-9 where nothing inside is float32 by definition
low precision (bfloat16, float16), with the truth = the same case in float32 on the rounded weights
and inputs:  max |ours - truth| <= 2 max |recorded - truth| + one rounding step of max |truth|,
both printed relative to max |truth|; and the recording itself must be credible:
max |recorded - truth| <= 4 (max |ours - truth| + one rounding step)
integers, bools, tables:  equal
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from opensora.replay.recording import Mismatch

TOLERANCE = 2e-5
TOLERANCE_FLOAT64 = 1e-9
#: A gradient that vanishes in exact arithmetic is rounding noise; it is measured against this
#: share of the case's largest gradient.
VANISHING = 1e-2
#: A tensor of fewer values than this may be nearly exact by chance in low precision; its own error
#: then counts as at least the median of its case's tensors.
FEW = 256
#: How many times less exact than ours a low-precision recording can be and still be believed.
#: Without this limit a wrong one would only widen its own tolerance.
CREDIBLE = 4


@dataclasses.dataclass(frozen=True)
class Result:
    """State how one case went.

    Attributes:
        case: file name without its suffix.
        verdict: "pass", "fail" or "unsupported".
        error: the largest error, relative as in this module's head; for tables the number of
            entries that differ. None where nothing was compared.
        tolerance: what `error` may be at most.
        detail: one line: what was compared, or what is wrong.
    """

    case: str
    verdict: str
    error: float | None
    tolerance: float | None
    detail: str


@dataclasses.dataclass(frozen=True)
class Difference:
    """State how far one tensor is from its recording, and how far it may be.

    Attributes:
        name: of the tensor.
        error: relative, as in this module's head.
        tolerance: what it may be at most.
        own: in low precision, the error of the recording itself.
        values: how many there are in the tensor.
    """

    name: str
    error: float
    tolerance: float
    own: float = 0.0
    values: int = 0

    @property
    def passes(self) -> bool:
        """Whether the error is within the tolerance; an error that is not a number is not."""
        return self.error <= self.tolerance

    @property
    def badness(self) -> float:
        """Order differences: the error in units of its tolerance; infinite if it has none."""
        if self.tolerance == 0:
            return math.inf if self.error else 0.0
        ratio = self.error / self.tolerance
        return math.inf if math.isnan(ratio) else ratio


def worst(differences: Iterable[Difference]) -> Difference:
    """Return the difference nearest to its tolerance, or furthest beyond it."""
    return max(differences, key=lambda difference: difference.badness)


def measure(
    name: str,
    ours: Tensor,
    recorded: Tensor,
    *,
    truth: Tensor | None = None,
    step: float = 0.0,
    tolerance: float = TOLERANCE,
    scale: float = 0.0,
) -> Difference:
    """Compare one tensor with its recording.

    Args:
        name: of the tensor, for messages.
        ours: what this library computed.
        recorded: what the original computed.
        truth: for low precision: the tensor without its rounding.
        step: for low precision: the spacing of numbers just above 1.
        tolerance: for float32 and float64.
        scale: errors are relative to the largest of this and the recorded (true) magnitude.

    Raises:
        Mismatch: another shape, or a float instead of an integer.
    """
    if ours.shape != recorded.shape:
        raise Mismatch(f"{name}: recorded {list(recorded.shape)}, ours {list(ours.shape)}")
    if not recorded.is_floating_point():
        if ours.is_floating_point():
            raise Mismatch(f"{name}: recorded {recorded.dtype}, ours {ours.dtype}")
        return Difference(name, _largest(ours.double() - recorded.double()), 0.0)
    ours, recorded = ours.detach().double(), recorded.double()
    if truth is None:
        size = max(_magnitude(recorded), scale) or 1.0
        return Difference(name, _largest(_subtract(ours, recorded)) / size, tolerance)
    truth = truth.detach().double()
    size = max(_magnitude(truth), scale) or 1.0
    own, error = (_largest(_subtract(t, truth)) / size for t in (recorded, ours))
    if not own <= CREDIBLE * (error + step):  # a NaN is not credible either
        return Difference(f"{name} as recorded", own, CREDIBLE * (error + step), own)
    return Difference(name, error, 2 * own + step, own, ours.numel())


def allow_for_chance(differences: list[Difference], step: float) -> list[Difference]:
    """Widen the tolerance of low-precision tensors of few values; see `FEW`."""
    typical = statistics.median(d.own for d in differences)
    return [
        dataclasses.replace(d, tolerance=2 * max(d.own, typical) + step)
        if 0 < d.values < FEW
        else d
        for d in differences
    ]


def _subtract(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b, zero where both are the same infinity or both are NaN."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, a - b)


def _magnitude(values: Tensor) -> float:
    """Return max |values| of those that are finite."""
    return _largest(values[values.isfinite()])


def _largest(values: Tensor) -> float:
    """Return max |values|; NaN if there is one; 0 of nothing."""
    return float(values.abs().max()) if values.numel() else 0.0
