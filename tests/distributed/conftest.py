"""Start the ranks of a test as processes of their own, as torchrun would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Ranks = Callable[..., list[Any]]


def start_ranks(script: str, size: int, *arguments: str, timeout_s: float = 100.0) -> list[Any]:
    """Run `script ARGUMENTS` on every rank; return what each wrote last, read as JSON.

    A rank that fails ends the others; its output is the failure's message.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    until = time.monotonic() + timeout_s
    try:
        said = [rank.communicate(timeout=max(1.0, until - time.monotonic()))[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [text for rank, text in zip(ranks, said, strict=True) if rank.returncode]
    assert not failed, "\n\n".join(failed)
    return [json.loads(text.strip().splitlines()[-1]) for text in said]


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Return what starts the ranks of a test."""
    return start_ranks
