"""Check which optimizer a name gives, what it moves, and by how much."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opensora.errors import UsageError
from opensora.optim import Muon
from opensora.training.optimizers import build_optimizer, decays


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.scale_shift_table = nn.Parameter(torch.randn(6, 4))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def test_frozen_parameters_are_left_out():
    model = Small()
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model.named_parameters(), name=name)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) == 5
        assert id(model.frozen) not in held


def test_decay_spares_vectors_and_tables_on_request():
    model = Small()
    assert [n for n, p in model.named_parameters() if decays(n, p)] == ["fc.weight"]
    for decay_all, still in ((False, True), (True, False)):
        model = Small()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer = build_optimizer(
            model.named_parameters(), lr=0.1, weight_decay=0.5, decay_all=decay_all
        )
        for value in model.parameters():
            value.grad = torch.zeros_like(value)
        optimizer.step()
        assert torch.allclose(model.fc.weight, before["fc.weight"] * 0.95)
        assert torch.equal(model.norm.weight, before["norm.weight"]) == still
        assert torch.equal(model.scale_shift_table, before["scale_shift_table"]) == still


def test_an_eps_of_1e_15_moves_small_gradients_and_survives_none():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer([("w", weight)], lr=1e-4, eps=1e-15)
    for _ in range(3):
        weight.grad = torch.tensor([0.0, 1e-12, 1.0])
        optimizer.step()
    assert weight[0] == 0
    assert weight.detach()[1:].tolist() == pytest.approx([-3e-4, -3e-4], rel=2e-3)


def test_fused_takes_the_steps_of_the_plain_rule():
    results = []
    for fused in (None, False):
        model = Small()
        optimizer = build_optimizer(
            model.named_parameters(), lr=1e-2, weight_decay=0.1, fused=fused, betas=(0.9, 0.99)
        )
        for step in range(5):
            loss = (model.fc.weight * (step + 1)).square().sum() + model.norm.weight.cos().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(model.fc.weight.detach())
    assert torch.allclose(*results, rtol=1e-5)


def test_muon_leaves_tables_and_vectors_to_adamw():
    optimizer = build_optimizer(Small().named_parameters(), name="muon", lr=2e-3, adamw_lr=1e-3)
    assert isinstance(optimizer, Muon)
    assert [(g["muon"], len(g["params"]), g["initial_lr"]) for g in optimizer.param_groups] == [
        (True, 1, 2e-3),
        (False, 4, 1e-3),
    ]


def test_upstreams_name_is_known():
    assert isinstance(
        build_optimizer(Small().named_parameters(), name="HybridAdam"), torch.optim.AdamW
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamm"}, "did you mean adamw"),
        ({"name": "apex"}, "apex is not installed"),
        ({"named_parameters": []}, "nothing to train"),
        ({"named_parameters": [("w", nn.Parameter(torch.ones(1).half()))]}, "round to nothing"),
    ],
)
def test_what_cannot_be_trained_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        build_optimizer(**{"named_parameters": Small().named_parameters(), **changes})
