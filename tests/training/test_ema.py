"""Check averages of weights: upstream's rule, what is averaged, swapping, state."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from opensora.training.ema import EMA

GOLDEN = Path(__file__).parents[1] / "golden"


class Recorded(nn.Module):
    """The module of the recorded case, with the values that the case begins with."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(tensors["in.model.w"])
        self.pos_embed = nn.Parameter(tensors["in.model.pos_embed"])
        self.frozen = nn.Parameter(tensors["in.model.frozen"], requires_grad=False)
        self.register_buffer("buf", tensors["in.model.buf"])


def test_update_is_upstreams():
    tensors = load_file(GOLDEN / "ema.safetensors")
    ema = EMA(Recorded(tensors), 0.99, warm_up=False, trained_only=True)
    assert list(ema.state) == ["w"]  # not pos_embed, frozen weights or buffers
    ema.state["w"].copy_(tensors["in.ema.w"])
    ema.update()
    assert torch.allclose(ema.state["w"], tensors["out.w"], rtol=1e-6, atol=1e-7)


def test_everything_saved_is_averaged_otherwise():
    ema = EMA({"m": Recorded(load_file(GOLDEN / "ema.safetensors"))}, 0.99)
    assert list(ema.state) == ["m.w", "m.pos_embed", "m.frozen", "m.buf"]


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
