"""Draw the noise of a sampling run so that a seed means the same clip in every batch.

`per-sample` (the default): sample i has its own CPU generator seeded with seed + i, so a clip does
not depend on the batch size, the other prompts or the device. `upstream`: one draw for the whole
batch from the global generator of the device, for same-seed runs against Open-Sora.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opensora.errors import UsageError

NOISE_MODES = ("per-sample", "upstream")

#: Noise of masked runs: a function (step, z) -> tensor like z, one tensor a step, or None (global).
StepNoise = Callable[[int, Tensor], Tensor] | Sequence[Tensor] | Tensor | None


def sample_seeds(seed: int | Sequence[int], first_index: int, batch: int) -> list[int]:
    """Return one seed per sample: seed + first_index + i, or the given list itself."""
    if isinstance(seed, int):
        return [seed + first_index + i for i in range(batch)]
    if len(seed) != batch:
        raise UsageError(f"expected {batch} seeds, one per sample of the batch, got {len(seed)}")
    return list(seed)


def initial_noise(
    shape: Sequence[int],
    seed: int | Sequence[int],
    first_index: int = 0,
    mode: str = "per-sample",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the latent that sampling starts from.

    Args:
        shape: [B, C, T, H, W].
        seed: seed of sample 0 of the run, or one seed per sample of this batch.
        first_index: index in the run of the batch's first sample.
        mode: "per-sample" draws float32 on the CPU from a generator per sample; "upstream" draws
            the batch at once on `device` in `dtype` after torch.manual_seed(seed), which changes
            the global generator.
        device: where the result lies.
        dtype: of the result.

    Returns:
        Standard normal noise [B, C, T, H, W].

    Raises:
        UsageError: unknown mode, wrong number of seeds, or a seed list in "upstream" mode.
    """
    if mode == "upstream":
        if not isinstance(seed, int):
            raise UsageError('noise mode "upstream" takes one seed for the whole batch')
        torch.manual_seed(seed)
        return torch.randn(tuple(shape), device=device, dtype=dtype)
    if mode != "per-sample":
        raise UsageError(f"noise mode {mode!r} is unknown; use one of {', '.join(NOISE_MODES)}")
    seeds = sample_seeds(seed, first_index, shape[0])
    return torch.stack([_normal(shape[1:], value) for value in seeds]).to(device, dtype)


def step_noise(
    seed: int | Sequence[int], first_index: int = 0, *, batch: int
) -> Callable[[int, Tensor], Tensor]:
    """Return the per-sample noise function of a masked run, for `RFlow.sample(noise=...)`.

    The noise of a step depends on the sample's seed and the step alone, so a run that resumes at
    step k draws what the uninterrupted one drew. Arguments as in `initial_noise`.
    """
    seeds = sample_seeds(seed, first_index, batch)

    def draw(step: int, z: Tensor) -> Tensor:
        return torch.stack([_normal(z.shape[1:], _mix(value, step)) for value in seeds]).to(z)

    return draw


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    """Draw float32 noise on the CPU from a fresh generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator)


def _mix(seed: int, step: int) -> int:
    """Derive a 63-bit seed for one step, unrelated to the seeds of neighbouring samples."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
