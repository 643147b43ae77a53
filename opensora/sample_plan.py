"""Turn the settings of a generating run into a checked plan, before any weights are opened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensora.config import Sources
from opensora.devices import choose_device, choose_dtype
from opensora.errors import UsageError
from opensora.files import check_folder
from opensora.generation import text_of
from opensora.lora_files import parse_lora
from opensora.media import estimate_bytes, frame_rate
from opensora.pipeline_parts import PipelineParts
from opensora.prompts import prepare_prompt
from opensora.request import Request, check_memory, training_note, validate_request
from opensora.sample_config import SampleConfig
from opensora.sample_inputs import read_prompts, read_size
from opensora.sizes import SIZES, describe_size, get_num_frames, save_path


@dataclass(frozen=True)
class Clip:
    """Describe one file to make: its place in the run, prompt, cleaned text, seed and path."""

    index: int
    prompt: str
    text: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Plan:
    """Hold everything a run will do.

    Attributes:
        config: settings with the checkpoint's defaults filled in.
        sources: where each came from.
        parts: where the models are.
        loras: low-rank updates of the transformer, each with its weight.
        request: sizes and sampling settings.
        batches: clips that are sampled together, in order.
        save_fps: frame rate of the files.
        device: of the models.
        dtype: of transformer and VAE.
        notes: sentences for the user.
    """

    config: SampleConfig
    sources: Sources
    parts: PipelineParts
    loras: list[tuple[Path, float]]
    request: Request
    batches: list[list[Clip]]
    save_fps: float
    device: torch.device
    dtype: torch.dtype
    notes: list[str]


def make_plan(config: SampleConfig, sources: Sources) -> Plan:
    """Check settings and derive the plan of a run.

    Raises:
        UsageError: prompts, sizes, paths or settings that cannot be followed.
        WeightsError: a named checkpoint does not exist.
        DoesNotFitError: memory or disk do not suffice.
    """
    prompts = read_prompts(config, sources)
    texts = [
        text_of(
            prepare_prompt(
                prompt, aes=config.aes, flow=config.flow, camera_motion=config.camera_motion
            )
        )
        for prompt in prompts
    ]
    if config.negative_prompt is not None:
        text_of(prepare_prompt(config.negative_prompt))
    notes = [*sources.notes, *_execution_notes(config)]
    size = read_size(config, sources, notes)
    frames = None if config.num_frames is None else get_num_frames(config.num_frames)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    parts = PipelineParts.from_config(
        model=config.model,
        vae=config.vae,
        text_encoder=config.text_encoder,
        scheduler=config.scheduler,
        ckpt_path=config.ckpt_path,
    )
    loras = [parse_lora(text) for text in config.lora or ()]
    config, request = _request(config, sources, parts, frames, size)
    factor = parts.vae_factor
    if request.height % factor or request.width % factor:
        made = f"{request.width // factor * factor}x{request.height // factor * factor}"
        notes.append(f"the VAE works in steps of {factor} pixels: files will be {made}")
    note = training_note(request, parts.defaults.get("trained_sizes", ()))
    notes += [note] if note else []
    save_fps = config.save_fps if config.save_fps is not None else _save_fps(request.fps, config)
    frame_rate(save_fps)
    count = len(prompts) * config.num_sample
    together = min(config.batch_size, count)
    check_memory(parts.estimate_memory(request, together, dtype), device)
    check_folder(Path(config.save_dir), count * estimate_bytes(*request.size))
    batches = _batches(config, list(zip(prompts, texts, strict=True)), request)
    for clip in (clip for batch in batches for clip in batch):
        if clip.path.is_dir():
            raise UsageError(f"cannot write {clip.path}: it is a folder; use --sample-name")
    return Plan(config, sources, parts, loras, request, batches, save_fps, device, dtype, notes)


def _request(
    config: SampleConfig,
    sources: Sources,
    parts: PipelineParts,
    frames: int | None,
    size: tuple[int, int] | None,
) -> tuple[SampleConfig, Request]:
    """Fill settings that nobody gave from the scheduler's dict and the checkpoint; check them."""
    defaults = parts.defaults
    height, width = size or (defaults.get("height"), defaults.get("width"))
    schedule = config.scheduler or {}
    filled = {
        "num_frames": frames or defaults.get("num_frames"),
        "fps": defaults.get("fps"),
        "num_sampling_steps": defaults.get("num_inference_steps"),
        "cfg_scale": defaults.get("guidance_scale"),
    }
    for name in ("num_sampling_steps", "cfg_scale"):
        if name in schedule and not sources.is_set(name):
            config = dataclasses.replace(config, **{name: schedule[name]})
            sources[name] = f"scheduler of {sources['scheduler']}"
    if size is None and height is not None and width is not None:
        filled["image_size"] = (height, width)
    config = sources.fill(config, filled, "checkpoint")
    request = validate_request(
        defaults=defaults,
        factor=parts.vae_factor,
        known_sizes=[known for table in SIZES.values() for known in table.values()],
        num_frames=frames,
        height=height,
        width=width,
        fps=config.fps,
        num_inference_steps=config.num_sampling_steps,
        guidance_scale=config.cfg_scale,
        noise=config.noise,
    )
    return config, request


