"""Choose the device and the precision of a run, and refuse what this machine does not have."""

from __future__ import annotations

import torch

from opensora.config_file import suggest
from opensora.errors import UsageError

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return a device that exists here.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps"; None or "auto": a GPU if there is one, else the CPU.

    Raises:
        UsageError: unknown name, or a device that this machine or this torch lacks.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = suggest(str(name), ("auto", "cpu", "cuda", "mps"))
        raise UsageError(
            f"device {name!r} is unknown{hint} (auto, cpu, cuda, cuda:1, mps)"
        ) from None
    if device.type == "cpu":
        return device
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) < count:
            return device
        raise UsageError(f"device {name!r}: torch sees {count} CUDA devices here; use --device cpu")
    if device.type == "mps" and torch.backends.mps.is_available():
        return device
    raise UsageError(f"device {name!r} is not available here; use --device auto or cpu")


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the working precision; None: bfloat16 on a GPU that has it, else float32.

    Raises:
        UsageError: unknown name.
    """
    if isinstance(name, torch.dtype):
        return name
    if name is None:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown{suggest(name, DTYPES)} (fp32, bf16, fp16)")
    return DTYPES[name]
