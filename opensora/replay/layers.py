"""Replay single layers that were recorded with their class, config and call.

Constructor arguments have the original's names and defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from opensora import nn as layers
from opensora.models.stdit.block import STDiT3Block
from opensora.models.vae import CausalConv3d
from opensora.replay.modules import Outputs, run_module
from opensora.replay.recording import Case, Mismatch, Unsupported, split_precision

Arguments = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Describe how a class of the original is built and called here.

    Attributes:
        signature: the parameters of its `forward`, in order.
        build: makes our module from the recorded config.
        call: calls it with the recorded arguments and config.
        as_given: arguments that the layer takes in any precision and reads as float32.
    """

    signature: tuple[str, ...]
    build: Callable[[Arguments], nn.Module]
    call: Callable[[Any, Arguments, Arguments], Tensor] = lambda module, a, _config: module(a["x"])
    as_given: tuple[str, ...] = ()


def is_layer(case: Case) -> bool:
    """Whether the case names the class of a single layer that is here."""
    return case.class_name in LAYERS


def run_layer(case: Case) -> Outputs:
    """Build the layer from `config`; call it with `args`, `kwargs` and the inputs left over."""
    layer, config = LAYERS[case.class_name], case.config()
    if case.metadata.get("version", "v1.2").startswith(("v1.0", "v1.1")):
        config.setdefault("qk_norm_legacy", True)  # the only order that those releases have
    module = layer.build(config)
    positional = case.read("args") or case.read("call") or []
    if len(positional) > len(layer.signature):
        raise Mismatch(f"{len(positional)} arguments for {case.class_name}{layer.signature}")
    by_position = dict(zip(positional, layer.signature, strict=False))
    names = {name: by_position.get(name, name) for name in case.names("in.") if name != "loss_w"}
    plain = {split_precision(name)[0] for name in case.names("out.")}
    outputs = sorted(n for n in plain if n != "loss" and not n.startswith("mid."))
    if len(outputs) != 1:
        raise Mismatch(f"expected one output of {case.class_name}, found {', '.join(outputs)}")

    def forward(leaves: Mapping[str, Tensor]) -> Tensor:
        arguments = dict(case.read("kwargs") or {})
        for stored, name in names.items():
            given = case.given(stored) if name in layer.as_given else case.input(stored)
            arguments[name] = leaves.get(stored, given)
        unknown = set(arguments) - set(layer.signature)
        if unknown:
            raise Mismatch(f"{case.class_name} takes no {', '.join(sorted(unknown))}")
        return layer.call(module, arguments, config)

    return run_module(case, module, forward, f"out.{outputs[0]}")


