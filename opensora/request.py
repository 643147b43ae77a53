"""Check what a clip is asked to be, and whether this machine can make it, before any weights.

Sizes are frames x height x width in pixels. The limits here are those of the models and of the
memory; sizes that a model was not trained for are possible and only worth a note.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensora.errors import DoesNotFitError, UsageError
from opensora.schedulers.noise import NOISE_MODES

MAX_SIDE, MAX_FRAMES, MAX_GUIDANCE = 16_384, 1_000_000, 1000

#: Frame rate that the model is told for a single image, as in training.
IMAGE_FPS = 120.0


@dataclass(frozen=True)
class Request:
    """Describe one clip and how it is sampled.

    Attributes:
        num_frames: video frames, >= 1; 1 is an image.
        height: pixels.
        width: pixels.
        fps: frames per second of the clip, > 0.
        num_inference_steps: >= 1.
        guidance_scale: finite; 1 turns guidance off.
        noise: how noise is drawn, see `opensora.schedulers.noise`.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    noise: str = "per-sample"

    @property
    def model_fps(self) -> float:
        """The frame rate that the model is told."""
        return IMAGE_FPS if self.num_frames == 1 else float(self.fps)

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.num_frames, self.height, self.width


def validate_request(
    *, defaults: Mapping[str, Any], factor: int = 8, known_sizes: Iterable[Any] = (), **given: Any
) -> Request:
    """Fill a request from defaults and check every value.

    Args:
        defaults: value of each field that is not given or None.
        factor: pixels per latent pixel: height and width must be multiples of it.
        known_sizes: (height, width) that are accepted although they are not: Open-Sora's own
            tables hold a few, such as 480x854. The clip is then up to `factor` - 1 pixels smaller.
        **given: fields of `Request`.

    Raises:
        UsageError: a value is missing, of the wrong type or out of range; the nearest valid
            sizes are named.
    """
    values = {}
    for name in Request.__dataclass_fields__:
        value = given.get(name)
        if value is None:
            value = defaults.get(name, "per-sample" if name == "noise" else None)
        if value is None:
            raise UsageError(
                f"{name} is not set and this checkpoint has no default for it; give it"
            )
        values[name] = value
    for name in ("num_frames", "height", "width", "num_inference_steps"):
        values[name] = _whole(name, values[name])
    for name in ("fps", "guidance_scale"):
        values[name] = _number(name, values[name])
    if values["fps"] <= 0 or values["fps"] > 1000:
        raise UsageError(f"fps must be greater than 0 and at most 1000, got {values['fps']:g}")
    if abs(values["guidance_scale"]) > MAX_GUIDANCE:
        raise UsageError(
            f"guidance_scale must be at most {MAX_GUIDANCE}, got {values['guidance_scale']:g}; "
            "3 to 10 is usual"
        )
    if values["noise"] not in NOISE_MODES:
        raise UsageError(f"noise {values['noise']!r} is not one of {', '.join(NOISE_MODES)}")
    request = Request(**values)
    if request.num_frames > MAX_FRAMES:
        raise UsageError(f"num_frames must be at most {MAX_FRAMES}, got {request.num_frames}")
    if (request.height, request.width) not in {tuple(size) for size in known_sizes}:
        _check_side("height", request.height, factor)
        _check_side("width", request.width, factor)
    return request


def _whole(name: str, value: Any) -> int:
    """Return a count >= 1."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    """Return a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _check_side(name: str, value: int, factor: int) -> None:
    """Refuse a side that is no multiple of the factor, naming the nearest ones that are."""
    if value > MAX_SIDE:
        raise UsageError(f"{name} must be at most {MAX_SIDE} pixels, got {value}")
    if value % factor:
        below = value // factor * factor
        nearest = " or ".join(str(side) for side in (below, below + factor) if side)
        raise UsageError(
            f"{name} must be a multiple of {factor} pixels, got {value}: use {nearest}"
        )


def training_note(request: Request, trained_sizes: Iterable[Any]) -> str | None:
    """Say that a size is outside training, listing the sizes inside; None if it is inside.

    Args:
        request: what is asked for.
        trained_sizes: (frames, height, width) triples of the checkpoint; empty if unknown.
    """
    trained = [tuple(size) for size in trained_sizes]
    if not trained or request.size in trained:
        return None
    listed = ", ".join(f"{t} frames of {w}x{h}" for t, h, w in trained[:8])
    frames = "1 frame" if request.num_frames == 1 else f"{request.num_frames} frames"
    return (
        f"{frames} of {request.width}x{request.height} is not a size that the model was trained "
        f"for; expect a worse clip. Trained: {listed}" + (", ..." if len(trained) > 8 else "")
    )


def estimate_memory(
    request: Request,
    latent_size: tuple[int, int, int],
    *,
    batch: int = 1,
    hidden_size: int = 1152,
    vae_channels: int = 128,
    vae_frames: int = 4,
    weights: int = 0,
    bytes_per_value: int = 4,
) -> int:
    """Estimate the least memory in bytes that a batch needs; the true peak may be higher.

    Transformer: ten hidden-sized values per token (residual, norm, MLP) and two samples per clip
    under guidance. VAE: three full-size feature maps of one micro batch. Clip: the decoded frames
    and their float32 copy.

    Args:
        request: the clip.
        latent_size: (T', H', W') of its latent.
        batch: clips at once.
        hidden_size: width C of the transformer.
        vae_channels: channels of the 2D decoder at full size.
        vae_frames: frames that it decodes at once.
        weights: bytes of all weights.
        bytes_per_value: of the working precision.
    """
    frames, height, width = latent_size
    tokens = frames * math.ceil(height / 2) * math.ceil(width / 2)
    guided = 1 if request.guidance_scale == 1 else 2
    transformer = guided * batch * tokens * hidden_size * 10 * bytes_per_value
    pixels = request.height * request.width
    vae = min(vae_frames, request.num_frames) * pixels * vae_channels * 3 * bytes_per_value
    clip = batch * request.num_frames * pixels * 3 * (bytes_per_value + 4)
    return weights + max(transformer, vae + clip)


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be used on a device; None if that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type != "cpu":
        return None
    limits = [_cgroup_memory(), _system_memory()]
    return min((limit for limit in limits if limit is not None), default=None)


def check_memory(needed: int, device: torch.device) -> None:
    """Raise DoesNotFitError if an estimate exceeds what the device has left."""
    available = available_memory(device)
    if available is not None and needed > available:
        raise DoesNotFitError(
            f"this request needs at least {needed / 2**30:.1f} GiB of memory and {device} has "
            f"{available / 2**30:.1f} GiB left; ask for fewer frames, a smaller size or a smaller "
            "batch_size"
        )


def _system_memory() -> int | None:
    """Return what the kernel says a new program can use."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _cgroup_memory() -> int | None:
    """Return what a container's limit leaves, page cache counted as free."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())  # ValueError for "max": no limit
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):
        return None
