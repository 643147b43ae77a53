"""Build the video VAE that the `model` entry of a configuration describes, with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoint import load_model, read_config
from opensora.errors import WeightsError
from opensora.models.vae.autoencoder_kl import AutoencoderKL
from opensora.models.vae.temporal import VAETemporal
from opensora.models.vae.video import VideoAutoencoder
from opensora.models.vae.video_config import PRESETS, SPATIAL_SOURCES, VideoAutoencoderConfig

TINY = "tiny"
INDEX = "model_index.json"  # makes a folder a pipeline
#: Where training leaves the finished model, inside its run's folder.
TRAINED = "vae"
_SPATIAL = {
    "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    "subfolder": "vae",
}
_CHUNKS = ("micro_frame_size", "micro_batch_size")


def build_vae(
    model: Mapping[str, Any],
    *,
    source: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[VideoAutoencoder, str]:
    """Build a video VAE and load what its description names.

    With weights of the whole (`from_pretrained`) they and their config.json say how it is built.
    Without, the 2D VAE comes from `vae_2d.from_pretrained`, for a release's type from the 2D VAE
    that the release was trained on; a 2D VAE described by its fields alone, and a temporal one
    without `from_pretrained`, start with random weights from torch's generator.

    Args:
        model: type, from_pretrained, vae_2d, vae_temporal, micro_frame_size, ... as in
            `VideoAutoencoderConfig.from_dict`.
        source: stands in for from_pretrained.
        dtype: of the weights; None keeps each as stored.
        device: where they go.

    Returns:
        (the VAE in eval mode, where its weights come from in words).

    Raises:
        UsageError: an unknown key or type.
        WeightsError: weights are missing, damaged, or of another model.
    """
    source = source or model.get("from_pretrained")
    if source:
        return _load_whole(dict(model), str(source), dtype, device), str(source)
    data = dict(model)
    # As published: a release's type alone starts from the release's 2D VAE.
    spatial = dict(data.get("vae_2d") or (_SPATIAL if data.get("type") in PRESETS else {}))
    if spatial.get("from_pretrained") and not _is_described(spatial):
        stored = read_config(spatial["from_pretrained"], spatial.get("subfolder"))
        data["vae_2d"] = {**{k: v for k, v in stored.items() if k[0] != "_"}, **spatial}
    config = VideoAutoencoderConfig.from_dict(data)
    vae = VideoAutoencoder(config)
    words = []
    temporal = data.get("vae_temporal") or {}
    for name, part, entry, cls in (
        ("2D", vae.spatial_vae.module, spatial, AutoencoderKL),
        ("temporal", vae.temporal_vae, temporal, VAETemporal),
    ):
        where = entry.get("from_pretrained")
        words.append(f"{name} VAE from {where or 'random weights'}")
        if not where:
            continue
        try:
            loaded = load_model(
                cls, where, subfolder=entry.get("subfolder"), config=part.config, dtype=dtype
            )
        except WeightsError as error:
            key = "vae_2d" if name == "2D" else "vae_temporal"
            raise WeightsError(
                f"{error} (it is the {name} VAE that this configuration starts from; name another "
                f"with --model.{key}.from_pretrained FOLDER)"
            ) from error
        part.load_state_dict(loaded.state_dict())
    return vae.to(device, dtype).eval(), ", ".join(words)


def find_trained(source: str) -> str:
    """Return the folder of the VAE that `source` means.

    "tiny" is the one inside this package, a pipeline folder means its VAE, and an output
    folder of training the finished VAE of its newest run, so that a stage's configuration can name
    the folder of the stage before.
    """
    path = Path(source).expanduser()
    if source == TINY and not path.exists():
        return str(files("opensora") / "assets" / TINY / "vae")
    if (path / INDEX).is_file():
        return str(path / "vae")
    if not path.is_dir() or (path / "config.json").is_file():
        return source
    runs = sorted(path.glob(f"[0-9][0-9][0-9]*-*/{TRAINED}/config.json"))
    for config in (path / TRAINED / "config.json", *reversed(runs)):
        if config.is_file():
            return str(config.parent)
    unfinished = sorted(path.glob("[0-9][0-9][0-9]*-*/epoch*-global_step*/index.json"))
    if unfinished:
        run = unfinished[-1].parent.parent
        raise WeightsError(
            f"{run} has no finished VAE, only checkpoints: go on with --load latest, or write one "
            f"with `opensora export {run} {run / TRAINED}`"
        )
    return source


def _load_whole(
    model: dict[str, Any], source: str, dtype: torch.dtype | None, device: torch.device | str
) -> VideoAutoencoder:
    """Load weights of the whole; the description fills in where no config.json is."""
    known = {key: model[key] for key in model if key not in ("vae_2d", "vae_temporal")}
    if model.get("vae_2d") or model.get("type") in PRESETS:
        described = VideoAutoencoderConfig.from_dict(model)
    else:
        # Only checks the keys: these weights must bring a config.json.
        VideoAutoencoderConfig.from_dict({**known, "type": next(iter(PRESETS))})
        described = None
    folder = find_trained(source)
    try:
        read_config(folder)
        config = None
    except WeightsError:
        config = described
    vae = load_model(VideoAutoencoder, folder, config=config, dtype=dtype, device=device)
    for key in _CHUNKS:
        if key in model:
            setattr(vae, key, model[key])
    return vae


def _is_described(spatial: Mapping[str, Any]) -> bool:
    return "block_out_channels" in spatial or spatial["from_pretrained"] in SPATIAL_SOURCES
