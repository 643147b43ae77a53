"""The programs `opensora data table FOLDER -o meta.csv`, a table of the clips below a folder, and
`opensora data explain TABLE --config C`, what training makes of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from opensora.config_file import load_config_file, suggest
from opensora.data.dataset import build_dataset
from opensora.data.explain import explain
from opensora.data.listing import find_media, list_media, write_listing
from opensora.data.plan import make_plan
from opensora.errors import UsageError
from opensora.progress import Progress

COMMANDS = {
    "table": "a table of the videos and images below a folder, with captions and sizes",
    "explain": "the bucket of every row or why it is dropped, and the steps of an epoch",
}

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
    return (_table if words[0] == "table" else _explain)(words[1:])


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


def _table(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="opensora data table",
        description=f"Write {COMMANDS['table']}. The caption of a.mp4 is the text of a.txt beside "
        "it or, without one, its name. Files that cannot be read are named with the reason, and "
        "left out.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="of videos and images, and folders of them"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="meta.csv", help="default: meta.csv"
    )
    parser.add_argument("--force", action="store_true", help="replace a table that is there")
    given = _parse(parser, words)
    target = Path(given.output)
    if target.suffix != ".csv":
        raise UsageError(f"--output {target}: name a .csv file")
    if target.is_dir() or (target.exists() and not given.force):
        raise UsageError(f"{target} is there already; name another --output, or give --force")
    with Progress() as progress:
        good, bad = list_media(find_media(Path(given.folder)), progress.stage("reading", "file"))
    for path, reason in bad:
        print(f"left out: {path}: {reason}", file=sys.stderr)
    if not good:
        raise UsageError(f"{given.folder}: none of its {len(bad)} videos and images can be read")
    write_listing(good, target)
    told = sum(one.told for one in good)
    print(
        f"{target}: {len(good)} rows, {told} captions from .txt files, {len(good) - told} from "
        f"file names, {len(bad)} files left out"
    )
    return 0


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; an unknown flag is an error with a suggestion."""
    given, extra = parser.parse_known_args(list(words))
    if extra:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        kind = "flag" if extra[0].startswith("-") else "argument"
        raise UsageError(f"unexpected {kind} {extra[0]!r}{suggest(extra[0], flags)}; see --help")
    return given


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
    given = _parse(parser, words)
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
