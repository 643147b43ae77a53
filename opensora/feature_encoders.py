"""Make features of clips and captions, and say by digests what made them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.captions import clean_prompt
from opensora.checkpoint import weights_digest
from opensora.data.batch import Sample
from opensora.errors import NonFiniteError
from opensora.models.text_encoder.locate import locate, weights_in
from opensora.pipeline_loading import load_text_encoder, load_vae
from opensora.pipeline_parts import Part, PipelineParts
from opensora.progress import Progress


@dataclass
class Encoders:
    """Hold what makes features; either may be missing."""

    vae: Any = None
    text_encoder: Any = None
    prepare: Callable[[str], str] = clean_prompt
    distribution: bool = True
    dtype: torch.dtype = torch.float16

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Return the tensors of every sample, on the CPU.

        Raises:
            NonFiniteError: a model gave NaN, or its values do not fit the stored type.
        """
        made: list[dict[str, Tensor]] = [{} for _ in samples]
        if self.vae is not None:
            device = next(self.vae.parameters()).device
            videos = torch.stack([s.video for s in samples if s.video is not None]).to(device)
            if self.distribution:
                mean, std = self.vae.encode_distribution(videos)
                parts = {"mean": mean, "std": std}
            else:
                parts = {"latent": self.vae.encode(videos)}
            for name, values in parts.items():
                for row, value in zip(made, values, strict=True):
                    row[name] = self._stored(value, "the VAE")
        if self.text_encoder is not None:
            states, mask = self.text_encoder.encode([self.prepare(s.text or "") for s in samples])
            for row, state, seen in zip(made, states, mask, strict=True):
                row["text"] = self._stored(state[0, seen != 0], "the text encoder")
        return made

    def _stored(self, value: Tensor, what: str) -> Tensor:
        stored = value.to("cpu", self.dtype)
        if not stored.isfinite().all():
            kind = (
                "NaN or infinity" if not value.isfinite().all() else f"values beyond {self.dtype}"
            )
            raise NonFiniteError(
                f"{what} gave {kind}; use --features-dtype fp32, or another --dtype for the models"
            )
        return stored


def load_encoders(
    parts: PipelineParts,
    *,
    vae: bool,
    text_encoder: bool,
    prepare: Callable[[str], str] = clean_prompt,
    distribution: bool = True,
    stored: torch.dtype = torch.float16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Encoders, dict[str, Any]]:
    """Open the models that are asked for.

    Args:
        parts: where they are.
        vae: encode clips.
        text_encoder: encode captions.
        prepare: caption -> what the text encoder reads.
        distribution: store mean and deviation of latents instead of one draw.
        stored: type of what is stored.
        dtype: of the VAE.
        device: of both.

    Returns:
        The encoders, and the settings that a folder of their features has.

    Raises:
        WeightsError: weights are missing or damaged.
    """
    made = Encoders(prepare=prepare, distribution=distribution, dtype=stored)
    kind = str(stored).removeprefix("torch.")
    settings: dict[str, Any] = {"dtype": kind, "sources": {}, **digests(parts, vae, text_encoder)}
    device, bars = torch.device(device), Progress(False)
    if vae:
        made.vae = load_vae(parts.vae, dtype, device, bars).eval()
        settings["latent"] = "distribution" if distribution else "draw"
        settings["sources"]["vae"] = str(parts.vae)
    if text_encoder:
        made.text_encoder = load_text_encoder(parts.text_encoder, None, device, bars)
        settings["max_length"] = made.text_encoder.max_length
        settings["sources"]["text_encoder"] = str(parts.text_encoder)
    return made, settings


def digests(parts: PipelineParts, vae: bool = True, text_encoder: bool = True) -> dict[str, str]:
    """Return "vae" and "text_encoder" -> digest of the weights, as `CachedFeatures.check` takes it.

    Raises:
        WeightsError: there are no weights.
    """
    found = {}
    if vae:
        found["vae"] = weights_digest(parts.vae.source, parts.vae.subfolder)
    if text_encoder:
        found["text_encoder"] = _text_digest(parts.text_encoder)
    return found


def _text_digest(part: Part) -> str:
    folder = locate(part.source, part.options.get("subfolder"))
    if (weights_in(folder) or "").startswith("model.safetensors"):
        return weights_digest(folder)
    lines = ""
    for file in sorted(folder.glob("pytorch_model*.bin")):  # T5 is published in two of them
        with file.open("rb") as opened:
            lines += f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {file.name}\n"
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
