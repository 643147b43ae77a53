"""Check gradient clipping: norms, their history, bad norms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from opensora.training.clip import AdaptiveClip, GradientClip, PlanClip, gradient_norm


def parameters_with(norm: float) -> list[nn.Parameter]:
    """Return two parameters whose gradients together have the norm, and one without."""
    parameters = [
        nn.Parameter(torch.zeros(2, 3)),
        nn.Parameter(torch.zeros(4)),
        nn.Parameter(torch.zeros(1)),
    ]
    for parameter in parameters[:2]:
        parameter.grad = torch.full_like(parameter, norm / math.sqrt(10))
    return parameters


def test_fixed_clipping_is_torchs():
    for norm in (0.5, 1.0, 7.0):
        ours, theirs = parameters_with(norm), parameters_with(norm)
        result = GradientClip(1.0)(ours)
        assert result.before == pytest.approx(norm, rel=1e-6)
        assert float(nn.utils.clip_grad_norm_(theirs, 1.0)) == pytest.approx(
            result.before, rel=1e-6
        )
        for left, right in zip(ours[:2], theirs[:2], strict=True):
            assert torch.allclose(left.grad, right.grad, rtol=1e-5)
        assert gradient_norm(ours) == pytest.approx(result.after, rel=1e-6)
        assert result.after <= 1.0


def test_no_limit_only_measures():
    for limit in (None, 0, math.inf):
        parameters = parameters_with(1e6)
        result = GradientClip(limit)(parameters)
        assert result.after == result.before == pytest.approx(1e6)
        assert not result.extreme


@pytest.mark.parametrize("kind", [AdaptiveClip, PlanClip])
def test_bad_norms_teach_nothing_and_change_no_gradient(kind):
    clip = kind(1.0)
    assert clip(parameters_with(math.nan)).extreme  # nor are they the start of the statistics
    assert clip.steps == 0
    for norm in (0.5, 0.6, 0.4):
        clip(parameters_with(norm))
    before = clip.state_dict()
    for norm in (math.nan, math.inf):
        parameters = parameters_with(norm)
        assert clip(parameters).extreme
        assert clip.state_dict() == before
        assert torch.equal(
            parameters[0].grad.nan_to_num(), parameters_with(norm)[0].grad.nan_to_num()
        )
    assert not clip(parameters_with(0.5)).extreme


def test_plan_takes_a_far_norm_for_the_end_of_the_run():
    clip = PlanClip(1.0)
    clip(parameters_with(0.5))
    before = clip.state_dict()
    assert clip(parameters_with(5.1)).extreme
    assert not clip(parameters_with(4.9)).extreme
    assert clip.state_dict() == before


def test_adaptive_clipping_finds_the_scale_of_the_norms():
    for scale in (1e-3, 1.0, 1e3):
        clip, random = AdaptiveClip(), torch.Generator().manual_seed(0)
        norms = (scale * (1 + 0.1 * torch.randn(500, generator=random))).tolist()
        results = [clip(parameters_with(norm)) for norm in norms]
        assert sum(r.before > r.limit for r in results) < 5
        assert clip.mean == pytest.approx(scale, rel=0.05)
        assert math.sqrt(clip.variance) == pytest.approx(0.1 * scale, rel=0.3)
        outlier = clip(parameters_with(100 * scale))
        assert outlier.after == pytest.approx(1.3 * scale, rel=0.1)
        assert clip.mean == pytest.approx(scale, rel=0.05)


def test_adaptive_clipping_follows_a_lasting_change():
    clip, random = AdaptiveClip(), torch.Generator().manual_seed(0)
    for scale in (1.0, 10.0, 0.1):
        norms = (scale * (1 + 0.1 * torch.randn(600, generator=random))).tolist()
        results = [clip(parameters_with(norm)) for norm in norms]
        assert sum(r.before > r.limit for r in results) < 100
        assert not any(r.extreme for r in results)
        assert all(r.before <= r.limit for r in results[-20:])


def test_the_fixed_norm_bounds_the_adaptive_limit():
    clip = AdaptiveClip(1.0)
    for _ in range(60):
        assert clip(parameters_with(3.0)).after <= 1.0
    assert clip.mean == pytest.approx(1.0)


def test_adaptive_clipping_resumes():
    whole, first, second = AdaptiveClip(), AdaptiveClip(), AdaptiveClip()
    norms = [0.5, 0.7, 0.4, 2.0, 0.6, 1.4]
    after = [whole(parameters_with(norm)).after for norm in norms]
    before_cut = [first(parameters_with(norm)).after for norm in norms[:3]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before_cut + [second(parameters_with(norm)).after for norm in norms[3:]] == after


def test_a_run_may_change_between_fixed_and_adaptive_clipping():
    fixed, adaptive = GradientClip(1.0), AdaptiveClip()
    adaptive(parameters_with(2.0))
    fixed.load_state_dict(adaptive.state_dict())
    adaptive.load_state_dict(fixed.state_dict())
    assert adaptive.steps == 0
