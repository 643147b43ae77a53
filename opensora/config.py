"""Turn a frozen dataclass into a checked command line, with the source of every value.

    @dataclass(frozen=True)
    class SampleConfig:
        seed: int = setting(1024, "random seed of the first sample", minimum=0)

    config, sources = parse_command_line(SampleConfig, argv, "opensora generate")
    config.seed, sources["seed"]

Fields made without `setting` work too. Every field is a key of the configuration file and, unless
it is a dict, a flag: `--num-frames`, also `--num_frames`; yes/no fields take `--x`, `--no-x` and
`--x True|False`. Keys inside dict fields are set with dots: `--model.qk_norm=false`. Later sources
win:

    default < checkpoint < configuration file < environment < command line

A key or flag that does not exist is an error with the closest name, never ignored.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from opensora.command_line import Field, FlagReader, flag_of
from opensora.config_file import (
    ConfigFile,
    apply_overrides,
    load_config_file,
    suggest,
)
from opensora.config_values import check, convert
from opensora.errors import UsageError

__all__ = [
    "Sources",
    "apply_overrides",
    "load_config_file",
    "parse_command_line",
    "setting",
    "suggest",
]

C = TypeVar("C")

DEFAULT = "default"
ENVIRONMENT_PREFIX = "OPENSORA_"


def setting(
    default: Any,
    help: str,  # noqa: A002
    *,
    group: str = "options",
    flags: tuple[str, ...] = (),
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    bare: str | None = None,
    env: bool = False,
    note: str | None = None,
    unavailable: str | None = None,
) -> Any:
    """Describe one field of a configuration dataclass.

    Args:
        default: value when no source names it; never mutable.
        help: one line for `--help`.
        group: heading in `--help`.
        flags: further names such as "-o", "--output".
        choices: allowed values besides None.
        minimum: smallest allowed number.
        maximum: largest allowed number.
        metavar: name of the value in `--help`.
        bare: value of the flag when no number follows it.
        env: the variable OPENSORA_<FIELD> sets it too.
        note: said when the field is set: it is accepted and changes nothing here.
        unavailable: why only the default is possible so far; anything else is a UsageError.
    """
    return dataclasses.field(default=default, metadata=locals())


class Sources(dict[str, str]):
    """Remember where each setting came from: field, or "field.key" of an override, -> words.

    Attributes:
        notes: sentences to print: settings that were accepted and change nothing.
    """

    notes: tuple[str, ...] = ()

    def is_set(self, name: str) -> bool:
        """Tell whether anything but the default set the field."""
        return self.get(name, DEFAULT) != DEFAULT

    def fill(self, config: C, values: Mapping[str, Any], source: str) -> C:
        """Return the configuration with fields that nobody set replaced, and note their source."""
        taken = {key: value for key, value in values.items() if not self.is_set(key)}
        self.update(dict.fromkeys(taken, source))
        return dataclasses.replace(config, **taken)  # type: ignore[type-var]

    def table(self, config: Any, *, every: bool = False) -> str:
        """Format the settings, one a line with its source; defaults only if `every`."""
        longest = 2000 if every else 70
        rows = [
            (field.name, _cut(_shown(getattr(config, field.name)), longest), self[field.name])
            for field in dataclasses.fields(config)
            if every or self.is_set(field.name)
        ]
        widths = [min(max((len(row[i]) for row in rows), default=0), 60) for i in (0, 1)]
        return "\n".join(
            f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows
        )


def parse_command_line(
    config_class: type[C],
    argv: Sequence[str],
    program: str,
    *,
    description: str = "",
    environ: Mapping[str, str] | None = None,
    others: type | None = None,
) -> tuple[C, Sources]:
    """Read defaults, configuration file, environment and flags into a configuration.

    Args:
        config_class: frozen dataclass whose fields are made by `setting`.
        argv: arguments after the program's name. One positional argument names a configuration
            file, as does `--config`.
        program: name shown in `--help`.
        description: text above the flags in `--help`.
        environ: stands in for os.environ.
        others: configuration class of another program; its files are taken too, and what they say
            beyond this one's fields has no effect.

    Returns:
        The configuration, and the source of each of its fields.

    Raises:
        UsageError: unknown key or flag, wrong type or value, unreadable configuration file.
        SystemExit: with code 0 after `--help`.
    """
    hints = typing.get_type_hints(config_class)
    fields = {
        field.name: Field(field, hints[field.name])
        for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
    }
    given, overrides = FlagReader(fields, program, description).read(argv)
    environ = os.environ if environ is None else environ
    paths = [path for path in (given.pop("config", None), given.pop("config_flag", None)) if path]
    if len(paths) > 1:
        raise UsageError(f"two configuration files, {paths[0]} and {paths[1]}; name one")
    file = load_config_file(paths[0]) if paths else ConfigFile(Path())
    environment = {
        name: text
        for name, field in fields.items()
        if field.env and (text := environ.get(ENVIRONMENT_PREFIX + name.upper()))
    }
    theirs = {field.name for field in dataclasses.fields(others)} if others else set()
    unknown = [key for key in file if key not in fields and key not in theirs]
    if unknown:
        hint = suggest(unknown[0], fields)
        raise UsageError(f"{file.where(unknown[0])}: unknown key {unknown[0]!r}{hint}")

    values: dict[str, Any] = {}
    sources = Sources(dict.fromkeys(fields, DEFAULT))
    for name, field in fields.items():
        layers = (
            (file, file.where(name), f"{file.where(name)}: {name}", False),
            (environment, "environment", ENVIRONMENT_PREFIX + name.upper(), True),
            (given, "command line", flag_of(name), True),
        )
        for layer, source, where, typed in layers:
            if name in layer:
                values[name] = convert(layer[name], fields[name].hint, where, text=typed)
                check(values[name], field.facts, where)
                sources[name] = source
    for dotted, value in overrides.items():
        name = dotted.partition(".")[0]
        base = {name: values[name] if name in values else fields[name].default or {}}
        values[name] = apply_overrides(base, {dotted: value})[name]
        sources[name] = sources[dotted] = "command line"
    sources.notes = tuple(
        f"{name} = {_shown(values[name])} ({sources[name]}): {fields[name].note}"
        for name in values
        if fields[name].note and values[name] != fields[name].default
    )
    missing = [name for name in fields if fields[name].required and name not in values]
    if missing:
        raise UsageError(
            f"{missing[0]} is not set: give {flag_of(missing[0])} or the key in a file"
        )
    return config_class(**values), sources


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _shown(value: Any) -> str:
    """Show a value as it would be typed in a configuration file."""
    if isinstance(value, Mapping):
        return "dict(" + ", ".join(f"{key}={_shown(item)}" for key, item in value.items()) + ")"
    return repr(value)
