"""Load the compiled kernels, if this installation has them.

The libraries hold implementations only (`csrc/`); the schemas are defined in `opensora/ops/`.
Without them every op still works: on a CPU the PyTorch references serve, on a GPU Triton's kernels.
OPENSORA_LIBRARY names another build of the CPU's, such as the one of `make sanitize`. The GPU's is
loaded where torch was built with CUDA; no GPU is asked for, and none initialised.
"""

from __future__ import annotations

import ctypes
import json
import os
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
LIBRARY = "_C.abi3.so"
CUDA_LIBRARY = "_C_cuda.abi3.so"
INSTRUCTION_SETS = ("plain", "avx2", "avx512", "avx512_bf16")  # the order of csrc/simd.h


def _load(path: Path) -> str | None:
    """Load a library and return its path, or None where the package was built without it.

    Raises:
        ImportError: The file is there but cannot be loaded.
    """
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


path: str | None = _load(
    Path(os.environ.get("OPENSORA_LIBRARY") or str(files("opensora") / LIBRARY))
)
cuda_path: str | None = None
_cuda_problem: str | None = None
if torch.version.cuda is not None:
    try:
        cuda_path = _load(Path(str(files("opensora") / CUDA_LIBRARY)))
    except ImportError as error:  # it serves only who asks for it, so it must not stop the others
        _cuda_problem = str(error)


def why_no_cuda() -> str:
    """Say why no CUDA kernels in C++ are loaded, and what would change it."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if _cuda_problem is not None:
        return _cuda_problem
    return _note("skipped_cuda") or f"{CUDA_LIBRARY} is not in {PACKAGE}"


def cuda_is_broken() -> bool:
    """Tell whether there is a library of CUDA kernels that cannot be loaded."""
    return _cuda_problem is not None


def cuda_version() -> str:
    """Return the hash of the CUDA library: what tells this build of its kernels from any other.

    Raises:
        OSError: There is no library.
    """
    if cuda_path is None:
        raise FileNotFoundError("no CUDA library")
    return f"cuda-{sha256(Path(cuda_path).read_bytes()).hexdigest()[:16]}"


def describe() -> tuple[str, bool]:
    """Say what compiled kernels there are, or why there are none; False if that is a fault."""
    if path is not None:
        return f"C++ for {instruction_set()}", True
    note = _note("skipped")
    if note is not None:
        return f"none: {note}", True
    return f"WRONG  they were built, but {LIBRARY} is not in {PACKAGE}", False


def _note(key: str) -> str | None:
    """Return why setup.py left kernels out; None if it built them."""
    try:
        note = json.loads((PACKAGE / "_build.json").read_text("utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):  # setup.py did not run here
        return "nothing was built in this checkout"
    return None if note is None else f"when this was installed, {note}"


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
