"""Load the compiled CPU kernels, if this installation has them.

The library holds implementations only (`csrc/`); the schemas are defined in `opensora/ops/`.
Without it every op still works: the PyTorch references serve. OPENSORA_LIBRARY names another build
of it, such as the one of `make sanitize`.
"""

from __future__ import annotations

import ctypes
import json
import os
from importlib.resources import files
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
LIBRARY = "_C.abi3.so"
INSTRUCTION_SETS = ("plain", "avx2", "avx512", "avx512_bf16")  # the order of csrc/simd.h


def _load() -> str | None:
    """Load the library and return its path, or None where the package was built without it.

    Raises:
        ImportError: The file is there but cannot be loaded.
    """
    path = Path(os.environ.get("OPENSORA_LIBRARY") or str(files("opensora") / LIBRARY))
    if not path.is_file():
        return None
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"cannot load the compiled kernels {path} with torch {torch.__version__}: {error}. "
            "Rebuild them with `pip install --no-build-isolation .`, or delete the file to run "
            "on the PyTorch references."
        ) from error
    return str(path)


path: str | None = _load()


def describe() -> tuple[str, bool]:
    """Say what compiled kernels there are, or why there are none; False if that is a fault."""
    if path is not None:
        return f"C++ for {instruction_set()}", True
    try:
        note = json.loads((PACKAGE / "_build.json").read_text("utf-8"))["skipped"]
    except (OSError, ValueError, KeyError, TypeError):  # setup.py did not run here
        return "none: nothing was built in this checkout", True
    if note is None:
        return f"WRONG  they were built, but {LIBRARY} is not in {PACKAGE}", False
    return f"none: when this was installed, {note}", True


def instruction_set() -> str | None:
    """Return what the CPU kernels run on, one of `INSTRUCTION_SETS`; None without kernels."""
    return None if path is None else INSTRUCTION_SETS[ctypes.CDLL(path).opensora_simd()]


def use_instruction_set(name: str) -> None:
    """Run the CPU kernels of this process on one of `INSTRUCTION_SETS`; for tests and benches.

    Raises:
        ValueError: There are no compiled kernels, or this processor lacks the set.
    """
    if path is None or not ctypes.CDLL(path).opensora_use_simd(INSTRUCTION_SETS.index(name)):
        why = "none are compiled" if path is None else "this processor lacks the instructions"
        raise ValueError(f"cannot run {name} kernels: {why}")
