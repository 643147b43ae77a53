"""Test that `Linear` gives what `nn.Linear` gives, whichever way it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora import testing
from opensora.linear import Linear
from opensora.testing import assert_as_exact_as, randn


def layer(rows: int, columns: int, dtype: torch.dtype, bias: bool = True) -> Linear:
    made = Linear(columns, rows, bias=bias)
    made.weight.data = randn(rows, columns, seed=1) / columns**0.5
    if bias:
        made.bias.data = randn(rows, seed=2)
    return made.to(dtype)


def expected(one: nn.Linear, x: Tensor, gelu: bool) -> Tensor:
    y = F.linear(x, one.weight.to(x.dtype), None if one.bias is None else one.bias.to(x.dtype))
    return F.gelu(y, approximate="tanh") if gelu else y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("shape", [(3, 5, 40), (700, 160), (0, 40), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_without_gradients_equals_the_plain_layer(
    dtype: torch.dtype, shape: tuple[int, ...], gelu: bool, bias: bool
) -> None:
    one = layer(192, shape[-1], dtype, bias)
    x = randn(*shape, seed=3).to(dtype)
    for view in (x, torch.stack((x, -x), dim=-1)[..., 0]):  # dense and strided
        with torch.no_grad():
            y = one(view, gelu)
        working = expected(one, x, gelu)
        if dtype == torch.float64:
            torch.testing.assert_close(y, working)
        else:
            assert_as_exact_as(working, y, expected(one, x.double(), gelu))
        assert y.dtype == dtype
        assert y.is_contiguous()


def test_takes_the_fused_way_only_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = layer(8, 16, torch.float32), randn(4, 16)
    calls = []

    def fused(*args: Any) -> Tensor:
        calls.append(args)
        return F.linear(*args[:3])

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fused)
    one(x, gelu=True).sum().backward()
    assert not calls
    assert one.weight.grad is not None
    with torch.no_grad():
        one(x, gelu=True)
        assert len(calls) == 1
        with testing.reference():
            one(x, gelu=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert one(x, gelu=True).dtype == torch.bfloat16
    assert len(calls) == 1


def test_needs_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    for dtype in (torch.float32, torch.bfloat16):
        one, x = layer(8, 16, dtype), randn(4, 16).to(dtype)
        with torch.no_grad():
            assert torch.equal(one(x, gelu=True), expected(one, x, gelu=True))


def test_gradients_equal_those_of_the_plain_layer() -> None:
    one, x = layer(8, 16, torch.float64), randn(4, 16, dtype=torch.float64).requires_grad_()
    for gelu in (False, True):
        found = torch.autograd.grad(one(x, gelu).square().sum(), [x, *one.parameters()])
        right = torch.autograd.grad(expected(one, x, gelu).square().sum(), [x, *one.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_compiles_without_graph_break() -> None:
    one, x = layer(8, 16, torch.float32), randn(4, 16)
    with torch.no_grad():
        y = torch.compile(one, fullgraph=True, backend="aot_eager")(x, True)
        torch.testing.assert_close(y, one(x, True))
