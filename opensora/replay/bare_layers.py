"""Replay layers that were recorded without the name of their class, several calls to a file.

The names of the tensors say which layer it is and what each output is. Suffixes such as `_bf16`
are cut off before a run, which happens in that precision (see `kinds.py`).
"""

from __future__ import annotations

import re
from typing import Any

import torch

from opensora import nn as layers
from opensora.functional import layernorm_modulate
from opensora.models.vae import CausalConv3d
from opensora.replay.modules import Outputs
from opensora.replay.recording import Case, Mismatch


def is_caption_embedder(case: Case) -> bool:
    return {"sd.y_embedding", "sd.y_proj.fc1.weight", "in.caption"} <= case.tensors.keys()


def run_caption_embedder(case: Case) -> Outputs:
    weights, config = case.weights(), case.config()
    tokens, channels = weights["y_embedding"].shape
    module = layers.CaptionEmbedder(
        channels, weights["y_proj.fc1.weight"].shape[0], config.get("uncond_prob", 0.1), tokens
    )
    module.to(case.dtype).load_state_dict(weights, strict=True)
    caption, forced = case.input("caption"), case.optional("force_drop_ids")
    found = {"out.y_eval": module(caption)}
    if forced is not None:
        found["out.dropped"] = module.drop(caption, forced)
        found["out.y_forced"] = module(caption, force_drop_ids=forced)
    return found


def is_rms_norm(case: Case) -> bool:
    return case.names("sd.") == ["weight"] and case.names("in.") == ["x"]


def run_rms_norm(case: Case) -> Outputs:
    weight = case.weights()["weight"]
    module = layers.RMSNorm(weight.shape[0], case.config().get("eps", layers.EPS))
    module.to(case.dtype).load_state_dict({"weight": weight})
    return {"out.y": module(case.input("x"))}


def is_rotary(case: Case) -> bool:
    return case.names("sd.") == ["freqs"]


def run_rotary(case: Case) -> Outputs:
    """Rotate every input: `in.q` gives `out.y`, any other `in.<name>` gives `out.y_<name>`."""
    freqs = case.weights()["freqs"]
    rope = layers.RotaryEmbedding(2 * freqs.shape[0]).to(case.dtype)
    found = {"out.freqs": rope.freqs.detach().clone()}
    rope.load_state_dict({"freqs": freqs})
    for name in case.names("in."):
        x = case.input(name)
        found["out.y" if name == "q" else f"out.y_{name}"] = layers.rotate(
            x, rope.table(x.shape[-2])
        )
    return found


def _is_embedder(case: Case) -> bool:
    return {"mlp.0.weight", "mlp.2.weight"} <= set(case.names("sd.")) and not case.class_name


def is_timestep_embedder(case: Case) -> bool:
    return _is_embedder(case) and case.names("in.") == ["t"]


def run_timestep_embedder(case: Case) -> Outputs:
    """Return the embedding, and the sinusoids of as many columns as each `freq` output has."""
    weights = case.weights()
    module = layers.TimestepEmbedder(*weights["mlp.0.weight"].shape)
    module.to(case.dtype).load_state_dict(weights, strict=True)
    t = case.given("t")
    found: Outputs = {"out.y": module(t)}
    for name in case.names("out."):
        if name.startswith("freq"):
            columns = case.tensors[f"out.{name}"].shape[-1]
            found[f"out.{name}"] = layers.timestep_embedding(t, columns)
    return found


def is_size_embedder(case: Case) -> bool:
    inputs = case.names("in.")
    return _is_embedder(case) and bool(inputs) and all(n.startswith("s") for n in inputs)


