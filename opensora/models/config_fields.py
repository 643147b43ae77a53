"""Read a configuration dictionary into a frozen dataclass, naming keys that do not belong."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from opensora.errors import UsageError

# Bookkeeping that diffusers, transformers and this library write beside the architecture.
BOOKKEEPING = frozenset(
    {"architectures", "dtype", "family", "model_type", "torch_dtype"}
    | {"transformers_version", "type"}
)


def read_fields(
    cls: type, data: Mapping[str, Any], *, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Return the entries of `data` that are fields of the dataclass `cls`, lists turned to tuples.

    Keys that start with an underscore, `BOOKKEEPING` and `ignored` are dropped.

    Raises:
        UsageError: a key is none of these; the message suggests the nearest field.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    fields: dict[str, Any] = {}
    for key, value in data.items():
        if key in names:
            fields[key] = tuple(value) if isinstance(value, list) else value
        elif not (key.startswith("_") or key in BOOKKEEPING or key in ignored):
            near = difflib.get_close_matches(key, [*names, *ignored], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
            raise UsageError(f"{cls.__name__}: unknown key {key!r}; {hint}")
    return fields