def _rotary(head_dim: int, frames: int, like: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the rotary table in the precision of a module's weights."""
    dtype = next(like.parameters()).dtype
    return layers.RotaryEmbedding(head_dim).to(dtype).table(frames)


def _attention(config: Arguments) -> nn.Module:
    return layers.Attention(
        config["dim"],
        config.get("num_heads", 8),
        qkv_bias=config.get("qkv_bias", False),
        qk_norm=config.get("qk_norm", False),
        qk_norm_legacy=config.get("qk_norm_legacy", False),
    )


def _call_attention(module: layers.Attention, a: Arguments, config: Arguments) -> Tensor:
    x = a["x"]
    table = _rotary(module.head_dim, x.shape[1], module) if config.get("rope") else None
    result: Tensor = module(x, table)
    return result


def _call_cross_attention(
    module: layers.MultiHeadCrossAttention, a: Arguments, _config: Arguments
) -> Tensor:
    x, cond, mask = a["x"], a["cond"], a.get("mask")
    if mask is not None:
        lengths = mask.tolist() if isinstance(mask, Tensor) else mask
        result: Tensor = module(x, cond, [int(n) for n in lengths])
        return result
    # Without lengths the original sees one text and one row of queries, whatever the batch.
    whole: Tensor = module(x.flatten(0, 1)[None], cond.flatten(0, 1)[None])
    return whole.view(x.shape)


def _call_final_layer(module: layers.T2IFinalLayer, a: Arguments, _config: Arguments) -> Tensor:
    x, x_mask = a["x"], a.get("x_mask")
    frames = a.get("T") if x_mask is None else x_mask.shape[1]
    if frames is not None and frames * a.get("S", x.shape[1] // frames) != x.shape[1]:
        raise Mismatch(f"{x.shape[1]} tokens are not {frames} frames of {a.get('S')}")
    result: Tensor = module(x, a["t"], x_mask, a.get("t0"))
    return result


def _block(config: Arguments) -> nn.Module:
    return STDiT3Block(
        config["hidden_size"],
        config["num_heads"],
        config.get("mlp_ratio", 4.0),
        temporal=config.get("temporal", False),
        qk_norm=config.get("qk_norm", False),
        drop_path=config.get("drop_path", 0.0),
    )


def _call_block(module: STDiT3Block, a: Arguments, config: Arguments) -> Tensor:
    x, mask, frames = a["x"], a.get("mask"), int(a["T"])
    if mask is not None:
        lengths = mask.tolist() if isinstance(mask, Tensor) else mask
        mask = [int(n) for n in lengths]
    elif x.shape[0] != 1:
        raise Unsupported("a block whose samples attend to the text of the whole batch")
    rotary = _rotary(module.attn.head_dim, frames, module) if config.get("rope") else None
    x_mask = a.get("x_mask")
    modulation = module.modulation(a["t"], x_mask, None if x_mask is None else a.get("t0"))
    result: Tensor = module(x, layers.pack_text(a["y"], mask), modulation, frames, rotary=rotary)[0]
    return result


def _mlp(config: Arguments) -> nn.Module:
    width = config["in_features"]
    if config.get("out_features", width) != width:
        raise Unsupported("an Mlp whose output is not as wide as its input")
    return layers.Mlp(width, config.get("hidden_features", width))


def _causal_conv(config: Arguments) -> nn.Module:
    kernel, strides = config["kernel_size"], config.get("strides")
    return CausalConv3d(
        config["chan_in"],
        config["chan_out"],
        kernel if isinstance(kernel, int) else tuple(kernel),
        strides=tuple(strides) if strides else (config.get("stride", 1), 1, 1),
        dilation=config.get("dilation", 1),
        bias=config.get("bias", True),
    )


def _embedder(kind: type[layers.TimestepEmbedder]) -> Callable[[Arguments], nn.Module]:
    return lambda config: kind(config["hidden_size"], config.get("frequency_embedding_size", 256))


#: Name of a class of Open-Sora 1.2 -> how it is built and called here.
LAYERS = {
    "Attention": Layer(("x",), _attention, _call_attention),
    "MultiHeadCrossAttention": Layer(
        ("x", "cond", "mask"),
        lambda c: layers.MultiHeadCrossAttention(c["d_model"], c["num_heads"]),
        _call_cross_attention,
    ),
    "CaptionEmbedder": Layer(
        ("caption", "train", "force_drop_ids"),
        lambda c: layers.CaptionEmbedder(
            c["in_channels"], c["hidden_size"], c["uncond_prob"], c.get("token_num", 120)
        ),
        lambda module, a, _: module(
            a["caption"], train=bool(a.get("train")), force_drop_ids=a.get("force_drop_ids")
        ),
    ),
    "LlamaRMSNorm": Layer(
        ("x",), lambda c: layers.RMSNorm(c["hidden_size"], c.get("eps", layers.EPS))
    ),
    "TimestepEmbedder": Layer(
        ("t",),
        _embedder(layers.TimestepEmbedder),
        lambda module, a, _: module(a["t"]),
        as_given=("t",),
    ),
    "SizeEmbedder": Layer(
        ("s", "bs"),
        _embedder(layers.SizeEmbedder),
        lambda module, a, _: module(a["s"], a.get("bs")),
        as_given=("s",),
    ),
    "PatchEmbed3D": Layer(
        ("x",),
        lambda c: layers.PatchEmbed3D(
            tuple(c.get("patch_size", (2, 4, 4))), c.get("in_chans", 3), c.get("embed_dim", 96)
        ),
    ),
    "Mlp": Layer(("x",), _mlp),
    "T2IFinalLayer": Layer(
        ("x", "t", "x_mask", "t0", "T", "S"),
        lambda c: layers.T2IFinalLayer(c["hidden_size"], c["num_patch"], c["out_channels"]),
        _call_final_layer,
    ),
    "STDiT3Block": Layer(("x", "y", "t", "mask", "x_mask", "t0", "T", "S"), _block, _call_block),
    "CausalConv3d": Layer(("x",), _causal_conv),
}
