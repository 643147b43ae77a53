"""The program `opensora data explain TABLE --config C`: what training makes of a table of clips."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from opensora.config_file import load_config_file, suggest
from opensora.data.dataset import build_dataset
from opensora.data.explain import explain
from opensora.data.plan import make_plan
from opensora.errors import UsageError

COMMANDS = {"explain": "the bucket of every row or why it is dropped, and the steps of an epoch"}

USAGE = "usage: opensora data COMMAND [--help]\n\ncommands:\n" + "\n".join(
    f"  {name:<10} {text}" for name, text in COMMANDS.items()
)

#: Keys that configurations of Open-Sora 1.0 keep outside of `dataset`.
_FLAT = ("data_path", "root", "num_frames", "image_size", "frame_interval", "transform_name")


def run(words: Sequence[str]) -> int:
    """Run a command on tables and return its exit status.

    Raises:
        UsageError: an unknown command or flag, or a table or configuration that cannot be used.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(
            f"unknown command data {words[0]!r}{suggest(words[0], COMMANDS)} (commands: "
            f"{', '.join(COMMANDS)})"
        )
    return _explain(words[1:])


def dataset_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `dataset` section of a configuration, made of 1.0's flat keys if it has none.

    Raises:
        UsageError: the section is not a dict.
    """
    section = config.get("dataset")
    if section is None:
        section = {key: config[key] for key in _FLAT if config.get(key) is not None}
        by_buckets = config.get("bucket_config") is not None
        section["type"] = "VariableVideoTextDataset" if by_buckets else "VideoTextDataset"
    if not isinstance(section, Mapping):
        raise UsageError(f"dataset must be a dict, as in dict(type=...), got {section!r}")
    return {**section, **{k: config[k] for k in ("data_path", "root") if config.get(k)}}


def _explain(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="opensora data explain",
        description=COMMANDS["explain"],
        allow_abbrev=False,
    )
    parser.add_argument("table", nargs="?", metavar="TABLE", help="csv or parquet")
    parser.add_argument("--config", metavar="FILE", help="training configuration")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="processes x steps")
    parser.add_argument("--root", metavar="DIR", help="folder of the table's relative paths")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--summary", action="store_true", help="no line for every row")
    given, extra = parser.parse_known_args(list(words))
    if extra:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        kind = "flag" if extra[0].startswith("-") else "argument"
        raise UsageError(f"unexpected {kind} {extra[0]!r}{suggest(extra[0], flags)}; see --help")
    if given.config is None:
        raise UsageError("name the training configuration: opensora data explain TABLE --config C")
    if given.epoch < 0:
        raise UsageError(f"--epoch must be at least 0, got {given.epoch}")
    config = load_config_file(given.config)
    settings = dataset_settings(config)
    settings |= {k: v for k, v in (("data_path", given.table), ("root", given.root)) if v}
    dataset = build_dataset(settings)
    if hasattr(dataset, "sampler"):
        raise UsageError(
            f"dataset {settings.get('type')} holds stored features, which keep the sizes they were "
            "made at; explain the table that they were made of"
        )
    plan = make_plan(
        dataset,
        bucket_config=config.get("bucket_config"),
        batch_size=config.get("batch_size"),
        seed=config.get("seed", 1024),
        replicas=given.replicas,
    )
    for line in explain(dataset, plan, given.epoch).lines(rows=not given.summary):
        print(line)
    return 0


class _Parser(argparse.ArgumentParser):
    """Raise argparse's complaints as UsageError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ").removesuffix("."))
