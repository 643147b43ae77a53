"""Describe how a clip was made, completely enough to make it again."""

from __future__ import annotations

import dataclasses
import platform
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import opensora
from opensora.checkpoint import weights_digest
from opensora.errors import WeightsError
from opensora.request import Request

_PACKAGES = ("torch", "transformers", "safetensors", "av", "numpy")


def describe_run(
    settings: Mapping[str, Any],
    request: Request,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the part of the recipe that all clips of a run share, as JSON values.

    Args:
        settings: effective configuration.
        request: sizes and sampling settings.
        device: of the models.
        dtype: of transformer and VAE.
        weights: part -> source and digest.
    """
    return {
        "program": f"opensora {opensora.__version__}",
        "request": dataclasses.asdict(request),
        "settings": dict(settings),
        "weights": dict(weights),
        "dtype": str(dtype).removeprefix("torch."),
        "device": describe_device(device),
        "kernels": describe_kernels(device),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def describe_device(device: torch.device) -> str:
    """Name the device: "cuda: NVIDIA H100", or the processor's instruction set."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def describe_kernels(device: torch.device) -> dict[str, str]:
    """Return op -> what serves it on the device: "C++", "Triton" or "PyTorch reference".

    The reference also where this process found a kernel wrong (`opensora/trust.py`).
    """
    import opensora.functional  # noqa: F401  (defines the ops)
    from opensora import trust
    from opensora.ops import _library

    failed = trust.failures(device)
    return {
        op.name.removesuffix("_forward"): (op.family not in failed and op.kernel(device.type))
        or "PyTorch reference"
        for op in _library.registry
        if not op.name.endswith("_backward")
    }


def digests_in_background(sources: Mapping[str, str]) -> Callable[[], dict[str, Any]]:
    """Hash weights while the models work; the returned function waits for the result.

    Args:
        sources: part -> folder or file of its weights.

    Returns:
        A function that returns part -> {"source", "digest"}; a digest is None where the weights
        cannot be read a second time.
    """
    result: dict[str, Any] = {}

    def work() -> None:
        for part, source in sources.items():
            digest = None
            # The weights were loaded: a clip without a digest is better than no clip.
            with suppress(WeightsError, OSError):
                digest = weights_digest(source)
            result[part] = {"source": _shown(source), "digest": digest}

    thread = threading.Thread(target=work, name="weights-digest", daemon=True)
    thread.start()

    def wait() -> dict[str, Any]:
        thread.join()
        return result

    return wait


def _shown(source: str) -> str:
    """Shorten the path of the built-in model, which depends on the installation alone."""
    root = Path(__file__).parent
    path = Path(source)
    return f"opensora/{path.relative_to(root)}" if path.is_relative_to(root) else source


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
