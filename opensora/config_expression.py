"""Evaluate the expressions that a configuration file may hold: a closed set, walked, never run."""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from opensora.errors import UsageError

#: Longest integer (bits) and sequence that arithmetic may produce: `9**9**9` must not hang.
MAX_BITS = 4096
MAX_ITEMS = 100_000

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def suggest(word: str, known: Iterable[str], *, shown: str = "{}") -> str:
    """Return "; did you mean X?" for the known word closest to a wrong one, else ""."""
    close = difflib.get_close_matches(word, sorted(set(known)), n=1, cutoff=0.55)
    return f"; did you mean {shown.format(close[0])}?" if close else ""


def copy_dicts(value: Any) -> Any:
    """Copy nested dicts; other values are shared."""
    if isinstance(value, Mapping):
        return {key: copy_dicts(item) for key, item in value.items()}
    return value


def refused(node: ast.AST, path: Path) -> UsageError:
    """Return the error for a statement or expression outside the allowed form."""
    text = ast.unparse(node).splitlines()[0]
    shown = text if len(text) <= 60 else text[:57] + "..."
    return UsageError(
        f"{path}:{getattr(node, 'lineno', 1)}: `{shown}` is not allowed: configuration files are "
        "parsed, not run; use assignments of literals, dict(...), earlier names and arithmetic"
    )


def _is_plain(value: object) -> bool:
    """Tell whether a constant is text, a finite number, a truth value or None."""
    if isinstance(value, float):
        return math.isfinite(value)  # 1e999 parses as infinity
    return isinstance(value, (str, int, type(None)))


class Evaluator:
    """Compute the value of an expression of the allowed form."""

    def __init__(self, path: Path, names: Mapping[str, Any]) -> None:
        self.path, self.names = path, names

    def value(self, node: ast.expr) -> Any:
        """Return the value; UsageError with file:line for any other form."""
        try:
            return self._value(node)
        except RecursionError:
            raise UsageError(f"{self.path}:{node.lineno}: nested too deeply") from None

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and _is_plain(node.value):
            return node.value
        if isinstance(node, ast.List):
            return [self._value(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self._value(item) for item in node.elts)
        if isinstance(node, ast.Dict):
            return self._dict(node)
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            operand = self._value(node.operand)
            if isinstance(operand, (int, float)) and not isinstance(operand, bool):
                return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return self._binary(node)
        if isinstance(node, ast.Call):
            return self._dict_call(node)
        raise refused(node, self.path)

    def _dict(self, node: ast.Dict) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            value = self._value(item)
            if key is None:
                if not isinstance(value, dict):
                    raise refused(item, self.path)
                result.update(value)
                continue
            name = self._value(key)
            try:
                result[name] = value
            except TypeError:
                raise refused(key, self.path) from None
        return result

    def _dict_call(self, node: ast.Call) -> dict[str, Any]:
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or node.args:
            raise refused(node, self.path)
        result: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self._value(keyword.value)
            if keyword.arg is not None:
                result[keyword.arg] = value
            elif isinstance(value, dict):
                result.update(value)
            else:
                raise refused(keyword.value, self.path)
        return result

    def _name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise UsageError(
                f"{self.path}:{node.lineno}: {node.id} is not assigned above"
                + suggest(node.id, self.names)
            )
        return copy_dicts(self.names[node.id])

    def _binary(self, node: ast.BinOp) -> Any:
        left, right = self._value(node.left), self._value(node.right)
        numbers = all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in (left, right)
        )
        joined = isinstance(node.op, ast.Add) and any(
            isinstance(left, kind) and isinstance(right, kind) for kind in (str, list, tuple)
        )
        repeated = (
            isinstance(node.op, ast.Mult)
            and isinstance(left, (str, list, tuple))
            and isinstance(right, int)
            and len(left) * right <= MAX_ITEMS
        )
        if not (numbers or joined or repeated):
            raise refused(node, self.path)
        power = isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int)
        try:
            if power and left.bit_length() * abs(right) > MAX_BITS:
                raise OverflowError("the power is too large")
            result = _BINARY[type(node.op)](left, right)
        except (ArithmeticError, ValueError) as error:
            raise UsageError(f"{self.path}:{node.lineno}: {error}") from None
        finite = not isinstance(result, (float, complex)) or (
            isinstance(result, float) and math.isfinite(result)
        )
        if not finite or (isinstance(result, int) and result.bit_length() > MAX_BITS):
            raise UsageError(f"{self.path}:{node.lineno}: the result is not a usable number")
        return result
