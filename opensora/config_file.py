"""Read flat Python configuration files without running them, and apply overrides to the result.

A configuration is a file of assignments, in the form that Open-Sora publishes:

    _base_ = ["../base.py"]
    num_frames = 51
    model = dict(type="STDiT3-XL/2", from_pretrained=None, qk_norm=True)

Values are literals, lists, tuples, dicts, `dict(...)`, names assigned above, and arithmetic on
constants. The file is parsed into a syntax tree and walked; anything else in it (an import, a call,
an attribute) is an error with its line, so a configuration from a stranger cannot do anything.
Names that begin with an underscore are private to the file.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.config_expression import Evaluator, copy_dicts, refused, suggest
from opensora.errors import UsageError

__all__ = ["ConfigFile", "apply_overrides", "load_config_file", "parse_value", "suggest"]

MAX_BYTES = 1 << 20

_CONSTANTS = {"true": True, "false": False, "none": None}


class ConfigFile(dict[str, Any]):
    """Hold the values of a configuration file and where each one was written.

    Attributes:
        path: the file as it was named by the caller.
        lines: key -> (file, line) of its assignment.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.lines: dict[str, tuple[Path, int]] = {}

    def where(self, key: str) -> str:
        """Return "file:line" of a key's assignment, or the file alone for an unknown key."""
        file, line = self.lines.get(key, (self.path, 0))
        return f"{file}:{line}" if line else str(file)


def load_config_file(path: str | Path) -> ConfigFile:
    """Parse a configuration file and the files it names in `_base_`.

    A key of the file replaces the same key of a base; two dicts merge key by key unless the file's
    dict holds `_delete_=True`.

    Args:
        path: a `.py` file in the form described above. `_base_` paths are relative to it.

    Returns:
        Top-level name -> value, without names that begin with an underscore.

    Raises:
        UsageError: the file is missing, too large, not UTF-8, not in this form, or a base cycle.
    """
    return _load(Path(path), ())


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration with dotted keys replaced: {"model.qk_norm": False}.

    Args:
        config: nested dicts, unchanged by the call.
        overrides: dotted key -> value. Missing dicts on the way are made.

    Raises:
        UsageError: a part of the path exists and is not a dict.
    """
    result: dict[str, Any] = copy_dicts(config)
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        node = result
        for depth, part in enumerate(parents):
            key = _key(node, part)
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            elif not isinstance(child, dict):
                taken = ".".join(parents[: depth + 1])
                raise UsageError(f"cannot set {dotted}: {taken} is {child!r}, not a dict")
            node = child
        node[_key(node, last)] = value
    return result


def _key(node: Mapping[Any, Any], part: str) -> Any:
    """Return a part of a dotted key as the dict spells it: 51 in {51: ..., 102: ...}."""
    numbers = part.isdecimal() and any(isinstance(key, int) for key in node)
    return int(part) if numbers and part not in node else part


def parse_value(text: str) -> Any:
    """Read one value of the command line: a Python literal, true/false/none, or the text."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _load(path: Path, parents: tuple[Path, ...]) -> ConfigFile:
    """Parse one file after its bases; `parents` are the files that led here."""
    tree = _parse(path)
    if path.resolve() in (parent.resolve() for parent in parents):
        raise UsageError(f"{path}: _base_ leads back to this file; remove it from the cycle")
    own = ConfigFile(path)
    private: dict[str, Any] = {}
    bases = ConfigFile(path)
    for statement in tree.body:
        if _is_docstring(statement):
            continue
        for name, value, line in _assignment(statement, path, {**bases, **private, **own}):
            if name == "_base_":
                bases = _load_bases(value, path, line, parents)
            elif name.startswith("_"):
                private[name] = value
            else:
                own[name] = value
                own.lines[name] = (path, line)
    result = ConfigFile(path)
    result.lines = {**bases.lines, **own.lines}
    for name in [*bases, *(name for name in own if name not in bases)]:
        result[name] = _merge(bases.get(name), own[name]) if name in own else bases[name]
    return result


def _parse(path: Path) -> ast.Module:
    """Read and parse a file, turning every failure into one sentence."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"configuration {path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UsageError(f"configuration {path} is a folder; name a .py file in it") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the configuration {path}: {why}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"configuration {path} is larger than {MAX_BYTES} bytes: not a config")
    try:
        return ast.parse(data, filename=str(path))
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno or 1}: not valid Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{path}: not a configuration file: {error}") from None


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(
        getattr(statement.value, "value", None), str
    )


def _assignment(
    statement: ast.stmt, path: Path, names: Mapping[str, Any]
) -> list[tuple[str, Any, int]]:
    """Evaluate `name = value` (also `a = b = value` and `name: type = value`)."""
    value: ast.expr | None
    if isinstance(statement, ast.Assign):
        targets, value = statement.targets, statement.value
    elif isinstance(statement, ast.AnnAssign):
        targets, value = [statement.target], statement.value
    else:
        raise refused(statement, path)
    if value is None or not all(isinstance(target, ast.Name) for target in targets):
        raise refused(statement, path)
    result = Evaluator(path, names).value(value)
    return [(t.id, result, statement.lineno) for t in targets if isinstance(t, ast.Name)]


def _load_bases(value: Any, path: Path, line: int, parents: tuple[Path, ...]) -> ConfigFile:
    """Load the files of `_base_`; the same key in two bases must not hide one of them."""
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, (list, tuple)) or not all(isinstance(file, str) for file in files):
        raise UsageError(f"{path}:{line}: _base_ must be a path or a list of paths, got {value!r}")
    merged = ConfigFile(path)
    for file in files:
        base = _load(path.parent / file, (*parents, path))
        for key in base:
            if key in merged:
                raise UsageError(
                    f"{path}:{line}: {key} is set by two bases, {merged.where(key)} and "
                    f"{base.where(key)}; keep it in one of them"
                )
        merged.update(base)
        merged.lines.update(base.lines)
    return merged


def _merge(base: Any, own: Any) -> Any:
    """Merge a dict over a base's dict of the same name; any other value replaces."""
    if not isinstance(own, dict):
        return own
    values = {key: value for key, value in own.items() if key != "_delete_"}
    if not isinstance(base, dict) or own.get("_delete_"):
        return values
    merged = dict(base)
    for key, value in values.items():
        merged[key] = _merge(base.get(key), value)
    return merged