def run_size_embedder(case: Case) -> Outputs:
    """Embed for every output the input that it can come from, tiled to the output's rows.

    A 1-D input has one number a row. If several inputs fit, `1d` in the output's name asks for
    the 1-D one.
    """
    weights = case.weights()
    module = layers.SizeEmbedder(*weights["mlp.0.weight"].shape)
    module.to(case.dtype).load_state_dict(weights, strict=True)
    hidden = weights["mlp.2.weight"].shape[0]
    inputs = [case.given(name) for name in case.names("in.")]
    found = {}
    for name in case.names("out."):
        rows, width = case.tensors[f"out.{name}"].shape
        fits = [
            s
            for s in inputs
            if (1 if s.ndim == 1 else s.shape[1]) * hidden == width and rows % len(s) == 0
        ]
        if len(fits) > 1:
            fits = [s for s in fits if (s.ndim == 1) == ("1d" in name)]
        if len(fits) != 1:
            raise Mismatch(f"out.{name}: cannot tell which input it was computed from")
        found[f"out.{name}"] = module(fits[0], rows)
    return found


def is_modulation(case: Case) -> bool:
    return case.names("in.") == ["scale", "shift", "x"] and not case.names("sd.")


def run_modulation(case: Case) -> Outputs:
    """Normalise and modulate x: `y` as STDiT does, `y_modulate` as DiT does."""
    x = case.input("x")
    shift, scale = (case.input(n).reshape(x.shape[0], x.shape[-1]) for n in ("shift", "scale"))
    return {
        "out.y": layernorm_modulate(x, shift, scale, eps=layers.EPS),
        "out.y_modulate": layers.modulate(x, shift, scale),
    }


def is_position_embedding(case: Case) -> bool:
    calls = case.read("calls")
    return isinstance(calls, list) and all(
        isinstance(call, dict) and {"h", "w"} <= call.keys() for call in calls
    )


def run_position_embedding(case: Case) -> Outputs:
    """Return `out.pe<i>` of call i."""
    module = layers.PositionEmbedding2D(case.config()["dim"])
    like = torch.zeros(1, dtype=case.dtype)
    return {
        f"out.pe{i}": module(
            like, call["h"], call["w"], call.get("scale", 1.0), call.get("base_size")
        )
        for i, call in enumerate(case.read("calls"))
    }


def is_causal_conv(case: Case) -> bool:
    weights = case.names("sd.")
    return bool(weights) and all(re.fullmatch(r"\w+\.conv\.(weight|bias)", n) for n in weights)


def run_causal_conv(case: Case) -> Outputs:
    """Convolve the input with every convolution `sd.<name>.conv`: `out.<name>`.

    Kernels are read from the weights, strides and dilation from the note ("s2: kernel 3, strides
    (2,1,1); ..."); `time_pads` list the padding of the convolutions in the note's order.
    """
    x, notes = case.input("x"), _conv_notes(case.metadata.get("note", ""))
    found: Outputs = {}
    pads: dict[str, int] = {}
    for name in sorted({n.split(".")[0] for n in case.names("sd.")}):
        weights = case.weights(f"{name}.")
        out_channels, in_channels, kt, kh, kw = weights["conv.weight"].shape
        module = CausalConv3d(
            in_channels,
            out_channels,
            (kt, kh, kw),
            bias="conv.bias" in weights,
            **notes.get(name, {}),
        )
        module.to(case.dtype).load_state_dict(weights, strict=True)
        pads[name] = module.time_pad
        found[f"out.{name}"] = module(x)
    recorded = case.read("time_pads")
    if recorded is not None and sorted(notes) == sorted(pads):
        ours = [pads[name] for name in notes]
        if ours != recorded:
            raise Mismatch(f"time padding: recorded {recorded}, ours {ours}")
    return found


def _conv_notes(note: str) -> dict[str, dict[str, Any]]:
    """Return name -> strides and dilation of every "name: ..." of a note, in its order."""
    found: dict[str, dict[str, Any]] = {}
    for part in note.split(";"):
        name, colon, text = part.partition(":")
        if not colon:
            continue
        settings: dict[str, Any] = {}
        strides = re.search(r"strides?\s*\(?\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)", text)
        if strides:
            settings["strides"] = tuple(int(n) for n in strides.groups())
        dilation = re.search(r"dilation\s*\(?\s*(\d+)", text)
        if dilation:
            settings["dilation"] = int(dilation[1])
        found[name.strip()] = settings
    return found
