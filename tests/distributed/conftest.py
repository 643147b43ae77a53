"""Start the ranks of a test as processes of their own, as torchrun would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Forks

Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def ranks(forks: Forks) -> Ranks:
    """Return what runs `script ARGUMENTS` on every rank; it returns what each wrote last, JSON."""

    def start(script: str, size: int, *arguments: str) -> list[Any]:
        said = forks.ranks(size, Path(script), *arguments)
        return [json.loads(text.strip().splitlines()[-1]) for text in said]

    return start


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """Compute on one thread."""
