"""Check the count of floating-point operations against torch's counter, and the table of peaks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.testing import reference
from opensora.training.flops import (
    PEAKS,
    count_tokens,
    forward_flops,
    peak_flops,
    token_grid,
    training_flops,
)

LATENT = (5, 9, 12)


@pytest.mark.parametrize("changes", [{}, {"mlp_ratio": 2.0}, {"pred_sigma": False}])
def test_forward_is_what_torch_counts(changes):
    config = STDiT3Config(
        hidden_size=48, depth=2, num_heads=2, caption_channels=64, model_max_length=32, **changes
    )
    model = STDiT3(config).eval()
    one = torch.ones(1)
    with reference(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            torch.randn(1, 4, *LATENT), 500 * one, torch.randn(1, 1, 32, 64),
            fps=24 * one, height=64 * one, width=64 * one,
        )  # fmt: skip
    assert forward_flops(config, LATENT, 32) == counter.get_total_flops()
    assert training_flops(config, LATENT, 32) == 3 * forward_flops(config, LATENT, 32)


def test_the_published_model_needs_the_published_flops():
    config = STDiT3Config()
    for latent, tera in (((15, 45, 80), 31.5), ((15, 60, 106), 56.5), ((120, 90, 160), 1139.9)):
        assert forward_flops(config, latent, 300) / 1e12 == pytest.approx(tera, rel=2e-3)
    assert token_grid(config, (15, 45, 80)) == (15, 920)  # 45 rows are padded to 46
    assert count_tokens(config, (15, 45, 80)) == 13800


def test_a_special_name_comes_before_the_plain_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    for name, tera in (
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 125),
    ):
        assert peak_flops(device) == pytest.approx(tera * 1e12), name
    name = "GeForce 256"
    assert peak_flops(device) is None
    for i, (part, _) in enumerate(PEAKS):
        assert not any(earlier in part for earlier, _ in PEAKS[:i]), part


def test_a_cpu_is_measured_once():
    cpu = torch.device("cpu")
    first = peak_flops(cpu, torch.float32)
    assert 1e9 < first < 1e14
    assert peak_flops(cpu, torch.float32) == first
