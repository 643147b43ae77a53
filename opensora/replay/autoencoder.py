"""Replay the temporal VAE and the whole video VAE.

Inputs are `in.x<T>`, one for every length T; outputs end in the same `<T>`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from opensora.models.vae import (
    AutoencoderKLConfig,
    VAETemporal,
    VAETemporalConfig,
    VideoAutoencoder,
    VideoAutoencoderConfig,
)
from opensora.replay.modules import Outputs
from opensora.replay.recording import Case, Mismatch

#: What the original's constructor defaults to, unlike the published model.
_TEMPORAL_DEFAULTS = {"temporal_downsample": [True, True, False]}


def is_temporal(case: Case) -> bool:
    """Whether the case is a run of the temporal VAE, by its class or else by its parameters."""
    if case.class_name:
        return case.class_name in ("VAE_Temporal", "VAE_Temporal_SD")
    return "sd.encoder.block_res_blocks.0.0.conv1.conv.weight" in case.tensors


def is_video(case: Case) -> bool:
    """Whether the case is a run of the video VAE, by its class or else by its configs."""
    if case.class_name:
        return case.class_name == "VideoAutoencoderPipeline"
    return {"kl_config", "temporal_config"} <= case.metadata.keys()


def _temporal_config(case: Case, key: str) -> VAETemporalConfig:
    config = case.config(key)
    if case.class_name != "VAE_Temporal_SD":
        config = {**_TEMPORAL_DEFAULTS, **config}
    return VAETemporalConfig.from_dict(config)


def _lengths(case: Case) -> list[str]:
    """Return the numbers that inputs `in.x<number>` are labelled with, in rising order."""
    labels = [m[1] for m in (re.fullmatch(r"x(\d+)", n) for n in case.names("in.")) if m]
    if not labels:
        raise Mismatch("no input in.x<number of frames>")
    return sorted(labels, key=int)


def _check_sizes(ours: dict[str, list[int | None]], recorded: Any) -> None:
    wrong = [key for key, size in recorded.items() if ours[key] != size]
    if wrong:
        key = wrong[0]
        raise Mismatch(f"latent size of {key} frames: recorded {recorded[key]}, ours {ours[key]}")


@torch.no_grad()
def run_temporal(case: Case) -> Outputs:
    """Return moments, mean, logvar and kl of every input, and rec = decode(mean)."""
    vae = VAETemporal(_temporal_config(case, "config")).to(case.dtype)
    vae.load_state_dict(case.weights(), strict=True)
    found: Outputs = {}
    label = ""

    def keep(_module: Any, _args: Any, output: Tensor) -> None:
        found[f"out.moments{label}"] = output

    vae.quant_conv.register_forward_hook(keep)
    height = width = 0
    for label in _lengths(case):  # the hook reads it
        x = case.input(f"x{label}")
        height, width = x.shape[3:]
        posterior = vae.encode(x)
        found[f"out.mean{label}"] = posterior.mean
        found[f"out.logvar{label}"] = posterior.logvar
        found[f"out.kl{label}"] = posterior.kl()
        found[f"out.rec{label}"] = vae.decode(posterior.mean, x.shape[2])
    recorded = case.read("latent_size", {})
    sizes: dict[str, list[int | None]] = {
        key: [vae.latent_frames(int(key)), height, width] for key in recorded
    }
    _check_sizes(sizes, recorded)
    return found


@torch.no_grad()
def run_video(case: Case) -> Outputs:
    """Return what encoding and decoding give: `zero.` with posterior means, `noise.` with the
    recorded noise. With `cal_loss`, what `forward` gives, on raw latents.
    """
    vae = _video(case)
    found: Outputs = {}
    modes = {name.split(".")[0] for name in case.names("out.")}
    for label in _lengths(case):
        x = case.input(f"x{label}")
        for mode in sorted(modes & {"zero", "noise"}):
            noise = _noise(case, label) if mode == "noise" else None
            parts = _parts(vae, x, noise)
            for name, value in parts.items():
                found[f"out.{mode}.{name}{label}"] = value
            _use_last_posterior(case, found, f"out.{mode}.post_", label)
    height, width = x.shape[3:]
    recorded = case.read("latent_size", {})
    sizes = {key: list(vae.get_latent_size((int(key), height, width))) for key in recorded}
    _check_sizes(sizes, recorded)
    return found


def _video(case: Case) -> VideoAutoencoder:
    def numbers(key: str, default: float) -> float | tuple[float, ...]:
        value = case.read(key, default)
        return tuple(value) if isinstance(value, list) else value

    vae = VideoAutoencoder(
        VideoAutoencoderConfig(
            AutoencoderKLConfig.from_dict(case.config("kl_config")),
            _temporal_config(case, "temporal_config"),
            shift=numbers("shift", 0.0),
            scale=numbers("scale", 1.0),
            micro_frame_size=case.read("micro_frame_size"),
            micro_batch_size=case.read("micro_batch_size"),
            cal_loss=bool(case.read("cal_loss", False)),
        )
    ).to(case.dtype)
    vae.load_state_dict(case.weights(), strict=True)
    return vae


def _noise(case: Case, label: str) -> list[Tensor]:
    """Return the noise of one run in the order of its draws: micro batches, then chunks."""
    tensors: list[Tensor] = []
    for kind in ("spatial", "temporal"):
        start = f"noise_{kind}{label}."
        numbers = [n.removeprefix(start) for n in case.names("in.") if n.startswith(start)]
        tensors += [case.input(start + number) for number in sorted(numbers, key=int)]
    return tensors


def _parts(vae: VideoAutoencoder, x: Tensor, noise: list[Tensor] | None) -> Outputs:
    """Return everything that a run can have recorded, by its name."""
    sample = noise is not None
    whole = vae(x, sample=sample, noise=noise)
    if vae.config.cal_loss:
        return {
            "x_rec": whole.x_rec,
            "x_z_rec": whole.x_z_rec,
            "z": whole.z,
            "x_z": whole.x_z,
            "post_mean": whole.posterior.mean,
            "post_logvar": whole.posterior.logvar,
        }
    z = vae.encode(x, sample=sample, noise=noise)
    return {"z": z, "rec": vae.decode(z, x.shape[2]), "x_z": whole.x_z}


def _use_last_posterior(case: Case, found: Outputs, start: str, label: str) -> None:
    """Cut our posterior to its end where the original returned that of the last chunk only."""
    for name in (f"{start}mean{label}", f"{start}logvar{label}"):
        if name in found and name in case.tensors:
            frames = case.tensors[name].shape[2]
            if frames < found[name].shape[2]:
                found[name] = found[name][:, :, -frames:]
                case.notes.add("posterior of the last chunk compared, all that the original keeps")
