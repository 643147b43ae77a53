"""Replay recorded tables: find what a table is, run every entry, count those that differ."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from opensora.errors import UsageError
from opensora.replay.judging import Difference
from opensora.replay.recording import Mismatch


@dataclasses.dataclass(frozen=True)
class Entry:
    """Hold one line of a table.

    Attributes:
        label: names it in messages.
        ours: computes this library's value; may raise.
        recorded: the original's value, or {"__error__": ..., "msg": ...} if it raised.
        deviates: where this library differs on purpose: gets our value (the UsageError, if it was
            raised) and returns what kind of deviation it is, or None if it is none.
        within: how far a float may be from the recorded one, beyond the 12 digits of `same`.
    """

    label: str
    ours: Callable[[], Any]
    recorded: Any
    deviates: Callable[[Any], str | None] = lambda _ours: None
    within: float = 0.0


@dataclasses.dataclass(frozen=True)
class Table:
    """Describe a kind of table: how it is recognised, and its entries."""

    matches: Callable[[Any], bool]
    entries: Callable[[Any], Iterator[Entry]]


def rows(*keys: str) -> Callable[[Any], bool]:
    """Recognise a list of objects that all have these keys."""
    return lambda content: (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(row, dict) and set(keys) <= row.keys() for row in content)
    )


def sections(names: set[str]) -> Callable[[Any], bool]:
    """Recognise an object that has at least one of these keys."""
    return lambda content: isinstance(content, dict) and bool(names & content.keys())


def in_sections(
    readers: Mapping[str, Callable[[Any], Iterator[Entry]]], content: Any
) -> Iterator[Entry]:
    """List the entries of every section of an object by the section's reader."""
    for name, section in content.items():
        if name in readers:
            yield from readers[name](section)
        elif name != "note":
            raise Mismatch(f"not compared: section {name!r}")


def only(known: Iterable[str], given: Iterable[str]) -> None:
    """Refuse columns that nothing would be compared with.

    Raises:
        Mismatch: there is one; names it.
    """
    unknown = sorted(set(given) - {*known, "note"})
    if unknown:
        raise Mismatch(f"not compared: column {unknown[0]!r}")


def compare_entries(entries: Iterable[Entry]) -> tuple[Difference, str]:
    """Run every entry; return how many differ, and one line about them.

    A recorded error is met by a ValueError (a UsageError is one) or an error of the same name.

    Raises:
        Mismatch: there are no entries.
    """
    count, wrong = 0, []
    deviations: Counter[str] = Counter()
    for entry in entries:
        count += 1
        ours, text = _run(entry)
        if text == "":
            continue
        kind = entry.deviates(ours)
        if kind is not None:
            deviations[kind] += 1
        else:
            wrong.append(f"{entry.label}: {text}")
    if count == 0:
        raise Mismatch("the table has no entries")
    detail = f"{count} entries"
    if wrong:
        detail += f", {len(wrong)} of them differ: {wrong[0]}"
    detail += "".join(f"; {kind}: {number}" for kind, number in deviations.items())
    return Difference("entries", float(len(wrong)), 0.0), detail


def _run(entry: Entry) -> tuple[Any, str]:
    """Return our value or error, and how it differs from the recorded one ("" if it does not)."""
    recorded = entry.recorded
    fails = isinstance(recorded, dict) and "__error__" in recorded
    try:
        ours = entry.ours()
    except Exception as error:
        if fails and (isinstance(error, ValueError) or _name(error) == recorded["__error__"]):
            return error, ""
        reason = (str(error).strip() or "no message").splitlines()[0]
        return error, f"recorded {_short(recorded)}, ours raised {_name(error)}: {reason}"
    if fails:
        return ours, f"recorded {recorded['__error__']}, ours {_short(ours)}"
    if same(ours, recorded, entry.within):
        return ours, ""
    return ours, f"recorded {_short(recorded)}, ours {_short(ours)}"


def same(ours: Any, recorded: Any, within: float = 0.0) -> bool:
    """Whether two JSON values are equal; tuples are lists; floats to 12 digits or `within`."""
    if isinstance(recorded, dict):
        return (
            isinstance(ours, dict)
            and ours.keys() == recorded.keys()
            and all(same(ours[key], recorded[key], within) for key in recorded)
        )
    if isinstance(recorded, list):
        return (
            isinstance(ours, (list, tuple))
            and len(ours) == len(recorded)
            and all(same(a, b, within) for a, b in zip(ours, recorded, strict=True))
        )
    if isinstance(recorded, float) and isinstance(ours, (float, int)):
        both_nan = math.isnan(ours) and math.isnan(recorded)
        return both_nan or math.isclose(ours, recorded, rel_tol=1e-12, abs_tol=within)
    return type(ours) is type(recorded) and bool(ours == recorded)


def refused(ours: Any) -> bool:
    """Whether our side said no with a message for the user."""
    return isinstance(ours, UsageError)


def _name(error: BaseException) -> str:
    return type(error).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
