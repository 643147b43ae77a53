"""Replay parts of training: averages of weights, warm-up, clipping, the VAE's losses and judges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from opensora.models.vae import Posterior
from opensora.models.vae.discriminator import KINDS, build_discriminator
from opensora.models.vae.losses import (
    DiscriminatorKind,
    GeneratorKind,
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    kl_loss,
    reconstruction_loss,
)
from opensora.replay.judging import TOLERANCE
from opensora.replay.modules import Outputs
from opensora.replay.recording import Case, Mismatch, Unsupported
from opensora.replay.tables import Entry, Table, only, rows
from opensora.training.clip import PlanClip, gradient_norm
from opensora.training.ema import EMA
from opensora.training.schedule import learning_rate_factor

# --- averages of weights --------------------------------------------------------------------


def is_average(case: Case) -> bool:
    """Whether all inputs are weights `in.model.<name>` and their averages `in.ema.<name>`."""
    inputs = case.names("in.")
    return {name.partition(".")[0] for name in inputs} == {"ema", "model"}


def run_average(case: Case) -> Outputs:
    """Update the averages once with the metadata's decay.

    A name says what a tensor is: frozen if a part of it begins with "frozen", a buffer if one
    begins with "buf" or "running_", as integers are. Of what is not averaged the given average
    comes back.
    """
    decay = _number(case, "decay")
    inputs = case.names("in.")
    names = [n.removeprefix("model.") for n in inputs if n.startswith("model.")]
    module = nn.Module()
    for name in names:
        _place(module, name, case.input(f"model.{name}").clone())
    ema = EMA(module, decay, warm_up=False, trained_only=True)
    given = {n.removeprefix("ema."): case.given(n) for n in inputs if n.startswith("ema.")}
    shapes = {name: case.given(f"model.{name}").shape for name in names}
    if shapes != {name: average.shape for name, average in given.items()}:
        raise Mismatch("the averages have not the names and shapes of the weights")
    ema.load_state_dict({"updates": 0, "averages": {name: given[name] for name in ema.state}})
    ema.update()
    return {f"out.{name}": ema.state.get(name, average) for name, average in given.items()}


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor a parameter or buffer under its dotted name."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    parts = [*parents, last]
    named = any(part.startswith(("buf", "running_")) for part in parts)
    if named or not value.is_floating_point():
        module.register_buffer(last, value)
    else:
        trained = not any(part.startswith("frozen") for part in parts)
        module.register_parameter(last, nn.Parameter(value, requires_grad=trained))


# --- discriminators -------------------------------------------------------------------------


def is_discriminator(case: Case) -> bool:
    """Whether the case is a PatchGAN, by its class or else by its parameters."""
    if case.class_name:
        return case.class_name in KINDS
    names = case.names("sd.")
    return "main.0.weight" in names and all(re.fullmatch(r"main\.\d+\.\w+", n) for n in names)


def run_discriminator(case: Case) -> Outputs:
    """Return logits `eval` and `train`, and the first norm's buffers after it: `<buffer>_after`."""
    weights, config = case.weights(), case.config()
    if config.get("use_actnorm"):
        raise Unsupported("a discriminator with use_actnorm")
    dims = weights["main.0.weight"].ndim - 2
    kind = next((name for name, number in KINDS.items() if number == dims), f"of {dims} dims")
    # The file of `from_pretrained` is what the recorded weights replace.
    sizes = {k: v for k, v in config.items() if k not in ("type", "from_pretrained", "use_actnorm")}
    network = build_discriminator({**sizes, "type": kind}).to(case.dtype)
    network.load_state_dict(weights, strict=True)
    x = case.input("x")
    with torch.no_grad():
        found = {"out.eval": network.eval()(x)}
        if case.names("out.") == ["eval"]:
            return found
        found["out.train"] = network.train()(x)
    norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d))
    return found | {f"out.{name}_after": buffer for name, buffer in norm.named_buffers()}


# --- losses of the VAE ----------------------------------------------------------------------


def is_vae_losses(case: Case) -> bool:
    """Whether the case holds a video with its reconstruction, or logits of both."""
    pairs = ({"in.video", "in.recon"}, {"in.real_logits", "in.fake_logits"})
    return any(pair <= case.tensors.keys() for pair in pairs)


def run_vae_losses(case: Case) -> Outputs:
    """Compute the losses that the inputs suffice for.

    Weights of the terms are metadata, or numbers behind their names in the note.
    """
    found: Outputs = {}
    if "in.video" in case.tensors:
        logvar = _number(case, "logvar_init", 0.0)
        loss = reconstruction_loss(case.input("video"), case.input("recon"), logvar=logvar)
        found |= {"out.nll": loss, "out.weighted_nll": loss}
    if "in.moments" in case.tensors:
        kl = kl_loss(Posterior.from_moments(case.input("moments")))
        found["out.weighted_kl"] = _number(case, "kl_loss_weight", 1e-6) * kl
    if "in.last_layer" in case.tensors:
        found |= _adversarial(case)
    if "in.real_logits" in case.tensors:
        real, fake = case.input("real_logits"), case.input("fake_logits")
        for kind in get_args(DiscriminatorKind):
            found[f"out.disc_{kind}"] = discriminator_loss(real, fake, kind)
            if f"out.lecam_{kind}" in case.tensors:
                found[f"out.lecam_{kind}"] = _lecam(case, kind, real, fake)
    return found | _lecam_averages(case)


