"""Check learning rates: upstream's warm-up, the decays, and that the step is the only state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opensora.errors import UsageError
from opensora.training.schedule import Schedule, learning_rate_factor

GOLDEN = Path(__file__).parents[1] / "golden"


def test_warm_up_is_upstreams():
    for case in json.loads((GOLDEN / "lr_warmup.json").read_text()):
        schedule = Schedule(warmup=case["warmup_steps"])
        for step, rate in enumerate(case["lrs"]):
            assert case["base_lr"] * schedule.factor(step) == pytest.approx(rate, rel=1e-12)


def test_linear_decay_is_that_of_the_other_programs():
    schedule = Schedule(warmup=4, decay="linear", total=100, share=0.5)
    for step in range(101):
        assert schedule.factor(step) == pytest.approx(learning_rate_factor(step, 100, 4, 0.5))


def test_decays_go_from_one_to_their_floor():
    for decay in ("linear", "cosine"):
        schedule = Schedule(warmup=10, decay=decay, total=110, floor=0.1)
        factors = [schedule.factor(step) for step in range(130)]
        assert factors[10] == 1
        assert factors[60] == pytest.approx(0.55)
        assert factors[110:] == pytest.approx([0.1] * 20)
        assert factors[10:] == sorted(factors[10:], reverse=True)


def test_every_group_keeps_its_own_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    for step in (0, 3, 0):  # no state: a step that comes again has its rate again
        assert Schedule(warmup=3).set(optimizer, step) == pytest.approx(
            (step + 1) / 4 if step < 3 else 1
        )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.025])


def test_wrong_settings_are_named():
    with pytest.raises(UsageError, match="did you mean cosine"):
        Schedule(decay="cosin", total=10)
    with pytest.raises(UsageError, match="needs the number of steps"):
        Schedule(decay="linear")
    with pytest.raises(UsageError, match="0 < share"):
        Schedule(share=0)
