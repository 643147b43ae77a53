"""Load the compiled CPU kernels, if this installation has them.

The library holds implementations only (`csrc/`); the schemas are defined in `opensora/ops/`.
Without it every op still works: the PyTorch references serve.
"""

from __future__ import annotations

import ctypes
from importlib.resources import files

import torch

LIBRARY = "_C.abi3.so"


def _load() -> str | None:
    """Load the library and return its path, or None where the package was built without it.

    Raises:
        ImportError: The file is there but cannot be loaded.
    """
    path = files("opensora") / LIBRARY
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


def cpu_capability() -> str | None:
    """Return the instruction set the CPU kernels run on: "avx512", "avx2", "plain" or None.

    None means that this installation has no compiled kernels. `OPENSORA_CPU` asks for one of the
    sets; it is read once, when the first kernel runs.

    Raises:
        RuntimeError: `OPENSORA_CPU` names a set that this processor lacks or that does not exist.
    """
    if path is None:
        return None
    query = ctypes.CDLL(path).opensora_cpu_capability
    query.restype = ctypes.c_char_p
    name: bytes | None = query()
    if name is None:
        raise RuntimeError(
            "OPENSORA_CPU asks for an instruction set that this processor does not have: "
            "unset it, or set it to plain, avx2 or avx512"
        )
    return name.decode()