def _execution_notes(config: SampleConfig) -> list[str]:
    """Say which switches of the model dict change nothing here."""
    switches = [f"model.{key}" for key in config.model or {} if key.startswith("enable_")]
    if not switches:
        return []
    return [f"{', '.join(switches)}: accepted; kernels are chosen automatically here"]


def _save_fps(fps: float, config: SampleConfig) -> float:
    """Return the frame rate of the files: fps // frame_interval, as Open-Sora."""
    rate = fps // config.frame_interval
    if rate < 1:
        raise UsageError(
            f"--frame-interval {config.frame_interval} leaves less than one of {fps:g} frames per "
            "second; give a smaller interval or --save-fps"
        )
    return rate


def _batches(
    config: SampleConfig, prompts: list[tuple[str, str]], request: Request
) -> list[list[Clip]]:
    """Lay out the clips: names, seeds, and which are sampled together.

    A clip's seed is --seed plus its place in the whole prompt list, so that a part of the list
    gives the same clips. With upstream's noise, batches hold one clip of each prompt, as there.
    """
    suffix = ".png" if request.num_frames == 1 else ".mp4"
    copies = config.num_sample
    clips: list[list[Clip]] = []
    owners: dict[Path, str] = {}
    for place, (prompt, text) in enumerate(prompts):
        clips.append([])
        for k in range(copies):
            index = config.start_index + place
            path = save_path(
                config.save_dir,
                sample_name=config.sample_name,
                sample_idx=index,
                prompt=prompt,
                prompt_as_path=config.prompt_as_path,
                num_sample=copies,
                k=k,
            )
            path = path.with_name(path.name + suffix)
            if path in owners:
                raise UsageError(
                    f"two prompts would be written to {path}: {prompt!r} is given twice"
                )
            owners[path] = prompt
            number = index * copies + k
            clips[-1].append(Clip(number, prompt, text, config.seed + number, path))
    step = config.batch_size
    if config.noise == "upstream":
        groups = [clips[start : start + step] for start in range(0, len(clips), step)]
        return [[of_prompt[k] for of_prompt in group] for group in groups for k in range(copies)]
    flat = [clip for of_prompt in clips for clip in of_prompt]
    return [flat[start : start + step] for start in range(0, len(flat), step)]


def describe_plan(plan: Plan) -> str:
    """Say what a run will do, one fact a line."""
    request, clips = plan.request, [clip for batch in plan.batches for clip in batch]
    noun = "image" if request.num_frames == 1 else f"clip of {request.num_frames} frames"
    latent = "x".join(map(str, plan.parts.latent_size(request)))
    memory = plan.parts.estimate_memory(request, len(plan.batches[0]), plan.dtype) / 2**30
    lines = [
        f"{len(clips)} x {noun}, {describe_size(request.height, request.width)}, latent {latent}",
        f"{request.num_inference_steps} steps, guidance {request.guidance_scale:g}, "
        f"{request.noise} noise, seeds {clips[0].seed} to {clips[-1].seed}",
        f"{plan.device}, {str(plan.dtype).removeprefix('torch.')}, at least {memory:.2f} GiB",
        *(f"{name}: {source}" for name, source in plan.parts.describe().items()),
        *(f"lora: {path}, weight {weight:g}" for path, weight in plan.loras),
        *(f"{clip.path}: {clip.text}" for clip in clips[:20]),
    ]
    if len(clips) > 20:
        lines.append(f"... and {len(clips) - 20} more")
    return "\n".join(lines)


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return the effective settings as JSON values, for the recipe."""
    return dataclasses.asdict(plan.config)
