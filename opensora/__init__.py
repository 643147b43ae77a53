"""Generate and train videos with Open-Sora models; every kernel has a plain PyTorch reference.

Importing this package loads torch and the compiled CPU kernels. It imports no model and no
Triton, and never initialises CUDA.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

# Read by OpenMP when torch loads. A waiting thread that spins holds a core that another process
# needs: beside one busy process on two cores, a tiny clip took 15 s spinning and 0.8 s sleeping.
# Alone, sleeping costs a little: 0.8 to 1.2 s against 0.7 to 0.9 s (three pairs).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if sys.argv[0].endswith("/opensora") or sys.orig_argv[1:3] == ["-m", "opensora"]:
    from opensora.program import leave_on_interrupt

    leave_on_interrupt()  # loading torch takes seconds and may swallow a Ctrl-C

from opensora import _extension as _extension

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline as OpenSoraPipeline

__version__ = "0.1.0"

__all__ = ["OpenSoraPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `OpenSoraPipeline` on first use, so that kernels alone stay quick to import."""
    if name == "OpenSoraPipeline":
        from opensora.pipeline import OpenSoraPipeline

        return OpenSoraPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
