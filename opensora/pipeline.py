"""Generate clips from text: encode the prompt, sample a latent, decode it.

pipe = OpenSoraPipeline.from_pretrained("tiny")
clip = pipe("a red circle moving right", seed=7).frames[0]  # uint8 [T, H, W, 3]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opensora.errors import UsageError, WeightsError
from opensora.generation import (
    clip_seeds,
    decode_latent,
    draw_noise,
    evaluating,
    format_frames,
    sample_latent,
    text_of,
)
from opensora.progress import Progress, bars_of
from opensora.prompts import prepare_prompt
from opensora.request import (
    Request,
    check_memory,
    estimate_memory,
    training_note,
    validate_request,
)
from opensora.schedulers.rflow import RFlow

if TYPE_CHECKING:
    from opensora.lora_blend import LoraBlend

OUTPUT_TYPES = ("np", "pt", "pil", "latent")

#: What a checkpoint may say about its own best use; `trained_sizes` holds (T, H, W) triples.
DEFAULT_KEYS = (
    "num_frames",
    "height",
    "width",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "trained_sizes",
)

#: `callback(pipe, step, timestep, {"latents": z})`; a dict with other "latents" replaces z.
StepCallback = Callable[["OpenSoraPipeline", int, Tensor, dict[str, Tensor]], dict[str, Any] | None]


@dataclass(frozen=True)
class OpenSoraPipelineOutput:
    """Hold what a call made.

    Attributes:
        frames: "np" uint8 [B, T, H, W, 3]; "pt" float [B, T, 3, H, W] in [0, 1]; "pil" a list of
            lists of images; "latent" float [B, C, T', H', W']. Clips of one prompt are neighbours.
        seeds: seed of each clip; None where a generator was given.
        texts: what the text encoder saw, one per clip.
        request: sizes and sampling settings, defaults filled in.
    """

    frames: Any
    seeds: list[int] | None
    texts: list[str]
    request: Request


class OpenSoraPipeline:
    """Hold the four parts of a text-to-video model; see `from_pretrained`.

    Args:
        transformer: STDiT3, predicts the velocity.
        vae: VideoAutoencoder.
        text_encoder: T5TextEncoder, or anything with its `encode`, `hidden_size`, `max_length`.
        scheduler: RFlow.
        defaults: values of a request that does not say (`DEFAULT_KEYS`).
        sources: where the parts came from, for the recipe of a clip.

    Raises:
        UsageError: unknown default.
        WeightsError: the parts do not fit each other.
    """

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module,
        text_encoder: Any,
        scheduler: RFlow,
        *,
        defaults: Mapping[str, Any] | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.transformer: Any = transformer
        self.vae: Any = vae
        self.text_encoder = text_encoder
        self.scheduler = scheduler
        self.defaults = {
            "num_inference_steps": scheduler.num_sampling_steps,
            "guidance_scale": scheduler.cfg_scale,
            **(defaults or {}),
        }
        self.sources = dict(sources or {})
        self._loras: LoraBlend | None = None
        for key in self.defaults:
            if key not in DEFAULT_KEYS:
                raise UsageError(f"unknown default {key!r}; use some of {', '.join(DEFAULT_KEYS)}")
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise WeightsError where two parts do not fit, naming both numbers."""
        config, encoder = self.transformer.config, self.text_encoder
        latent, width = self.vae.latent_channels, encoder.hidden_size
        if config.skip_y_embedder:
            raise WeightsError(
                "the transformer was made for prepared text (skip_y_embedder) and has no embedding "
                "of the empty prompt; use a checkpoint with its y_embedder"
            )
        if config.in_channels != latent:
            raise WeightsError(
                f"the transformer takes latents of {config.in_channels} channels and the VAE makes "
                f"{latent}: they are not of one model; name the vae that belongs to it"
            )
        if config.caption_channels != width or config.model_max_length < encoder.max_length:
            raise WeightsError(
                f"the transformer takes texts of up to {config.model_max_length} tokens x "
                f"{config.caption_channels} channels and the text encoder makes "
                f"{encoder.max_length} x {width}: name the text_encoder that belongs to it"
            )

    @property
    def components(self) -> dict[str, Any]:
        """The four parts by name: `OpenSoraPipeline(**pipe.components)` shares them."""
        return {
            "transformer": self.transformer,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "scheduler": self.scheduler,
        }

    @property
    def device(self) -> torch.device:
        """Where the transformer lies."""
        device: torch.device = next(self.transformer.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the transformer's weights."""
        dtype: torch.dtype = next(self.transformer.parameters()).dtype
        return dtype

    def to(
        self,
        *args: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> OpenSoraPipeline:
        """Move and cast the parts in place: `to("cuda")`, `to(torch.bfloat16)`, or both.

        The text encoder moves along and keeps its own type, float32 as published; cast it by
        `pipe.text_encoder.to(dtype)`.
        """
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        self.transformer.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=dtype)
        if device is not None:
            self.text_encoder.to(device)
        return self

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "tiny",
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        text_encoder_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        progress: bool | Progress = True,
        **components: Any,
    ) -> OpenSoraPipeline:
        """Load a pipeline.

        Args:
            source: "tiny" (the model inside this package), a folder written by `save_pretrained`,
                or transformer weights (folder, file or hub id): the other parts are then those of
                the known release that it fits.
            dtype: of transformer and VAE; None: bfloat16 on a GPU, float32 on a CPU.
            torch_dtype: the same under the name that diffusers uses.
            text_encoder_dtype: None: float32, as published.
            device: None: a GPU if there is one.
            progress: show how far it is: bars on a terminal, else a line now and then.
            **components: ready parts (transformer, vae, text_encoder, scheduler) that are taken
                instead of being loaded.

        Raises:
            WeightsError: missing, damaged or of another model.
        """
        from opensora.pipeline_loading import load_parts
        from opensora.pipeline_parts import PipelineParts

        with bars_of(progress) as bars:
            return load_parts(
                PipelineParts.find(source),
                dtype=dtype or torch_dtype,
                text_encoder_dtype=text_encoder_dtype,
                device=device,
                progress=bars,
                pipeline_class=cls,
                **components,
            )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `from_pretrained` reads.

        Args:
            folder: made if missing; `model_index.json` is written last.
            dtype: type of stored matrices; vectors and tables of one axis keep theirs. None: all.

        Raises:
            UsageError, DoesNotFitError: the folder cannot be written.
        """
        from opensora.pipeline_folder import save_pipeline

        save_pipeline(self, Path(folder), dtype)

    def load_lora_weights(self, source: str | Path, weight: float = 1.0) -> None:
        """Add low-rank updates (LoRA) to the transformer, times `weight`; several sum up.

        Args:
            source: safetensors file or PEFT folder, made by `opensora.lora`, PEFT, diffusers or
                kohya's programs.
            weight: how strongly it counts; 1 as trained.

        Raises:
            WeightsError: it cannot be read, or is of another model.
        """
        from opensora.lora_blend import LoraBlend
        from opensora.lora_files import locate_lora

        loras = self._loras or LoraBlend(self.transformer)
        loras.add(source, weight)
        self._loras = loras
        number = sum(name.startswith("lora ") for name in self.sources) + 1
        self.sources[f"lora {number}"] = str(locate_lora(source))

    def unload_lora_weights(self) -> None:
        """Give the transformer the weights back that it had before any `load_lora_weights`."""
        if self._loras is not None:
            self._loras.clear()
        self._loras = None
        self.sources = {k: v for k, v in self.sources.items() if not k.startswith("lora ")}

    def request(self, **given: Any) -> Request:
        """Fill and check a request for this pipeline; see `validate_request`."""
        height, width = given.get("height"), given.get("width")
        if (height is None) != (width is None):
            raise UsageError("give both height and width, or neither")
        return validate_request(defaults=self.defaults, factor=self.vae_factor, **given)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel, along both sides."""
        return int(self.vae.config.spatial.spatial_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        fps: float | None = None,
        batch_size: int = 1,
        num_videos_per_prompt: int = 1,
        output_type: str = "np",
        noise: str = "per-sample",
        aes: float | None = None,
        flow: float | None = None,
        camera_motion: str | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: bool | Progress = True,
    ) -> OpenSoraPipelineOutput:
        """Generate clips.

        Args:
            prompt: what to show, one text or several.
            negative_prompt: what to steer away from; None: the learned empty prompt.
            num_frames: video frames, 1 for an image; None: the checkpoint's default, as below.
            height: pixels, a multiple of the VAE's factor.
            width: pixels, likewise.
            num_inference_steps: steps from noise to clip.
            guidance_scale: how strictly to follow the prompt; 1 turns guidance off.
            seed: of the first clip, the next has seed + 1; or one seed per clip. A clip depends
                on its own seed alone. None draws one.
            generator: source of the initial noise instead of a seed.
            fps: frames per second of the clip.
            batch_size: clips sampled together: memory, not content.
            num_videos_per_prompt: clips of each prompt.
            output_type: "np", "pt", "pil" or "latent", see `OpenSoraPipelineOutput`.
            noise: "upstream" draws as Open-Sora does, from the global generator: a clip then
                depends on its batch. A seed of None goes on in that generator's stream.
            aes: aesthetic score that is appended to the prompt.
            flow: motion score, likewise.
            camera_motion: likewise.
            callback_on_step_end: called after each step of each batch.
            progress: show how far it is: bars on a terminal, else a line now and then.

        Raises:
            UsageError: wrong argument.
            DoesNotFitError: the request needs more memory than there is.
            NonFiniteError: NaN or infinity in the text, the latent or the frames.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [text_of(prepare_prompt(p, aes=aes, flow=flow, camera_motion=camera_motion))
                 for p in prompts for _ in range(num_videos_per_prompt)]  # fmt: skip
        negative = None if negative_prompt is None else text_of(prepare_prompt(negative_prompt))
        if not texts or batch_size < 1:
            raise UsageError("give at least one prompt, num_videos_per_prompt and batch_size >= 1")
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        request = self.request(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            noise=noise,
        )
        self._check_fits(request, min(batch_size, len(texts)))
        note = training_note(request, self.defaults.get("trained_sizes", ()))
        if note:
            warnings.warn(note, stacklevel=3)  # past torch.no_grad, at the caller
        seeds = clip_seeds(seed, generator, len(texts), noise)
        sequence = getattr(self.transformer, "sequence", None)
        if sequence is not None:  # ranks that share the tokens must start from one noise
            seeds = sequence.agree(seeds, "the seeds of the clips")

        def after_step(step: int, t: Tensor, z: Tensor) -> Tensor | None:
            if callback_on_step_end is None:
                return None
            return (callback_on_step_end(self, step, t, {"latents": z}) or {}).get("latents")

        latent_size = self.vae.get_latent_size(request.size)
        made = []
        with bars_of(progress) as bars, evaluating(self.transformer, self.vae, self.text_encoder):
            for start in range(0, len(texts), batch_size):
                batch = texts[start : start + batch_size]
                shape = (len(batch), self.vae.latent_channels, *latent_size)
                z = draw_noise(
                    shape, request, seeds, generator, start, device=self.device, dtype=self.dtype
                )
                z = sample_latent(
                    self.transformer,
                    self.text_encoder,
                    self.scheduler,
                    batch,
                    negative,
                    request,
                    z,
                    bars=bars,
                    after_step=after_step,
                )
                latent = output_type == "latent"
                made.append(z if latent else decode_latent(self.vae, z, request, bars))
        frames = format_frames(torch.cat(made), output_type)
        return OpenSoraPipelineOutput(frames, seeds, texts, request)

    def _check_fits(self, request: Request, batch: int) -> None:
        """Raise DoesNotFitError if the estimate exceeds the free memory; weights are loaded."""
        spatial = self.vae.config.spatial
        needed = estimate_memory(
            request,
            self.vae.get_latent_size(request.size),
            batch=batch,
            hidden_size=self.transformer.config.hidden_size,
            vae_channels=spatial.block_out_channels[0],
            vae_frames=self.vae.micro_batch_size or request.num_frames,
            bytes_per_value=self.dtype.itemsize,
        )
        check_memory(needed, self.device)
