"""Convert the values of configuration files and command lines to a field's type, and check them."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from opensora.errors import UsageError

#: Words for yes and no on the command line and in the environment.
WORDS = {"true": True, "yes": True, "on": True, "1": True}
WORDS |= {"false": False, "no": False, "off": False, "0": False}

_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
_NAMES |= {dict: "a dict", type(None): "None"}


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type: (int, str, NoneType) for `int | str | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def accepts(hint: Any, kind: type[Any]) -> bool:
    """Tell whether a field type holds values of `kind`: bool, dict and so on."""
    return any(member is kind or typing.get_origin(member) is kind for member in members(hint))


def length(hint: Any) -> int | str | None:
    """Return argparse's nargs: "+" for tuple[X, ...], 2 for tuple[X, X], None for one value."""
    for member in members(hint):
        if typing.get_origin(member) is tuple:
            items = typing.get_args(member)
            return "+" if items[-1] is Ellipsis else len(items)
    return None


def convert(value: Any, hint: Any, where: str, *, text: bool) -> Any:
    """Return the value as the field's type.

    Args:
        value: from a configuration file (already typed) or a text.
        hint: the field's type: bool, int, float, str, dict, tuples of these, and unions.
        where: flag or file:line, for the message.
        text: the value was typed on the command line or in the environment.

    Raises:
        UsageError: the value is of another type.
    """
    for member in members(hint):
        converted, result = _convert(value, member, where, text=text)
        if converted:
            return result
    expected = " or ".join(dict.fromkeys(_name(member) for member in members(hint)))
    raise UsageError(f"{where}: expected {expected}, got {value!r}")


def check(value: Any, facts: Mapping[str, Any], where: str) -> None:
    """Compare a converted value with the field's choices, range and availability.

    Raises:
        UsageError: it is outside.
    """
    if value is None:
        return
    choices = facts.get("choices")
    if choices is not None and value not in choices:
        raise UsageError(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}")
    minimum = facts.get("minimum")
    if minimum is not None and isinstance(value, (int, float)) and value < minimum:
        raise UsageError(f"{where}: must be at least {minimum}, got {value}")
    maximum = facts.get("maximum")
    if maximum is not None and isinstance(value, (int, float)) and value > maximum:
        raise UsageError(f"{where}: must be at most {maximum}, got {value}")
    if facts.get("unavailable") and value and value != facts.get("default"):
        raise UsageError(f"{where}: {facts['unavailable']}")


def _name(member: Any) -> str:
    if typing.get_origin(member) is tuple:
        items = typing.get_args(member)
        if items[-1] is Ellipsis:
            return f"a list of {_NAMES[items[0]].removeprefix('a ')} items"
        return f"{len(items)} values"
    return _NAMES[typing.get_origin(member) or member]


def _convert(value: Any, kind: Any, where: str, *, text: bool) -> tuple[bool, Any]:
    """Return (True, result) if the value is or can be read as `kind`."""
    origin = typing.get_origin(kind) or kind
    if origin is tuple:
        return _tuple(value, typing.get_args(kind), where, text=text)
    if text and isinstance(value, str):
        return _read(value, origin)
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return math.isfinite(value), float(value)
        except OverflowError:
            return False, None
    if origin is int and isinstance(value, bool):
        return False, None
    if origin is dict:
        return isinstance(value, dict), value
    return isinstance(value, origin), value


def _read(value: str, kind: Any) -> tuple[bool, Any]:
    """Read a text as None, bool, int, float or str."""
    if kind is type(None):
        return value.lower() == "none", None
    if kind is bool:
        return value.lower() in WORDS, WORDS.get(value.lower())
    if kind is str:
        return True, value
    try:
        number = kind(value)
        return math.isfinite(number), number
    except (ValueError, OverflowError):
        return False, None


def _tuple(value: Any, items: tuple[Any, ...], where: str, *, text: bool) -> tuple[bool, Any]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):
        return False, None
    if items[-1] is not Ellipsis and len(values) != len(items):
        return False, None
    kinds = [items[0]] * len(values) if items[-1] is Ellipsis else items
    pairs = zip(values, kinds, strict=True)
    return True, tuple(convert(item, kind, where, text=text) for item, kind in pairs)
