"""Replay the rectified flow: mixing, loss, sampling, drawn timesteps and their transform.

Losses and samples were recorded with a toy denoiser (`toy_model.py`).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from opensora.replay.modules import Outputs
from opensora.replay.recording import Case, Mismatch, Unsupported
from opensora.replay.toy_model import toy_model
from opensora.schedulers import RFlow
from opensora.schedulers.timesteps import timestep_transform


class _Recorder:
    """Call the toy model and keep what it was given."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []
        self.x_mask: list[Tensor | None] = []

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        self.x.append(x)
        self.t.append(t)
        self.x_mask.append(kwargs.get("x_mask"))
        return toy_model(x, t, **kwargs)


def _scheduler(case: Case) -> RFlow:
    return RFlow.from_dict(case.config("scheduler"))


def is_add_noise(case: Case) -> bool:
    return case.names("in.") == ["noise", "t", "x"] and case.names("out.") == ["y"]


def run_add_noise(case: Case) -> Outputs:
    x, noise = case.input("x"), case.input("noise")
    return {"out.y": _scheduler(case).add_noise(x, noise, case.given("t"))}


def is_loss(case: Case) -> bool:
    return {"in.x_start", "in.noise", "in.t", "in.y", "out.loss"} <= case.tensors.keys() and not (
        {"out.vb", "out.mse"} & case.tensors.keys()
    )


def run_loss(case: Case) -> Outputs:
    model = _Recorder()
    loss = _scheduler(case).training_losses(
        model,
        case.input("x_start"),
        {"y": case.input("y")},
        t=case.given("t"),
        noise=case.input("noise"),
        mask=case.optional("mask"),
    )["loss"]
    return {"out.loss": loss, "out.x_t": model.x[0]}


def is_sample(case: Case) -> bool:
    scheduler = case.read("scheduler")
    return (
        isinstance(scheduler, dict)
        and scheduler.get("type") == "rflow"
        and {"in.z", "in.y_cond", "in.y_null"} <= case.tensors.keys()
    )


def run_sample(case: Case) -> Outputs:
    """Sample with the recorded noise; also return what the model saw at every step."""
    scheduler, model = _scheduler(case), _Recorder()
    size = case.read("h_w_frames")
    conditions: dict[str, Tensor] = {}
    if size is not None:
        for name, value in zip(("height", "width", "num_frames"), size, strict=True):
            rounded = torch.tensor(value, dtype=case.rounding or case.dtype)
            conditions[name] = rounded.to(case.dtype).reshape(-1)
        if scheduler.use_timestep_transform and 2 <= conditions["num_frames"][0] <= 16:
            raise Unsupported(
                "the original cannot sample 2 to 16 frames (its timesteps are 0 and NaN); here "
                "they get timesteps that work"
            )
    z, mask = case.input("z"), case.optional("mask")
    result = scheduler.sample(
        model,
        z,
        y=case.input("y_cond"),
        y_null=case.input("y_null"),
        model_kwargs=conditions,
        mask=None if mask is None else mask.float(),
        noise=case.optional("noise"),
    )
    steps = case.read("traj_steps", range(len(model.x)))
    # With guidance 1 the conditional half runs alone here; the original runs both halves.
    t = [t if len(t) == 2 * len(z) else t.repeat(2) for t in model.t]
    everywhere = torch.ones(2 * len(z), z.shape[2], dtype=torch.bool)
    masks = [
        everywhere if m is None else m if len(m) == len(t[0]) else m.repeat(2, 1)
        for m in model.x_mask
    ]
    return {
        "out.z": result,
        "out.timesteps": torch.stack(t),
        "out.traj_model_in": torch.stack([model.x[step][: len(z)] for step in steps]),
        "out.x_mask": torch.stack(masks),
    }


def is_drawn_timesteps(case: Case) -> bool:
    return "manual_seed" in case.metadata and not case.names("in.") and not case.names("sd.")


def run_drawn_timesteps(case: Case) -> Outputs:
    """Draw the training timesteps of every output after seeding the global generator.

    An output is named after the settings it was drawn with: uniform, logit, discrete, tt (the
    timestep transform), loc<n>, s<n> (width of the normal), scale<n> (of the transform); s05 is
    0.5. The note gives height/width/frames, the tensors their number.
    """
    note = case.metadata.get("note", "")
    size = re.search(r"=\s*(\d+)/(\d+)/(\d+)", note)
    found = {}
    for name in case.names("out."):
        batch = case.tensors[f"out.{name}"].shape[0]
        conditions = {"y": torch.zeros(batch, 1, 1, 1)}
        if size is not None:
            for key, value in zip(("height", "width", "num_frames"), size.groups(), strict=True):
                conditions[key] = torch.full((batch,), float(value))
        model = _Recorder()
        scheduler = RFlow.from_dict(_draw_settings(name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(case.read("manual_seed")))
            scheduler.training_losses(model, torch.zeros(batch, 1, 1, 1, 1), conditions)
        found[f"out.{name}"] = model.t[0]
    return found


def _draw_settings(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    words: dict[str, dict[str, Any]] = {
        "uniform": {"sample_method": "uniform"},
        "logit": {"sample_method": "logit-normal"},
        "discrete": {"use_discrete_timesteps": True},
        "tt": {"use_timestep_transform": True},
    }
    numbers = {"loc": "loc", "s": "scale", "scale": "transform_scale"}
    for word in name.split("_"):
        match = re.fullmatch(r"(loc|scale|s)(-?[\d.]+)", word)
        if word in words:
            settings |= words[word]
        elif match:
            text = match[2]
            decimal = text.startswith("0") and "." not in text
            settings[numbers[match[1]]] = float(f"0.{text[1:] or 0}" if decimal else text)
        else:
            raise Mismatch(f"out.{name}: cannot tell the settings it was drawn with from {word!r}")
    return settings


def is_timestep_transform(case: Case) -> bool:
    return "rows_h_w_frames" in case.metadata and case.names("in.") == ["t"]


def run_timestep_transform(case: Case) -> Outputs:
    """Transform `in.t` for every row of sizes, in every precision that the outputs name.

    The original's NaN are stored as -1 beside a mask; `short_clips=False` keeps its numbers for 2
    to 16 frames. `scale<s>_<h>x<w>x<frames>` is one row with another scale.
    """
    t, rows = case.given("t"), case.read("rows_h_w_frames")
    found: Outputs = {}
    for name in case.names("out."):
        single = re.fullmatch(r"scale([\d.]+)_(\d+)x(\d+)x(\d+)", name)
        if single:
            sizes = [torch.tensor([float(value)]) for value in single.groups()[1:]]
            found[f"out.{name}"] = timestep_transform(t, *sizes, scale=float(single[1]))
            continue
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            continue
        table = torch.stack(
            [
                timestep_transform(
                    t, *(torch.tensor([float(v)], dtype=dtype) for v in row), short_clips=False
                )
                for row in rows
            ]
        )
        found[f"out.nan_{name}"] = table.isnan()
        found[f"out.{name}"] = table.nan_to_num(nan=-1.0)
    return found
