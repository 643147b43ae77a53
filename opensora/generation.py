"""Carry out a request: prompts to text states, noise to a latent, a latent to frames.

Each function checks that what it hands on is finite and names the step and layer where it is not.
Shapes: B clips, C latent channels, T' H' W' latent size, L text tokens, D text channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opensora.diagnosis import find_bad_layer, is_finite
from opensora.errors import NonFiniteError, UsageError
from opensora.media import to_uint8
from opensora.progress import Progress
from opensora.prompts import PreparedPrompt
from opensora.request import Request
from opensora.schedulers.noise import initial_noise
from opensora.schedulers.rflow import RFlow

#: `after_step(step, timestep, z)`; a returned tensor replaces z.
AfterStep = Callable[[int, Tensor, Tensor], Tensor | None]


def text_of(prepared: PreparedPrompt) -> str:
    """Return the text of a prompt for one clip.

    Raises:
        UsageError: the prompt asks for references, masks or several parts.
    """
    if prepared.reference_path or prepared.mask_strategy:
        raise UsageError(
            "the prompt names reference_path or mask_strategy: image and video conditioning is not "
            "available yet; remove the JSON at its end"
        )
    if len(prepared.texts) > 1:
        raise UsageError(
            "the prompt has texts for several parts (|0|...|1|...): long videos are not available "
            "yet; give one text"
        )
    return prepared.texts[0]


def clip_seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | None, count: int, noise: str
) -> list[int] | None:
    """Return one seed per clip; None where a generator or upstream's global stream is used.

    Raises:
        UsageError: seed and generator, a wrong number of seeds, or one that torch cannot take.
    """
    if generator is not None:
        if seed is not None:
            raise UsageError("give a seed or a generator, not both")
        return None
    if seed is None:
        if noise == "upstream":
            return None
        seed = int(torch.randint(0, 2**31, (1,)))
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    if len(seeds) == 1 and isinstance(seed, int):
        seeds = [seed + i for i in range(count)]
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise UsageError(f"a seed must be a whole number from 0 to 2^63 - 1, got {value!r}")
    if len(seeds) != count:
        raise UsageError(f"expected one seed or {count}, one per clip, got {len(seeds)}")
    return seeds


def draw_noise(
    shape: Sequence[int],
    request: Request,
    seeds: list[int] | None,
    generator: torch.Generator | None,
    start: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Draw the latent [B, C, T', H', W'] that clips start to start + B are sampled from.

    A generator is used if given. With upstream's noise the global generator is seeded before the
    first batch and goes on from there. Otherwise every clip has its own seed.
    """
    if generator is not None:
        return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)
    if request.noise == "upstream":
        if seeds is not None and start == 0:
            return initial_noise(shape, seeds[0], 0, "upstream", device=device, dtype=dtype)
        return torch.randn(tuple(shape), device=device, dtype=dtype)
    assert seeds is not None
    return initial_noise(shape, seeds[start : start + shape[0]], device=device)


