"""Gate what a block of STDiT3-XL/2 launches, moves, keeps and compiles to; no GPU is needed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bench import counted
from bench.shapes import CELLS
from opensora.functional import gate_residual
from opensora.models.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from opensora.models.vae.temporal import VAETemporal, VAETemporalConfig
from opensora.traffic import trace

BOTH = pytest.mark.parametrize("temporal", [False, True])
AROUND = {  # what runs beside the matrix products, self-attention left out
    "gate_residual_forward",
    "cross_attention_forward",
    "residual_layernorm_modulate_forward",
    "aten.gelu",
}


def test_trace_counts_launches_and_bytes() -> None:
    x = torch.empty(2, 3, 8, device="meta")
    y = x.bfloat16()
    gate = torch.empty(2, 6, 8, device="meta")[:, 1]

    def run() -> None:
        z = gate_residual(x, y, gate) @ torch.empty(8, 5, device="meta")
        torch.cat((z.transpose(1, 2), z.transpose(1, 2)))

    fused, product, copy = trace(run)
    assert (fused.name, fused.launches, fused.is_product) == ("gate_residual_forward", 1, False)
    assert (fused.read, fused.written) == (48 * 4 + 48 * 2 + 16 * 4, 48 * 4)
    assert (product.name, product.is_product, product.read) == ("aten.mm", True, 48 * 4 + 40 * 4)
    assert (copy.name, copy.read, copy.written) == ("aten.cat", 30 * 4, 60 * 4)


def test_trace_counts_an_expanded_tensor_once() -> None:
    x = torch.empty(4, 1, device="meta")
    (step,) = trace(lambda: x.expand(4, 100) * x)
    assert (step.read, step.written) == (4 * 4 * 2, 400 * 4)


@BOTH
def test_launches_of_a_block(temporal: bool) -> None:
    counts = counted.count("480p-2s", temporal=temporal)
    beside = [step.name for step in counts.steps if not step.is_product]
    kind = "temporal" if temporal else "spatial"
    assert beside[0] == f"{kind}_attention_forward"
    assert set(beside[1:]) == AROUND
    assert counts.launches <= 7
    assert counts.products == 6


@BOTH
def test_bytes_of_a_block(temporal: bool) -> None:
    for cell in ("240p-2s", "480p-2s", "720p-16s"):
        counts = counted.count(cell, temporal=temporal)
        # Beside the tokens there are keys of the text, modulations and statistics of the softmax.
        assert counts.least <= counts.moved < 1.05 * counts.least, cell


@BOTH
def test_what_a_block_keeps_for_the_backward_pass(temporal: bool) -> None:
    counts = counted.count("480p-2s", temporal=temporal, training=True)
    # Three sums, two norms, qkv (3), q, two results of attention, two gated branches and both
    # sides of GELU (4 + 4); statistics and the text's keys come to 0.2.
    assert 21 <= counts.kept / counts.tokens < 21.25


@BOTH
def test_one_graph_serves_all_sizes(temporal: bool) -> None:
    assert len(CELLS) == 12
    assert counted.count_graphs(temporal=temporal, cells=list(CELLS)) == 1


def test_a_sampling_step_computes_nothing_twice() -> None:
    names = [step.name for step in counted.count_sampling_step()]
    assert names[:3] == ["aten._to_copy", "patchify_forward", "layernorm_modulate_forward"]
    assert sum(step.launches for step in counted.count_sampling_step()) <= 33


def test_the_temporal_vae_copies_nothing_around_its_convolutions() -> None:
    with torch.device("meta"):
        vae = VAETemporal(VAETemporalConfig(filters=32, num_res_blocks=1)).bfloat16()
        z = torch.empty(1, 4, 5, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        steps = trace(lambda: vae.decode(z, 17))
    names = [step.name for step in steps]
    # Apart from norms and convolutions, frames are interleaved where their number doubles, and z
    # is put in order.
    assert set(names) <= {"groupnorm_silu_forward", "causal_conv3d_forward", "aten.clone"}, names
    assert names.count("aten.clone") == 2 + 1


def test_the_2d_vae_copies_nothing_around_its_convolutions() -> None:
    config = AutoencoderKLConfig(block_out_channels=(64, 64, 128), layers_per_block=1)
    with torch.device("meta"):
        vae = AutoencoderKL(config).bfloat16()
        x = torch.empty(2, 3, 32, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        steps = trace(lambda: vae.decode(vae.encode(x).mean))
    names = Counter(step.name for step in steps)
    # In each mid-block attention, whose result is put in order, lies between norms and products.
    attention = {"aten.addmm", "aten.bmm", "aten.mul", "aten._to_copy", "aten._safe_softmax"}
    fused = {"groupnorm_silu_forward", "causal_conv3d_forward"}
    assert set(names) - attention - fused == {
        "aten.add", "aten.clone", "aten.upsample_nearest2d", "aten.clamp"
    }  # fmt: skip
    assert names["aten.add"] == names["aten.clone"] == 2
    assert names["aten.clamp"] == 1  # the posterior's logarithm
