"""Find the parts of a pipeline - built in, in a folder, named by a configuration - and load them.

A pipeline folder holds `model_index.json`, `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`
and `scheduler/`. Finding reads small JSON files only; `opensora.pipeline_loading` opens weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoint import read_config
from opensora.errors import UsageError, WeightsError
from opensora.models.stdit import STDiT3Config
from opensora.models.vae import PRESETS as VAE_PRESETS
from opensora.models.vae import VideoAutoencoderConfig
from opensora.pipeline_folder import INDEX, PARTS, TINY, pipeline_folder
from opensora.pipeline_options import model_options, text_options, vae_options
from opensora.request import Request, estimate_memory
from opensora.schedulers.rflow import RFlow
from opensora.weight_files import read_json

#: The parts that belong to Open-Sora 1.2's transformer, and the request of its published config.
RELEASE: dict[str, dict[str, Any]] = {
    "vae": {"type": "OpenSoraVAE_V1_2", "from_pretrained": "hpcai-tech/OpenSora-VAE-v1.2"},
    "text_encoder": {
        "type": "t5",
        "from_pretrained": "DeepFloyd/t5-v1_1-xxl",
        "model_max_length": 300,
    },
    "scheduler": {
        "type": "rflow",
        "use_timestep_transform": True,
        "num_sampling_steps": 30,
        "cfg_scale": 7.0,
    },
    "defaults": {"num_frames": 51, "height": 240, "width": 426, "fps": 24},
}


@dataclass(frozen=True)
class Part:
    """Name the weights of one part.

    Attributes:
        source: folder, file or hub id.
        subfolder: folder inside it.
        options: what the configuration says about the part besides its source.
    """

    source: str
    subfolder: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.source}/{self.subfolder}" if self.subfolder else self.source

    @property
    def is_local(self) -> bool:
        """Tell whether the source is on this machine."""
        return Path(self.source).expanduser().exists()

    def config(self) -> dict[str, Any] | None:
        """Return a local source's config.json, or None."""
        try:
            return read_config(self.source, self.subfolder) if self.is_local else None
        except WeightsError:
            return None  # a lone weight file: its shapes say how it is built


