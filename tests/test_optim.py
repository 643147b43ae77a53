"""Check Muon: what it does to singular values, that it learns, and that it resumes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from opensora.optim import Muon, orthogonalise


def test_orthogonalise_moves_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 256), (32, 128), (3, 128, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert values.min() > 0.4
        assert values.max() < 1.35


def test_update_size_does_not_depend_on_the_shape():
    for shape in ((16, 16), (256, 64), (32, 8, 3, 3)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        Muon([("w", weight)], lr=1.0).step()
        assert 0.1 < weight.detach().square().mean().sqrt() < 0.26


def _problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    x = torch.randn(64, 4, 8)
    return model, x, x.mean((1, 2))[:, None] * torch.tensor([1.0, -2.0, 0.5])


def _train(
    model: nn.Module, optimizer: Muon, x: torch.Tensor, y: torch.Tensor, steps: int
) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_learns_a_small_problem():
    model, x, y = _problem()
    first = _train(model, Muon(model.named_parameters(), lr=0.0, adamw_lr=0.0), x, y, 1)
    last = _train(model, Muon(model.named_parameters(), lr=5e-3, adamw_lr=5e-3), x, y, 200)
    assert last < first / 100


def test_names_choose_the_rule():
    model, _, _ = _problem()
    optimizer = Muon(model.named_parameters(), adamw_names=("3.",))
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 3]
    assert optimizer.param_groups[0]["muon"]
    assert not optimizer.param_groups[1]["muon"]


def test_resumes_exactly():
    model, x, y = _problem()
    optimizer = Muon(model.named_parameters())
    _train(model, optimizer, x, y, 5)
    other = copy.deepcopy(model)
    resumed = Muon(other.named_parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(model, optimizer, x, y, 5)
    _train(other, resumed, x, y, 5)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
