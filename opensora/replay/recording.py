"""Open a recorded case of tensors and hand out its weights and inputs.

Tensors are named `sd.<parameter>`, `in.<input>`, `out.<output>`, `out.mid.<submodule>`,
`grad.<parameter>` and `grad.@in.<input>`; metadata values are strings, most of them JSON.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

#: Precisions that round so much that a recording is judged by its own error.
LOW_PRECISION = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
}
_PRECISIONS = {
    **LOW_PRECISION,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}
_SUFFIX = re.compile(rf"(.+)_({'|'.join(LOW_PRECISION)})")


class Unsupported(Exception):  # noqa: N818  not a failure of this library
    """Say that this library has nothing that a case could be run on."""


class Mismatch(Exception):  # noqa: N818
    """Say why a case that was run does not agree, where no number can."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Hold one recorded case, seen in one working precision.

    Attributes:
        metadata: as stored.
        tensors: as stored, by full name.
        dtype: in which the case is run.
        rounding: to which weights and inputs are rounded before they are widened to `dtype`. So
            a low-precision case is run in float32: what its rounding is measured against.
        used: inputs that a run has asked for; shared by all views of a case.
        notes: remarks of runs for whoever reads the verdict; shared too.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype = torch.float32
    rounding: torch.dtype | None = None
    used: set[str] = dataclasses.field(default_factory=set)
    notes: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def load(cls, path: Path) -> Case:
        """Read a `.safetensors` file; its errors are those of the safetensors package."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(file.metadata() or {}, tensors)

    def seen_in(self, dtype: torch.dtype, rounding: torch.dtype | None = None) -> Case:
        """Return the case in another working precision."""
        return dataclasses.replace(self, dtype=dtype, rounding=rounding)

    def read(self, key: str, default: Any = None) -> Any:
        """Return a metadata entry, decoded if it is JSON, else as text."""
        text = self.metadata.get(key)
        if text is None:
            return default
        try:
            return json.loads(text)
        except ValueError:
            return text

    def config(self, key: str = "config") -> dict[str, Any]:
        """Return a metadata entry that holds an object; {} if it is absent."""
        value = self.read(key, {})
        if not isinstance(value, dict):
            raise Mismatch(f"metadata {key} is not an object: {str(value)[:60]!r}")
        return value

    @property
    def class_name(self) -> str:
        """The last part of the metadata entry `cls`, or ""."""
        return self.metadata.get("cls", "").rpartition(".")[2]

    @property
    def recorded_dtype(self) -> torch.dtype:
        """The precision that the metadata name; float32 if they name none."""
        text = self.metadata.get("dtype", "float32").strip('"').removeprefix("torch.")
        if text not in _PRECISIONS:
            raise Mismatch(f"metadata name the unknown dtype {text!r}")
        return _PRECISIONS[text]

    def names(self, prefix: str) -> list[str]:
        """List the tensors under a prefix such as "in.", without the prefix, sorted."""
        return sorted(n.removeprefix(prefix) for n in self.tensors if n.startswith(prefix))

    def recorded(self) -> dict[str, Tensor]:
        """Return what the original computed: every `out.` and `grad.` tensor by full name."""
        return {n: t for n, t in self.tensors.items() if n.startswith(("out.", "grad."))}

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the state dict under a prefix in the working precision."""
        start = f"sd.{prefix}"
        return {
            name.removeprefix(start): self._cast(tensor)
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }

    def given(self, name: str) -> Tensor:
        """Return an input as stored."""
        if f"in.{name}" not in self.tensors:
            raise Mismatch(f"the input in.{name} is missing")
        self.used.add(name)
        return self.tensors[f"in.{name}"]

    def input(self, name: str) -> Tensor:
        """Return an input in the working precision; integers and bools as stored."""
        return self._cast(self.given(name))

    def optional(self, name: str) -> Tensor | None:
        """Return `input(name)`, or None if there is none."""
        return self.input(name) if f"in.{name}" in self.tensors else None

    def _cast(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return (tensor if self.rounding is None else tensor.to(self.rounding)).to(self.dtype)


def split_precision(name: str) -> tuple[str, torch.dtype | None]:
    """Split "out.y_bf16" into ("out.y", torch.bfloat16); other names come back with None."""
    match = _SUFFIX.fullmatch(name)
    return (match[1], LOW_PRECISION[match[2]]) if match else (name, None)