@dataclass(frozen=True)
class PipelineParts:
    """Hold where the parts of a pipeline are.

    Attributes:
        transformer, vae, text_encoder: their weights.
        scheduler: settings of the sampler.
        defaults: what a request uses that does not say, see `opensora.pipeline.DEFAULT_KEYS`.
    """

    transformer: Part
    vae: Part
    text_encoder: Part
    scheduler: dict[str, Any]
    defaults: dict[str, Any]

    @classmethod
    def find(cls, source: str | Path) -> PipelineParts:
        """Find a whole pipeline: "tiny", a pipeline folder, or weights of a known transformer."""
        return cls.from_config(ckpt_path=str(source))

    @classmethod
    def from_config(
        cls,
        *,
        model: Mapping[str, Any] | None = None,
        vae: Mapping[str, Any] | None = None,
        text_encoder: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
    ) -> PipelineParts:
        """Find the parts that a configuration names.

        Parts that it does not name are those of the pipeline folder, if the transformer comes from
        one; else those of the known release (built in, or 1.2) that the transformer fits. With
        nothing named at all, that is the built-in model.

        Args:
            model: type, from_pretrained, and architecture where no config.json says it.
            vae: type, from_pretrained, micro_frame_size, micro_batch_size.
            text_encoder: type, from_pretrained, model_max_length, dtype.
            scheduler: settings of RFlow, over those of the checkpoint.
            ckpt_path: stands in for the model's from_pretrained.

        Raises:
            UsageError: unknown type or key, or no source.
            WeightsError: a path does not exist, or a pipeline folder is incomplete.
        """
        source = ckpt_path or (model or {}).get("from_pretrained")
        if model is not None and not source:
            raise UsageError(
                "model.from_pretrained names no weights: give --ckpt-path, or leave model out for "
                "the built-in one"
            )
        source = str(source or TINY)
        folder = pipeline_folder(source)
        if folder is not None:
            base = _read_folder(folder)
        else:
            transformer = Part(source)
            _check_exists(transformer, "the transformer")
            base = _release_for(transformer)
        return cls(
            dataclasses.replace(base.transformer, options=model_options(model)),
            _choose(base.vae, vae, "vae", vae_options),
            _choose(base.text_encoder, text_encoder, "text_encoder", text_options),
            RFlow.from_dict({**base.scheduler, **(scheduler or {})}).to_dict(),
            base.defaults,
        )

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel."""
        return self._vae_config().spatial.spatial_factor

    def latent_size(self, request: Request) -> tuple[int, int, int]:
        """Return (T', H', W') of a request's latent."""
        config = self._vae_config()
        chunk = self.vae.options.get("micro_frame_size", config.micro_frame_size)
        whole, rest = divmod(request.num_frames, chunk or request.num_frames)
        factor = config.temporal.temporal_factor
        frames = whole * -(-(chunk or request.num_frames) // factor) - (-rest // factor)
        side = config.spatial.spatial_factor
        return frames, request.height // side, request.width // side

    def estimate_memory(self, request: Request, batch: int, dtype: torch.dtype) -> int:
        """Estimate the least memory of a run in bytes, weights included where known."""
        vae = self._vae_config()
        config = self.transformer.config() or {}
        hidden = config.get("hidden_size", STDiT3Config().hidden_size)
        return estimate_memory(
            request,
            self.latent_size(request),
            batch=batch,
            hidden_size=int(hidden),
            vae_channels=vae.spatial.block_out_channels[0],
            vae_frames=vae.micro_batch_size or request.num_frames,
            weights=sum(_stored_bytes(part) for part in (self.transformer, self.vae)),
            bytes_per_value=dtype.itemsize,
        )

    def describe(self) -> dict[str, str]:
        """Return part -> where its weights are."""
        parts = {name: str(getattr(self, name)) for name in PARTS}
        return {name: str(Path(source)) for name, source in parts.items()}

    def _vae_config(self) -> VideoAutoencoderConfig:
        config = self.vae.config()
        if config is None:
            return VAE_PRESETS["OpenSoraVAE_V1_2"]
        return VideoAutoencoderConfig.from_dict(config)


def _read_folder(folder: Path) -> PipelineParts:
    """Read the small files of a pipeline folder."""
    index = read_json(folder / INDEX)
    missing = [name for name in PARTS if not (folder / name / "config.json").is_file()]
    if missing:
        raise WeightsError(
            f"{folder} is an incomplete pipeline: {', '.join(missing)} missing; save it again"
        )
    defaults = index.get("defaults", {})
    if not isinstance(defaults, dict):
        raise WeightsError(f"{folder / INDEX}: defaults must be an object; save it again")
    scheduler = RFlow.from_pretrained(folder)
    return PipelineParts(
        Part(str(folder), "transformer"),
        Part(str(folder), "vae"),
        Part(str(folder), "text_encoder"),
        scheduler.to_dict(),
        {
            "num_inference_steps": scheduler.num_sampling_steps,
            "guidance_scale": scheduler.cfg_scale,
            **defaults,
        },
    )


def _release_for(transformer: Part) -> PipelineParts:
    """Return the parts that go with transformer weights: built-in ones if they fit, or 1.2's."""
    config = transformer.config() or {}
    keys = ("in_channels", "caption_channels", "model_max_length")
    try:
        tiny = _read_folder(pipeline_folder(TINY) or Path())
        own = tiny.transformer.config() or {}
        if config and all(config.get(key) == own.get(key) for key in keys):
            return dataclasses.replace(tiny, transformer=transformer)
    except WeightsError:
        pass  # an installation without the built-in model: only the release is left
    scheduler = RELEASE["scheduler"]
    return PipelineParts(
        transformer,
        Part(RELEASE["vae"]["from_pretrained"], None, vae_options(RELEASE["vae"])),
        Part(
            RELEASE["text_encoder"]["from_pretrained"], None, text_options(RELEASE["text_encoder"])
        ),
        dict(scheduler),
        {
            "num_inference_steps": scheduler["num_sampling_steps"],
            "guidance_scale": scheduler["cfg_scale"],
            **RELEASE["defaults"],
        },
    )


def _choose(base: Part, given: Mapping[str, Any] | None, name: str, options: Any) -> Part:
    """Return the part that a configuration names, or the base part with its options."""
    if given is None:
        return base
    chosen = options(given)
    source = given.get("from_pretrained")
    if source is None:
        return dataclasses.replace(base, options={**base.options, **chosen})
    folder = pipeline_folder(str(source))
    part = Part(str(folder or source), name if folder else None, chosen)
    _check_exists(part, f"{name}.from_pretrained")
    return part


def _check_exists(part: Part, name: str) -> None:
    """Raise WeightsError for a path that is not there; `owner/name` may be on the hub."""
    owner, _, rest = part.source.partition("/")
    is_id = bool(owner and rest) and "/" not in rest and owner[0] not in ".~"
    looks_local = Path(part.source).suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    if not part.is_local and (not is_id or looks_local):
        raise WeightsError(
            f"{name}: {part.source} does not exist; give a folder, a weight file, or a hub id such "
            "as hpcai-tech/OpenSora-STDiT-v3"
        )


def _stored_bytes(part: Part) -> int:
    """Return the size of a local part's weight files, 0 if unknown."""
    path = Path(part.source).expanduser() / (part.subfolder or "")
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
