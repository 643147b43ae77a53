"""Check the shared layers against tensors recorded from Open-Sora 1.2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from opensora import nn as layers
from opensora.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}


def relative_error(x: Tensor, y: Tensor) -> float:
    """Return the largest error over the largest value."""
    return ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()


def test_rms_norm_matches_recorded() -> None:
    case = golden("rmsnorm")
    norm = layers.RMSNorm(72)
    norm.load_state_dict(weights(case))
    assert relative_error(norm(case["in.x"]), case["out.y"]) < 1e-6
    in_bf16 = norm.bfloat16()(case["in.x"].bfloat16())
    # Rounded before the weight and after it: an order that shows, so the values must be equal.
    assert torch.equal(in_bf16.float(), case["out.y_bf16"])


@pytest.mark.parametrize(("given", "wanted"), [("q", "y"), ("long", "y_long")])
def test_rotary_embedding_matches_recorded(given: str, wanted: str) -> None:
    case = golden("rope")
    rope, x = layers.RotaryEmbedding(72), case[f"in.{given}"]
    assert torch.equal(rope.freqs, case["sd.freqs"])
    turned = layers.rotate(x, rope.table(x.shape[-2]))
    assert relative_error(turned, case[f"out.{wanted}"]) < 1e-6
    rope.bfloat16()
    assert torch.equal(rope.freqs.float(), case["out.freqs_bf16"])
    turned = layers.rotate(x.bfloat16(), rope.table(x.shape[-2]))
    assert turned.dtype == torch.bfloat16
    # One rounding step: neighbouring bfloat16 values of the cosine are 2 ** -8 apart.
    assert relative_error(turned, case[f"out.{wanted}_bf16"]) < 2**-8


def test_rotation_keeps_relative_positions_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 8).expand(2, 9, 8)
    table = layers.RotaryEmbedding(8).table(9)
    products = layers.rotate(q, table) @ layers.rotate(k, table).T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])


def test_attention_with_legacy_norm_order_matches_recorded() -> None:
    case = golden("attn_qknorm_rope_legacy")
    attention = layers.Attention(144, 2, qk_norm=True, qk_norm_legacy=True)
    attention.load_state_dict(weights(case))
    table = layers.RotaryEmbedding(72).table(case["in.x"].shape[1])
    assert relative_error(attention(case["in.x"], table), case["out.y"]) < 2e-5
    other = layers.Attention(144, 2, qk_norm=True)
    other.load_state_dict(weights(case))
    assert relative_error(other(case["in.x"], table), case["out.y"]) > 1e-3


def test_attention_in_bfloat16_is_as_exact_as_its_formula() -> None:
    """Error against float64 is at most twice that of the plain formula in bfloat16."""
    case = golden("attn_qknorm_rope_legacy")
    module = layers.Attention(144, 2, qk_norm=True, qk_norm_legacy=True).bfloat16()
    module.load_state_dict(weights(case))
    x = case["in.x"].bfloat16()
    table = layers.RotaryEmbedding(72).bfloat16().table(x.shape[1])

    def formula(dtype: torch.dtype) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.to(dtype).view(3, 7, 2, 72).transpose(1, 2)

        w, cos_sin = module.qkv.weight.to(dtype), (table[0].to(dtype), table[1].to(dtype))
        q, k, v = map(split, F.linear(x.to(dtype), w, module.qkv.bias.to(dtype)).chunk(3, -1))
        q, k = layers.rotate(q, cos_sin), layers.rotate(k, cos_sin)

        def norm(t: Tensor, weight: Tensor) -> Tensor:
            wide = t if dtype == torch.float64 else t.float()
            unit = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            return weight.to(dtype) * unit.to(dtype)

        q, k = norm(q, module.q_norm.weight) * 72**-0.5, norm(k, module.k_norm.weight)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        out = (q @ k.transpose(-1, -2)).softmax(-1, dtype=wide).to(dtype) @ v
        out = out.transpose(1, 2).reshape(3, 7, 144)
        return F.linear(out, module.proj.weight.to(dtype), module.proj.bias.to(dtype))

    truth = formula(torch.float64)
    own = (module(x, table).double() - truth).abs().max()
    assert own <= 2 * (formula(torch.bfloat16).double() - truth).abs().max()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_agrees_with_torch_on_short_and_long_rows(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    for keys in (3, 20, 140):
        q, k, v = (torch.randn(2, 2, n, 24, dtype=dtype) for n in (9, keys, keys))
        mask = torch.rand(2, 1, 1, keys) < 0.7 if masked else None
        if mask is not None:
            mask[..., 0] = True
        wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
        bound = 1e-6 if dtype == torch.float32 else 2**-6
        assert relative_error(layers.attend(q, k, v, mask), wanted) < bound


@pytest.mark.parametrize("masked", [False, True])
def test_attend_has_the_gradients_of_float64(masked: bool) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, 2, n, 16, dtype=torch.bfloat16) for n in (7, 20, 20))
    mask = torch.rand(3, 1, 1, 20) < 0.6 if masked else None
    if mask is not None:
        mask[..., 0], mask[2] = True, False  # the last sample sees nothing
    cotangent = torch.randn(3, 2, 7, 16)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.clone().to(dtype).requires_grad_() for x in (q, k, v)]
        if dtype == torch.bfloat16:
            out = layers.attend(*inputs, mask)
        else:
            bias = torch.zeros(()) if mask is None else torch.where(mask, 0.0, -1e9)
            scores = inputs[0] @ inputs[1].mT / 16**0.5 + bias
            out = scores.softmax(-1) @ inputs[2]
            if mask is not None:
                out = out * mask.any(-1, keepdim=True)
        out.backward(cotangent.to(dtype))
        grads.append([x.grad for x in inputs])
    for got, wanted in zip(*grads, strict=True):
        assert got is not None
        assert relative_error(got, wanted) < 2**-5
        if masked:
            assert not got[2].any()


def test_cross_attention_matches_recorded_ragged_text() -> None:
    case = golden("cross_attn_ragged")
    module = layers.MultiHeadCrossAttention(144, 2)
    module.load_state_dict(weights(case))
    lengths = [2, 3, 4]
    assert relative_error(module(case["in.x"], case["in.cond"], lengths), case["out.y"]) < 2e-5
    parts = case["in.cond"][0].split(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=1e3)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    assert relative_error(module(case["in.x"], padded, mask), case["out.y"]) < 2e-5


def test_cross_attention_without_text_gives_the_bias() -> None:
    torch.manual_seed(0)
    module = layers.MultiHeadCrossAttention(8, 2)
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        x, text = torch.randn(2, 3, 8, dtype=dtype), torch.randn(2, 4, 8, dtype=dtype)
        out = module(x, text, torch.tensor([[True] * 4, [False] * 4]))
        torch.testing.assert_close(out[1], module.proj.bias.expand(3, 8))


def test_packed_text_must_add_up() -> None:
    with pytest.raises(UsageError, match=r"must be \[1, 5, C\].*got \[1, 4, 8\]"):
        layers.pack_text(torch.zeros(1, 4, 8), [2, 3])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UsageError, match="10 is not a multiple of 3"):
        layers.Attention(10, 3)


def test_caption_embedder_matches_recorded() -> None:
    case = golden("caption_embedder")
    module = layers.CaptionEmbedder(16, 144, 0.1, 6)
    module.load_state_dict(weights(case))
    caption, forced = case["in.caption"], case["in.force_drop_ids"]
    assert torch.equal(module.drop(caption, forced), case["out.dropped"])
    assert relative_error(module(caption), case["out.y_eval"]) < 2e-5
    assert relative_error(module(caption, force_drop_ids=forced), case["out.y_forced"]) < 2e-5


def test_caption_embedder_drops_with_its_probability() -> None:
    torch.manual_seed(0)
    module = layers.CaptionEmbedder(2, 4, 0.25, 3)
    dropped = (module.drop(torch.zeros(4000, 1, 3, 2)) != 0).all(dim=(1, 2, 3))
    assert 0.22 < dropped.float().mean() < 0.28


def test_caption_that_may_be_dropped_has_the_null_length() -> None:
    module = layers.CaptionEmbedder(2, 4, 0.25, 3)
    module(torch.zeros(1, 1, 2, 2))
    with pytest.raises(UsageError, match=r"\[B, 1, 3, 2\], got \[1, 1, 2, 2\]"):
        module(torch.zeros(1, 1, 2, 2), train=True)


def test_timestep_embedder_matches_recorded() -> None:
    case = golden("timestep_embedder")
    t = case["in.t"]
    # One rounding step of a frequency would show: up to 6e-5 at t = 1000.
    assert (layers.timestep_embedding(t, 256) - case["out.freq"]).abs().max() < 1e-6
    assert (layers.timestep_embedding(t, 7) - case["out.freq_odd"]).abs().max() < 1e-6
    module = layers.TimestepEmbedder(144)
    module.load_state_dict(weights(case))
    assert relative_error(module(t), case["out.y"]) < 2e-5


def test_size_embedder_matches_recorded() -> None:
    case = golden("size_embedder")
    module = layers.SizeEmbedder(48)
    module.load_state_dict(weights(case))
    assert relative_error(module(case["in.s1"], 2), case["out.y_1d"]) < 2e-5
    assert relative_error(module(case["in.s2"], 2), case["out.y_bs2"]) < 2e-5
    assert relative_error(module(case["in.s2"], 4), case["out.y_bs4"]) < 2e-5
    with pytest.raises(UsageError, match="2 rows cannot be tiled over a batch of 3"):
        module(case["in.s2"], 3)


def test_position_embedding_matches_recorded() -> None:
    with safe_open(GOLDEN / "pos_embed_2d.safetensors", "pt") as file:
        calls = json.loads(file.metadata()["calls"])
        wanted = [file.get_tensor(f"out.pe{i}") for i in range(len(calls))]
    module = layers.PositionEmbedding2D(144)
    for call, table in zip(calls, wanted, strict=True):
        for scale in (call["scale"], torch.tensor(call["scale"], dtype=torch.float64)):
            codes = module(torch.zeros(1), call["h"], call["w"], scale, call["base_size"])
            assert relative_error(codes, table) < 1e-6


def test_final_layer_modulates_given_frames_twice() -> None:
    case = golden("t2i_final_xmask")
    module = layers.T2IFinalLayer(144, 4, 8)
    module.load_state_dict(weights(case))
    out = module(case["in.x"], case["in.t"], case["in.x_mask"], case["in.t0"])
    assert relative_error(out, case["out.y"]) < 2e-5
    once = module(case["in.x"], case["in.t0"])
    given = ~case["in.x_mask"].repeat_interleave(4, dim=1)
    assert relative_error(once[given], case["out.y"][given]) > 0.1


def test_modulations_match_recorded() -> None:
    case = golden("t2i_modulate_ln")
    x, shift, scale = case["in.x"], case["in.shift"], case["in.scale"]
    rows = shift[:, 0], scale[:, 0]

    def all_forms(dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        a, b, c = x.to(dtype), shift.to(dtype), scale.to(dtype)
        normed = F.layer_norm(a, (144,), eps=1e-6)
        return [
            ("y", layers.t2i_modulate(normed, b, c)),
            ("y", layers.layernorm_modulate(a, b[:, 0], c[:, 0])),
            ("y_modulate", layers.modulate(a, b[:, 0], c[:, 0])),
        ]

    for name, value in all_forms(torch.float32):
        assert relative_error(value, case[f"out.{name}"]) < 2e-6
    a, b, c = (t.bfloat16().double() for t in (x, *rows))
    truth = layers.t2i_modulate(F.layer_norm(a, (144,), eps=1e-6), b[:, None], c[:, None])
    for name, value in all_forms(torch.bfloat16):
        # as exact as the recorded bfloat16 run, within a factor of two
        recorded = (case[f"out.{name}_bf16"].double() - truth).abs().max()
        assert (value.double() - truth).abs().max() <= 2 * recorded


def test_patches_are_padded_at_the_end_and_ordered_frames_first() -> None:
    torch.manual_seed(0)
    module = layers.PatchEmbed3D((2, 2, 2), 3, 8)
    x = torch.randn(1, 3, 3, 5, 4)
    whole = torch.zeros(1, 3, 4, 6, 4)
    whole[:, :, :3, :5] = x
    tokens = module(x)
    assert tokens.shape == (1, 2 * 3 * 2, 8)
    patch = whole[:, :, 2:, 2:4, :2]  # frame 1, row 1, column 0
    wanted = F.linear(patch.flatten(1), module.proj.weight.flatten(1), module.proj.bias)
    torch.testing.assert_close(tokens[:, 1 * 6 + 1 * 2 + 0], wanted)
