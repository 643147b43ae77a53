"""Check averages of weights: upstream's rule, what is averaged, swapping, state."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from opensora.training.ema import EMA


class Mixed(nn.Module):
    """Hold a weight of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.pos_embed = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("buf", torch.zeros(1))


def test_everything_saved_is_averaged_unless_asked_otherwise():
    assert list(EMA({"m": Mixed()}, 0.99).state) == ["m.w", "m.pos_embed", "m.frozen", "m.buf"]
    assert list(EMA(Mixed(), 0.99, trained_only=True).state) == ["w"]


def test_warm_up_forgets_the_first_weights():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    slow, fast = EMA(module, 0.999, warm_up=False), EMA(module, 0.999)
    nn.init.ones_(module.weight)
    for _ in range(20):
        slow.update()
        fast.update()
    assert slow.state["weight"].item() == pytest.approx(1 - 0.999**20, rel=1e-4)
    assert fast.state["weight"].item() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_gives_weights_and_averages_back_bit_for_bit(dtype):
    torch.manual_seed(0)
    module = nn.Linear(5, 5).to(dtype)
    ema = EMA(module, 0.9)
    nn.init.normal_(module.weight)
    ema.update()
    weight, average = module.weight.detach().clone(), ema.state["weight"].clone()
    with suppress(KeyboardInterrupt), ema.swap():
        assert torch.equal(module.weight, average.to(dtype))
        for call in (ema.update, ema.state_dict):
            with pytest.raises(RuntimeError, match="between a swap and its end"):
                call()
        raise KeyboardInterrupt
    assert torch.equal(module.weight, weight)
    assert torch.equal(ema.state["weight"], average)
    assert not ema._held


def test_state_comes_back():
    module = nn.Linear(3, 3)
    ema, other = EMA(module, 0.9), EMA(module, 0.9)
    nn.init.normal_(module.weight)
    ema.update()
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    nn.init.normal_(module.weight)
    for each in (ema, other):
        each.update()
    assert torch.equal(ema.state["weight"], other.state["weight"])


def test_a_state_of_other_weights_is_named():
    ema = EMA(nn.Linear(3, 3), 0.9)
    with pytest.raises(ValueError, match="names differ, first 'bias'"):
        ema.load_state_dict(EMA(nn.Linear(3, 3, bias=False), 0.9).state_dict())
    with pytest.raises(ValueError, match=r"'weight': expected \[3, 3\], got \[3, 4\]"):
        ema.load_state_dict(EMA(nn.Linear(4, 3), 0.9).state_dict())
