"""Build or load the models of a training run, and turn batches into what they take.

B batch, T frames, H x W pixels; latents are [B, C, t, h, w]; L text tokens, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.captions import clean_prompt, plain_caption
from opensora.checkpoint import load_model
from opensora.data.batch import Batch
from opensora.devices import DTYPES
from opensora.distributed.run_folders import checkpoints, find_run
from opensora.errors import UsageError
from opensora.models.stdit import STDiT3, build_stdit
from opensora.models.text_encoder import T5TextEncoder, grow
from opensora.models.vae import VideoAutoencoder
from opensora.models.vae.loading import build_vae
from opensora.pipeline_folder import pipeline_folder
from opensora.pipeline_loading import model_config
from opensora.pipeline_options import VAE_KEYS, model_options, text_options, vae_options
from opensora.pipeline_parts import Part
from opensora.train_config import TrainConfig
from opensora.weight_loading import load_weights

#: Keys of the model's dict that say what to train, not what the model is.
FREEZING = ("only_train_temporal", "freeze_y_embedder")

#: Captions that a text encoder takes at a time.
TOGETHER = 16


@dataclass
class Models:
    """Hold the models of a run; what is trained is in float32.

    Attributes:
        transformer: that is trained.
        vae: frozen; None where the dataset holds latents.
        text_encoder: frozen, or trained along; None where the dataset holds text states.
        train_text: whether it is trained along.
        clean: whether captions are cleaned as prompts are; states were, when they were made.
    """

    transformer: STDiT3
    vae: VideoAutoencoder | None
    text_encoder: T5TextEncoder | None
    train_text: bool
    clean: bool = True

    def trained(self) -> dict[str, nn.Module]:
        """Return name -> module of what is saved in checkpoints."""
        modules: dict[str, nn.Module] = {"transformer": self.transformer}
        if self.train_text and self.text_encoder is not None:
            modules["text_encoder"] = self.text_encoder.model
        return modules

    @torch.no_grad()
    def latent(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the latents of a batch, float32 [B, C, t, h, w]; pixels are encoded, sampled."""
        if batch.latent is not None:
            return batch.latent.to(device, torch.float32)
        assert batch.video is not None
        if self.vae is None:
            raise UsageError(
                "the dataset holds pixels and there is no VAE: give vae, or load_video_features "
                "with a dataset of latents"
            )
        z: Tensor = self.vae.encode(batch.video.to(device))
        return z.float()

    def text(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return text states [B, 1, L, D] and the mask int64 [B, L].

        A model that takes projected, packed text (`skip_y_embedder`) gets [1, tokens, D] and the
        numbers of tokens [B].

        Raises:
            UsageError: states of another width or length than the transformer's, or nothing that
                makes states.
        """
        if batch.states is not None and batch.mask is not None:
            return self._stored(batch.states.to(device), batch.mask.to(device))
        if self.text_encoder is None:
            raise UsageError(
                "the dataset holds captions and there is no text encoder: give text_encoder, or "
                "load_text_features with a dataset of text states"
            )
        prepare = clean_prompt if self.clean else plain_caption
        captions = [prepare(caption) for caption in batch.text or []]
        with torch.set_grad_enabled(self.train_text and torch.is_grad_enabled()):
            return encode_captions(self.text_encoder, captions)

    def _stored(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return states that a cache holds as the transformer takes them."""
        config = self.transformer.config
        if self.train_text:
            raise UsageError(
                "the dataset holds text states, so text_encoder.train would train nothing: give a "
                "dataset of captions (dataset.load_text_features=False), or leave train out"
            )
        width = config.hidden_size if config.skip_y_embedder else config.caption_channels
        rest = config.model_max_length - states.shape[2]
        if states.shape[3] != width or rest < 0:
            raise UsageError(
                f"the dataset's text states are {states.shape[2]} tokens of width "
                f"{states.shape[3]}, the transformer takes at most {config.model_max_length} of "
                f"width {width}: extract them with its text encoder, or set model.caption_channels "
                "and model.model_max_length"
            )
        if config.skip_y_embedder:
            seen = mask.bool()
            return states[:, 0][seen][None], seen.sum(1)
        # In training a caption is as long as the null text that may stand in for it.
        return nn.functional.pad(states, (0, 0, 0, rest)), nn.functional.pad(mask, (0, rest))


def encode_captions(encoder: T5TextEncoder, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Encode captions, those of like length together, cut after the longest's end.

    Attention grows with the square of the length, so padding a batch to its longest costs most.

    Returns:
        Text states [B, 1, L, D], L the encoder's max_length, zero past the end of the longest
        caption of like length, and the mask int64 [B, L].
    """
    ids, mask = encoder.tokenize(captions)
    order = mask.sum(1).argsort(stable=True)
    parts = []
    for rows in order.split(TOGETHER):
        length = min(ids.shape[1], math.ceil(int(mask[rows].sum(1).max()) / 8) * 8)
        states = encoder(ids[rows, :length], mask[rows, :length])
        parts.append(nn.functional.pad(states, (0, 0, 0, ids.shape[1] - length)))
    return torch.cat(parts)[order.argsort()], mask


def build_models(config: TrainConfig, device: torch.device) -> Models:
    """Build and load what a configuration names; the transformer and what trains are float32.

    Raises:
        UsageError: an unknown type or key.
        WeightsError: weights are missing, damaged or of another architecture.
    """
    frozen = DTYPES[config.dtype] if device.type == "cuda" else torch.float32
    vae = None if config.load_video_features else _load_vae(config, frozen, device)
    text, train_text = None, False
    if not config.load_text_features:
        text, train_text = _load_text(config, frozen, device)
    transformer = _load_transformer(config).to(device).train()
    _check_widths(transformer, vae, text, config)
    return Models(transformer, vae, text, train_text, config.clean_captions)


def precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of the forward pass where the weights are not cast by FSDP2."""
    if device.type != "cpu" or DTYPES[config.dtype] != torch.bfloat16:
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16)


def weights_of(config: TrainConfig) -> str | None:
    """Return where the transformer's weights come from, None for random ones."""
    source = config.ckpt_path or (config.model or {}).get("from_pretrained")
    if config.load is not None and config.start_from_scratch:
        source = config.load
        if source == "latest":
            source = find_run(Path(config.outputs))
            if source is None:
                raise UsageError(f"--load latest: {config.outputs} holds no run with a checkpoint")
    return None if source is None else str(source)


def _load_transformer(config: TrainConfig) -> STDiT3:
    given = {key: value for key, value in (config.model or {}).items() if key not in FREEZING}
    source = weights_of(config)
    options = model_options(given)
    if not source:
        return build_stdit(options)
    described = options.get("type") != "STDiT3" or len(options) > 1
    folder = pipeline_folder(source)
    part = Part(str(folder or source), "transformer" if folder else None, options)
    # Checkpoints of runs (whose config.json is the run's), of upstream and of PixArt too.
    if described and (checkpoints(Path(source)) or part.config() is None):
        model = build_stdit(options)
        load_weights(model, source)
        return model
    return load_model(
        STDiT3,
        part.source,
        subfolder=part.subfolder,
        config=model_config(part) if described else None,
        dtype=torch.float32,
    )


def _load_vae(
    config: TrainConfig, dtype: torch.dtype, device: torch.device
) -> VideoAutoencoder | None:
    if config.vae is None:
        return None
    options = vae_options(config.vae)
    source = config.vae.get("from_pretrained")
    if not source:
        raise UsageError("vae.from_pretrained names no weights: give a folder, file or hub id")
    vae, _ = build_vae(options, source=str(source), dtype=dtype, device=device)
    for key in VAE_KEYS:
        if key in options:
            setattr(vae, key, options[key])
    return vae.requires_grad_(False).eval()


def _load_text(
    config: TrainConfig, dtype: torch.dtype, device: torch.device
) -> tuple[T5TextEncoder | None, bool]:
    if config.text_encoder is None:
        return None, False
    given = dict(config.text_encoder)
    train = bool(given.pop("train", False))
    grown = given.pop("grow", None)
    if given.get("type") == "byt5":
        built = {key: value for key, value in given.items() if key != "type"}
        try:
            encoder = T5TextEncoder.byt5(**built)
        except TypeError as error:
            raise UsageError(f"text_encoder: {error}") from error
        return encoder.to(device), True
    options = text_options(given)
    source = given.get("from_pretrained")
    if not source:
        raise UsageError("text_encoder.from_pretrained names no weights: give a folder or hub id")
    encoder = T5TextEncoder.from_pretrained(
        pipeline_folder(str(source)) or source,
        subfolder=options.get("subfolder"),
        max_length=options.get("model_max_length"),
        dtype=torch.float32 if train else dtype,
        device=device,
    )
    if grown is not None:
        if not train or not isinstance(grown, dict) or set(grown) != {"num_layers", "num_heads"}:
            raise UsageError(
                "text_encoder.grow: give dict(num_layers=..., num_heads=...), and train=True"
            )
        encoder = grow(encoder, **grown)
    return encoder.train(train).requires_grad_(train), train


def _check_widths(
    model: STDiT3,
    vae: VideoAutoencoder | None,
    text: T5TextEncoder | None,
    config: TrainConfig,
) -> None:
    """Refuse parts that do not fit together, before any data is read."""
    wanted = model.config
    channels = config.vae_out_channels if vae is None else vae.latent_channels
    if vae is not None and channels != wanted.in_channels:
        raise UsageError(
            f"the VAE has {channels} latent channels and the transformer takes "
            f"{wanted.in_channels}: set model.in_channels, or another vae"
        )
    if text is not None and text.hidden_size != wanted.caption_channels:
        raise UsageError(
            f"the text encoder is {text.hidden_size} wide and the transformer takes "
            f"{wanted.caption_channels}: set model.caption_channels, or another text_encoder"
        )
    if text is not None and text.max_length != wanted.model_max_length:
        raise UsageError(
            f"the text encoder gives {text.max_length} tokens and the transformer's null text has "
            f"{wanted.model_max_length}: set text_encoder.model_max_length"
        )