@torch.enable_grad()
def _adversarial(case: Case) -> Outputs:
    """Weigh the loss of the logits last @ Bm against the reconstruction loss sum((last @ A)^2)."""
    last = case.input("last_layer").clone().requires_grad_()
    nll = (last @ case.input("A")).square().sum()
    found: Outputs = {}
    for kind in get_args(GeneratorKind):
        loss = generator_loss(last @ case.input("Bm"), kind)
        weight = _number(case, "generator_factor", 0.5) * adaptive_weight(nll, loss, last)
        found |= {f"out.adv_dweight_{kind}": weight, f"out.adv_{kind}": weight * loss.detach()}
    return found


def _lecam(case: Case, kind: str, real: Tensor, fake: Tensor) -> Tensor:
    if kind != "hinge":
        return torch.zeros(())  # LeCam goes with the hinge loss alone, here as in the original
    lecam = LeCam()
    averages = {name: torch.tensor(_number(case, f"ema {name}")) for name in ("real", "fake")}
    lecam.load_state_dict(averages)
    term: Tensor = _number(case, "weight") * lecam(real, fake)
    return term


def _lecam_averages(case: Case) -> Outputs:
    """Update averages from 0 with the note's pairs "(real, fake)"."""
    note = case.metadata.get("note", "")
    pairs = re.findall(rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)", note.partition("updates")[2])
    if not pairs:
        return {}
    lecam = LeCam(_number(case, "decay", 0.999))
    for real, fake in pairs:
        lecam.update(float(real), float(fake))
    return {"out.lecam_ema_real": lecam.real, "out.lecam_ema_fake": lecam.fake}


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"


def _number(case: Case, name: str, default: float | None = None) -> float:
    """Return a number from the metadata, or else from behind its name in the note.

    Raises:
        Mismatch: it is in neither and there is no default, or it is no number.
    """
    value = case.read(name)
    if value is None:
        note = case.metadata.get("note", "")
        behind = re.search(rf"\b{re.escape(name)}\s*[=:]?\s*({_NUMBER})", note)
        value = float(behind[1]) if behind else default
    if value is None:
        raise Mismatch(f"neither metadata nor note say the number {name}")
    if not isinstance(value, int | float):
        raise Mismatch(f"{name} is no number: {str(value)[:60]!r}")
    return float(value)


# --- tables ---------------------------------------------------------------------------------


def _warmups(content: Any) -> Iterator[Entry]:
    for row in content:
        warmup, base, rates = row["warmup_steps"], row["base_lr"], row["lrs"]
        for step, rate in enumerate(rates):
            ours = partial(_rate, base, step, len(rates), warmup)
            yield Entry(f"step {step} of a warm-up of {warmup}", ours, rate)


def _rate(base: float, step: int, total: int, warmup: int) -> float:
    return base * learning_rate_factor(step, total, warmup, 0.0)


def _is_clipping(content: Any) -> bool:
    return isinstance(content, dict) and rows("grad_norm", "returned")(content.get("rows"))


def _clippings(content: Any) -> Iterator[Entry]:
    """Clip step by step as Open-Sora Plan 1.5; recorded in float32."""
    only(("decay", "rows"), content)
    clip = PlanClip(1.0, decay=content["decay"])
    for step, row in enumerate(content["rows"]):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([float(row["grad_norm"])])
        result = clip([parameter])
        ours = {
            "returned": gradient_norm([parameter]),
            "ema": clip.mean,
            "ema_var": clip.variance,
            # The first step is never clipped, whatever the threshold that it sets.
            "threshold": result.limit if step else clip.mean,
            "clip_coef": result.before / result.after if result.after else 1.0,
            "extreme": int(result.extreme),
        }
        only({"grad_norm", *ours}, row)
        for name in (name for name in ours if name in row):
            within = 0.0 if name == "extreme" else TOLERANCE * _largest(content["rows"], name)
            yield Entry(
                f"step {step} {name}", partial(ours.__getitem__, name), row[name], within=within
            )


def _largest(trace: Any, name: str) -> float:
    """Return the largest finite magnitude in a column."""
    values = [abs(float(row[name])) for row in trace if name in row]
    return max((value for value in values if math.isfinite(value)), default=0.0)


TABLES = {
    "learning-rate warm-up": Table(rows("warmup_steps", "base_lr", "lrs"), _warmups),
    "gradient clipping": Table(_is_clipping, _clippings),
}
