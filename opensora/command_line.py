"""Read flags, made from the fields of a configuration dataclass, into texts field by field."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from opensora.config_file import parse_value, suggest
from opensora.config_values import WORDS, accepts, length
from opensora.errors import UsageError


class Field:
    """Read the facts of a dataclass field, whether or not `opensora.config.setting` made it.

    Attributes:
        hint: its type.
        default: its default, or dataclasses.MISSING if it has none (then `required`).
        facts: what `setting` was given.
    """

    def __init__(self, field: dataclasses.Field[Any], hint: Any) -> None:
        factory, self.default = field.default_factory, field.default
        if not isinstance(factory, dataclasses._MISSING_TYPE):
            self.default = factory()
        self.hint = hint
        self.required = self.default is dataclasses.MISSING
        plain = {"help": f"default: {self.default}", "group": "options", "flags": ()}
        self.facts: dict[str, Any] = {**plain, **field.metadata, "default": self.default}
        self.env = bool(self.facts.get("env"))
        self.note: str | None = self.facts.get("note")


def flag_of(name: str) -> str:
    """Return the flag of a field: num_frames -> --num-frames."""
    return "--" + name.replace("_", "-")


class FlagReader:
    """Read a command line whose flags are the fields of a configuration dataclass.

    Args:
        fields: field name -> its facts. Dict fields get no flag, only dotted overrides.
        program: name shown in `--help`.
        description: text above the flags in `--help`.
    """

    def __init__(self, fields: Mapping[str, Field], program: str, description: str) -> None:
        self.sections = {name for name, field in fields.items() if accepts(field.hint, dict)}
        self.known = {"--config", "--help"}
        self.booleans: set[str] = set()
        self.bare: dict[str, str] = {}
        self.parser = _Parser(
            prog=program,
            usage=f"{program} [CONFIG] [flags]",
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.parser.add_argument("config", nargs="?", help="configuration file", metavar="CONFIG")
        self.parser.add_argument("--config", dest="config_flag", help=argparse.SUPPRESS)
        groups: dict[str, argparse._ArgumentGroup] = {}
        for name, field in fields.items():
            if name not in self.sections:
                title = field.facts["group"]
                if title not in groups:
                    groups[title] = self.parser.add_argument_group(title)
                self._add(groups[title], name, field)

    def _add(self, group: argparse._ArgumentGroup, name: str, field: Field) -> None:
        """Add one field's flag, and its `--no-` form if it is a yes/no field."""
        facts = field.facts
        names = [flag_of(name), *facts["flags"]]
        self.known.update(names)
        text = argparse.SUPPRESS if facts.get("unavailable") else facts["help"].replace("%", "%%")
        if accepts(field.hint, bool):
            off = ["--no-" + long[2:] for long in names if long.startswith("--")]
            self.known.update(off)
            self.booleans.update(names)
            group.add_argument(*names, dest=name, action="store_const", const=True, help=text)
            group.add_argument(
                *off, dest=name, action="store_const", const=False, help=argparse.SUPPRESS
            )
            return
        if facts.get("bare"):
            self.bare.update(dict.fromkeys(names, facts["bare"]))
        choices = "|".join(str(choice) for choice in facts.get("choices") or ())
        metavar = facts.get("metavar") or choices or name.upper()
        group.add_argument(*names, dest=name, help=text, nargs=length(field.hint), metavar=metavar)

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return field -> text or list of texts, and dotted key -> value.

        Raises:
            UsageError: an unknown flag, a missing value, or more than one positional argument.
            SystemExit: with code 0 after `--help`.
        """
        arguments, overrides = self._normalise(argv)
        parsed, extra = self.parser.parse_known_args(arguments)
        if extra:
            kind = "flag" if extra[0].startswith("-") else "argument"
            raise UsageError(
                f"unexpected {kind} {extra[0]!r}; quote a prompt of several words, and see --help"
            )
        return vars(parsed), overrides

    def _normalise(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """Spell flags in one way, take dotted overrides out, and refuse unknown flags."""
        arguments: list[str] = []
        overrides: dict[str, Any] = {}
        words = list(argv)
        while words:
            word = words.pop(0)
            if word == "--":
                return [*arguments, word, *words], overrides
            flag, equals, value = word.partition("=")
            following = words[0] if words else ""
            if word in self.bare and not following.isdigit():
                arguments += [word, self.bare[word]]
            elif not word.startswith("--"):
                arguments.append(word)
            elif self._section(flag):
                if not equals and not words:
                    raise UsageError(f"{flag}: expected a value, as in {flag}=VALUE")
                key = self._section(flag) + flag[flag.index(".") :].replace("-", "_")
                overrides[key] = parse_value(value if equals else words.pop(0))
            else:
                flag = flag.replace("_", "-")
                if flag not in self.known:
                    raise UsageError(f"unknown flag {flag}{suggest(flag, self.known)}")
                if flag in self.booleans and (equals or following.lower() in WORDS):
                    flag = self._yes_or_no(flag, value if equals else words.pop(0))
                    equals = value = ""
                arguments.append(flag + equals + value)
        return arguments, overrides

    def _section(self, flag: str) -> str:
        """Return the dict field that a dotted flag sets, or ""."""
        top, dot, _ = flag[2:].partition(".")
        name = top.replace("-", "_")
        return name if dot and name in self.sections else ""

    def _yes_or_no(self, flag: str, word: str) -> str:
        """Turn `--x False` into `--no-x`."""
        if word.lower() not in WORDS:
            raise UsageError(f"{flag}: expected True or False, got {word!r}")
        return flag if WORDS[word.lower()] else "--no-" + flag[2:]


class _Parser(argparse.ArgumentParser):
    """Raise argparse's complaints as UsageError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ").removesuffix("."))
