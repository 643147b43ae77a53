"""Import transformers, late and without mistaking this repository's `kernels` for PyPI's.

transformers probes for the PyPI package `kernels` and imports what it finds. Started from the
repository's root (`python -m opensora`, PYTHONPATH=.), it finds the folder of Triton kernels, which
refuses to be imported under that name, and transformers fails. So the root leaves sys.path while
transformers looks; the answer is cached by transformers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from opensora.errors import WeightsError

_ROOT = Path(__file__).resolve().parents[3]


@cache
def load_transformers() -> Any:
    """Return the module transformers, ready to build T5 models; raise WeightsError if absent."""
    saved = list(sys.path)
    if (_ROOT / "kernels").is_dir():
        sys.path[:] = [entry for entry in saved if Path(os.path.realpath(entry)) != _ROOT]
    try:
        import transformers
        from transformers import AutoTokenizer, T5EncoderModel  # noqa: F401  (fills the caches)
    except ImportError as error:
        raise WeightsError(
            f"text encoder: transformers cannot be imported ({error}); install it with "
            "pip install 'transformers>=5.23,<6' sentencepiece protobuf"
        ) from error
    finally:
        sys.path[:] = saved
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars: programs show their own, libraries show none."""
    logging = load_transformers().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
