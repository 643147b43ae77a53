"""Open the weights of a pipeline's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from opensora.checkpoint import load_model
from opensora.devices import DTYPES, choose_device, choose_dtype
from opensora.errors import UsageError, WeightsError
from opensora.models.stdit import PRESETS, STDiT3, STDiT3Config
from opensora.models.text_encoder import T5TextEncoder
from opensora.models.vae import PRESETS as VAE_PRESETS
from opensora.models.vae import VideoAutoencoder
from opensora.pipeline_folder import PARTS
from opensora.pipeline_options import VAE_KEYS
from opensora.pipeline_parts import Part, PipelineParts
from opensora.schedulers.rflow import RFlow

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline
    from opensora.progress import Progress


def load_parts(
    parts: PipelineParts,
    *,
    dtype: torch.dtype | None = None,
    text_encoder_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Progress,
    pipeline_class: type[OpenSoraPipeline] | None = None,
    **components: Any,
) -> OpenSoraPipeline:
    """Open the weights; see `OpenSoraPipeline.from_pretrained`.

    Raises:
        WeightsError: missing, damaged, or of another model.
    """
    from opensora.pipeline import OpenSoraPipeline

    wrong = [name for name in components if name not in (*PARTS, "scheduler")]
    if wrong:
        raise UsageError(f"unknown part {wrong[0]!r}; parts: {', '.join(PARTS)}, scheduler")
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    made = dict(components)
    if "transformer" not in made:
        part = parts.transformer
        made["transformer"] = load_model(
            STDiT3,
            part.source,
            subfolder=part.subfolder,
            config=model_config(part),
            dtype=dtype,
            device=device,
            progress=progress.stage("loading the transformer", "B"),
        )
    if "vae" not in made:
        made["vae"] = load_vae(parts.vae, dtype, device, progress)
    if "text_encoder" not in made:
        made["text_encoder"] = load_text_encoder(
            parts.text_encoder, text_encoder_dtype, device, progress
        )
    made.setdefault("scheduler", RFlow.from_dict(parts.scheduler))
    sources = {name: str(getattr(parts, name)) for name in PARTS if name not in components}
    return (pipeline_class or OpenSoraPipeline)(**made, defaults=parts.defaults, sources=sources)


def load_vae(
    part: Part, dtype: torch.dtype, device: torch.device, progress: Progress
) -> VideoAutoencoder:
    """Open a VAE; what the configuration says of its micro batches is set."""
    kind = part.options.get("type")
    vae = load_model(
        VideoAutoencoder,
        part.source,
        subfolder=part.subfolder,
        config=None if part.config() is not None else VAE_PRESETS.get(kind or ""),
        dtype=dtype,
        device=device,
        progress=progress.stage("loading the VAE", "B"),
    )
    for key in VAE_KEYS:
        if key in part.options:
            setattr(vae, key, part.options[key])
    return vae


def load_text_encoder(
    part: Part, dtype: torch.dtype | None, device: torch.device, progress: Progress
) -> T5TextEncoder:
    """Open a text encoder, float32 unless the type or the configuration says otherwise."""
    report = progress.stage("loading the text encoder", "model")
    report(0, 1)
    encoder = T5TextEncoder.from_pretrained(
        part.source,
        subfolder=part.options.get("subfolder"),
        max_length=part.options.get("model_max_length"),
        dtype=dtype or DTYPES.get(str(part.options.get("dtype"))),
        device=device,
    )
    report(1, 1)
    return encoder


def model_config(part: Part) -> dict[str, Any] | None:
    """Return the architecture to build; None leaves it to the checkpoint.

    A checkpoint's config.json is overridden by what the configuration says, and must be of the
    type that the configuration names.
    """
    options = dict(part.options)
    preset = PRESETS.get(options.pop("type", "STDiT3"))
    stored = part.config()
    if stored is None:
        return {**preset.to_dict(), **options} if preset else options or None
    if preset is not None:
        found = STDiT3Config.from_dict(stored)
        for key in ("hidden_size", "depth", "num_heads"):
            if getattr(found, key) != getattr(preset, key):
                raise WeightsError(
                    f"{part}: {key} is {getattr(found, key)}, but model.type "
                    f"{part.options['type']} has {getattr(preset, key)}; name the type of these "
                    "weights, or STDiT3 to take theirs"
                )
    return {**stored, **options}
