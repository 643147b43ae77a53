"""Check the model, vae and text_encoder dicts of a configuration and keep what matters here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opensora.config_file import suggest
from opensora.devices import DTYPES
from opensora.errors import UsageError
from opensora.models.stdit import PRESETS, STDiT3Config
from opensora.models.vae import PRESETS as VAE_PRESETS

VAE_KEYS = ("micro_frame_size", "micro_batch_size")
_VAE_IGNORED = ("cal_loss", "force_huggingface", "freeze_vae_2d", "local_files_only", "cache_dir")
_TEXT_KEYS = ("type", "from_pretrained", "model_max_length", "dtype", "subfolder")
_TEXT_IGNORED = ("shardformer", "local_files_only", "cache_dir")


def model_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check the `model` dict: type and architecture, execution switches dropped."""
    options = {key: value for key, value in (given or {}).items() if key != "from_pretrained"}
    kind = options.pop("type", "STDiT3")
    if kind not in (*PRESETS, "STDiT3"):
        raise UsageError(
            f"model.type {kind!r} is not available{suggest(str(kind), PRESETS)} "
            f"(available: {', '.join(PRESETS)})"
        )
    STDiT3Config.from_dict(options)  # refuses unknown keys, by name
    return {"type": kind, **options}


def vae_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the `vae` dict."""
    kind = given.get("type", "VideoAutoencoderPipeline")
    if kind not in (*VAE_PRESETS, "VideoAutoencoderPipeline"):
        raise UsageError(
            f"vae.type {kind!r} is not available{suggest(str(kind), VAE_PRESETS)} "
            f"(available: {', '.join(VAE_PRESETS)})"
        )
    allowed = ("type", "from_pretrained", *VAE_KEYS)
    for key in given:
        if key not in allowed and key not in _VAE_IGNORED:
            raise UsageError(f"vae: unknown key {key!r}{suggest(key, allowed)}")
    for key in VAE_KEYS:
        value = given.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise UsageError(
                f"vae.{key} must be a whole number of at least 1 or None, got {value!r}"
            )
    return {key: given[key] for key in ("type", *VAE_KEYS) if key in given}


def text_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the `text_encoder` dict."""
    if given.get("type", "t5") != "t5":
        raise UsageError(f"text_encoder.type {given['type']!r} is not available; use 't5'")
    for key in given:
        if key not in _TEXT_KEYS and key not in _TEXT_IGNORED:
            raise UsageError(f"text_encoder: unknown key {key!r}{suggest(key, _TEXT_KEYS)}")
    dtype = given.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"text_encoder.dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return {key: given[key] for key in _TEXT_KEYS if key in given and key != "from_pretrained"}