def encode_texts(encoder: Any, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return text states [B, 1, L, D] and their mask int64 [B, L] on the device.

    Raises:
        NonFiniteError: the states are not finite; names the layer.
    """
    y, mask = encoder.encode(texts)
    if not is_finite(y):
        layer = find_bad_layer(encoder, lambda: encoder.encode(texts))
        raise NonFiniteError(
            f"the text encoder gave NaN or infinity, first in {layer or 'its output'}; nothing was "
            "written. Check its weights, or load it in float32"
        )
    return y.to(device), mask.to(device)


class _Remembering:
    """Call a transformer, and be able to repeat the last call."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.reusing = getattr(transformer, "reusing", nullcontext)
        self.last: dict[str, Any] = {}

    def __call__(self, x: Tensor, timestep: Tensor, **kwargs: Any) -> Tensor:
        self.last = {"x": x, "timestep": timestep, **kwargs}
        velocity: Tensor = self.transformer(**self.last)
        return velocity

    def repeat(self) -> None:
        """Repeat it from the inputs on, with nothing reused."""
        with self.reusing():
            self.transformer(**self.last)


def sample_latent(
    transformer: Any,
    encoder: Any,
    scheduler: RFlow,
    texts: list[str],
    negative: str | None,
    request: Request,
    z: Tensor,
    *,
    bars: Progress,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Turn noise into a latent.

    Args:
        transformer: STDiT3.
        encoder: T5TextEncoder.
        scheduler: its steps and guidance are replaced by the request's.
        texts: B cleaned prompts.
        negative: cleaned text to steer away from; None: the learned empty prompt.
        request: sizes and sampling settings.
        z: noise [B, C, T', H', W'].
        bars: shows the steps.
        after_step: called after each step.

    Returns:
        [B, C, T', H', W'], finite, float32.

    Raises:
        NonFiniteError: NaN or infinity; names step and layer.
    """
    parameter: nn.Parameter = transformer.x_embedder.proj.weight
    y, mask = encode_texts(encoder, texts, z.device)
    # The learned empty prompt is cut to the length of the prompt that it stands against: one mask
    # serves both halves of the guided batch, as in training.
    y_null = transformer.y_embedder.y_embedding[: y.shape[2]][None, None].to(y)
    if negative is not None and request.guidance_scale != 1:
        y_null, negative_mask = encode_texts(encoder, [negative] * len(texts), z.device)
        mask = torch.cat([mask, negative_mask])
    sizes = {
        "height": request.height,
        "width": request.width,
        "fps": request.model_fps,
        "num_frames": request.num_frames,
    }
    # In the working precision, as in training: bfloat16 rounds 854 to 856.
    conditions = {
        name: torch.full((len(texts),), float(value), dtype=parameter.dtype, device=z.device)
        for name, value in sizes.items()
    }
    num_frames = conditions.pop("num_frames")
    model = _Remembering(transformer)
    report = bars.stage("sampling", "step")

    def check(step: int, steps: int, t: Tensor, z: Tensor) -> None:
        if not is_finite(z):
            layer = find_bad_layer(transformer, model.repeat)
            raise NonFiniteError(_step_message(step, steps, layer, request))
        changed = None if after_step is None else after_step(step, t, z)
        if changed is not None and changed is not z:
            z.copy_(changed)
        report(step + 1, steps)

    # Open-Sora always passes a mask of ones, which changes no number but draws noise at every
    # step. Without it the same frames come out and less is computed.
    ones = torch.ones(z.shape[0], z.shape[2], device=z.device)
    timed = dataclasses.replace(scheduler, num_sampling_steps=request.num_inference_steps)
    latent: Tensor = timed.sample(
        model,
        z,
        y=y,
        y_null=y_null,
        model_kwargs={"mask": mask, **conditions},
        num_frames=num_frames,
        guidance_scale=request.guidance_scale,
        mask=ones if request.noise == "upstream" else None,
        callback=check,
    )
    return latent.float()


def decode_latent(vae: Any, z: Tensor, request: Request, bars: Progress) -> Tensor:
    """Return the frames [B, 3, T, H, W] of a latent, finite, float32, about [-1, 1].

    Raises:
        NonFiniteError: NaN or infinity; names chunk, frame and layer.
    """
    z = z.to(next(vae.parameters()).device)
    video: Tensor = vae.decode(z, request.num_frames, progress=bars.stage("decoding", "frame"))
    if not is_finite(video):
        good = video.isfinite().movedim(2, 0).flatten(1).all(1)
        frame = int(good.int().argmin())
        chunk = frame // (vae.micro_frame_size or request.num_frames)
        layer = find_bad_layer(vae, lambda: vae.decode(z, request.num_frames))
        raise NonFiniteError(
            f"decoding gave NaN or infinity in chunk {chunk}, frame {frame} of {len(good)}, first "
            f"in {layer or 'the output'}; nothing was written. Check the VAE's weights, or use "
            "--dtype fp32"
        )
    return video.float()


def format_frames(video: Tensor, output_type: str) -> Any:
    """Convert frames [B, 3, T, H, W] in [-1, 1] to "np", "pt" or "pil"; "latent" passes through."""
    if output_type == "latent":
        return video
    if output_type == "pt":
        return ((video.clamp(-1, 1) + 1) / 2).transpose(1, 2)
    frames = to_uint8(video)
    if output_type == "np":
        return frames
    from PIL import Image

    return [[Image.fromarray(frame) for frame in clip] for clip in frames]


def _step_message(step: int, steps: int, layer: str | None, request: Request) -> str:
    """Say where sampling went wrong and what to try."""
    where = f"first in layer {layer}"
    if layer is None:
        guidance = f"{request.guidance_scale:g}"
        where = f"in the update, not in a layer: guidance_scale {guidance} may be too large"
    return (
        f"sampling gave NaN or infinity at step {step + 1} of {steps}, {where}; nothing was "
        "written. Check the transformer's weights, or use --dtype fp32"
    )


@contextmanager
def evaluating(*modules: Any) -> Iterator[None]:
    """Switch modules to evaluation mode: in training, captions would be dropped at random."""
    training = [module for module in modules if getattr(module, "training", False)]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()
