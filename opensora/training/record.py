"""Record a run's settings in its folder, and say what a resumed run changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora.files import write_text
from opensora.train_config import TrainConfig

FILE_NAME = "config.json"
#: Settings of a start, not of the run.
_START = ("load", "start_from_scratch", "outputs", "device", "quiet", "dry_run", "timeout")


def record_settings(folder: Path, config: TrainConfig) -> list[str]:
    """Write the settings to the run's folder; returns what differs from those that were there."""
    path = folder / FILE_NAME
    text = json.dumps(dataclasses.asdict(config), indent=1, default=str)
    try:
        before = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        before = None  # a new run, or one that was killed while it wrote them
    write_text(path, text + "\n")
    return [] if not isinstance(before, dict) else differences(before, json.loads(text))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for every setting that has another value: "lr: 0.0001 -> 0.0002"."""
    old, new = dict(_flatten(before)), dict(_flatten(now))
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in _START
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("model.depth", 28) of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
