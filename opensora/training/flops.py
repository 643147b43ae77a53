"""Count the floating-point operations of a model and know those that a device can do.

Model FLOPs: one multiplication and addition is 2; only what the architecture asks for counts, not
what is computed a second time to save memory.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache

import torch

from opensora.models.stdit import STDiT3Config

#: Width of the sinusoids that timestep and frame rate are embedded from.
_SINUSOIDS = 256

#: Dense bfloat16 matrix FLOP/s by parts of the device's name, the more special name first.
#: Makers' data sheets, without sparsity.
PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("GH200", 989.4e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364.2e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("MI300X", 1307.4e12),
    ("MI250X", 383e12),
)


def token_grid(config: STDiT3Config, latent: tuple[int, int, int]) -> tuple[int, int]:
    """Return the frames T and the tokens a frame S that a latent [t, h, w] becomes."""
    frames, rows, columns = (
        math.ceil(size / patch) for size, patch in zip(latent, config.patch_size, strict=True)
    )
    return frames, rows * columns


def count_tokens(config: STDiT3Config, latent: tuple[int, int, int]) -> int:
    """Return the tokens N = T * S that a latent [t, h, w] becomes, padding included."""
    frames, spatial = token_grid(config, latent)
    return frames * spatial


def forward_flops(config: STDiT3Config, latent: tuple[int, int, int], text_tokens: float) -> float:
    """Return the FLOPs of one forward of one sample.

        2 D [(12 + 4 r) N C^2 + 4 L C^2 + 4 N L C] + 4 D N C (S + T) + embeddings and last layer

    D depth, C width, r mlp_ratio, N = T S tokens. Equal to what `FlopCounterMode` counts.

    Args:
        config: the architecture.
        latent: (t, h, w), latent frames, rows and columns.
        text_tokens: L, tokens of the caption that count; the mean of a batch will do.
    """
    frames, spatial = token_grid(config, latent)
    n, c, depth, text = frames * spatial, config.hidden_size, config.depth, text_tokens
    patch = math.prod(config.patch_size)
    hidden = int(c * config.mlp_ratio)
    block = 12 * n * c * c + 4 * n * c * hidden + 4 * text * c * c + 4 * n * text * c
    total = 2 * depth * block + 4 * depth * n * c * (spatial + frames)
    total += 2 * n * c * patch * (config.in_channels + config.out_channels)
    if not config.skip_y_embedder:
        total += 2 * config.model_max_length * (config.caption_channels * c + c * c)
    return total + 2 * 2 * (_SINUSOIDS * c + c * c) + 2 * c * 6 * c


def training_flops(config: STDiT3Config, latent: tuple[int, int, int], text_tokens: float) -> float:
    """Return the FLOPs of a forward and backward of one sample, three times a forward's."""
    return 3 * forward_flops(config, latent, text_tokens)


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Return the dense matrix FLOP/s of a device, None if unknown.

    A GPU's come from `PEAKS` (float32 is taken as TF32, half of bfloat16, if torch may use it); a
    CPU's are measured once, by a product that takes a few milliseconds.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((value for part, value in PEAKS if part in name), None)
        if peak is None or dtype in (torch.bfloat16, torch.float16):
            return peak
        exact = torch.get_float32_matmul_precision() == "highest"
        return None if exact or dtype != torch.float32 else peak / 2
    return _measured(dtype, torch.get_num_threads()) if device.type == "cpu" else None


@lru_cache
def _measured(dtype: torch.dtype, threads: int, side: int = 768) -> float:
    """Return the FLOP/s of the fastest of a few products, `threads` being the key of the cache."""
    a = torch.full((side, side), 0.5, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
