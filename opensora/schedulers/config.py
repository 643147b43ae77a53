"""Configure a rectified flow; read and write its settings."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from opensora.errors import UsageError

CONFIG_FILE = "scheduler_config.json"
SAMPLE_METHODS = ("uniform", "logit-normal")


@dataclass(frozen=True)
class RFlowConfig:
    """Settings of a rectified flow, in upstream's names.

    Attributes:
        num_sampling_steps: Euler steps, >= 1.
        num_timesteps: value of t at pure noise.
        cfg_scale: guidance of `sample` when none is given; 1 turns guidance off.
        use_discrete_timesteps: round sampled timesteps to integers.
        use_timestep_transform: apply `timestep_transform`.
        sample_method: distribution of training timesteps, "uniform" or "logit-normal".
        loc: mean of the normal variable under the sigmoid ("logit-normal").
        scale: its standard deviation, > 0.
        transform_scale: `scale` of the transform in training. Sampling always uses 1, as upstream.
    """

    num_sampling_steps: int = 10
    num_timesteps: int = 1000
    cfg_scale: float = 4.0
    use_discrete_timesteps: bool = False
    use_timestep_transform: bool = False
    sample_method: str = "uniform"
    loc: float = 0.0
    scale: float = 1.0
    transform_scale: float = 1.0

    def __post_init__(self) -> None:
        """Reject settings that no sampler can follow."""
        for name in ("num_sampling_steps", "num_timesteps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"scheduler: {name} must be a whole number >= 1, got {value!r}")
        for name in ("cfg_scale", "loc", "scale", "transform_scale"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
            ):
                raise UsageError(f"scheduler: {name} must be a finite number, got {value!r}")
        for name in ("use_discrete_timesteps", "use_timestep_transform"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(
                    f"scheduler: {name} must be true or false, got {getattr(self, name)!r}"
                )
        if self.scale <= 0 or self.transform_scale <= 0:
            raise UsageError("scheduler: scale and transform_scale must be greater than 0")
        if self.sample_method not in SAMPLE_METHODS:
            raise UsageError(
                f"scheduler: sample_method {self.sample_method!r} is unknown; "
                f"use one of {', '.join(SAMPLE_METHODS)}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Build from a configuration with `type` "rflow" or none; reject unknown keys."""
        values = {key: value for key, value in config.items() if key != "type"}
        kind = config.get("type", "rflow")
        if kind != "rflow":
            raise UsageError(f'scheduler: type {kind!r} is not available; use type "rflow"')
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                close = difflib.get_close_matches(key, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UsageError(
                    f"scheduler: unknown key {key!r}{hint} Valid keys: {', '.join(names)}"
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration, with `type`, ready for JSON."""
        return {"type": "rflow", **asdict(self)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `<folder>/scheduler/scheduler_config.json`."""
        path = Path(folder) / "scheduler" / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, subfolder: str = "scheduler") -> Self:
        """Read `<folder>/<subfolder>/scheduler_config.json`; UsageError if it is unreadable."""
        path = Path(folder) / subfolder / CONFIG_FILE
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"scheduler: cannot read {path}: {error}") from error
        if not isinstance(config, dict):
            raise UsageError(f"scheduler: {path} must hold a JSON object")
        return cls.from_dict(config)
