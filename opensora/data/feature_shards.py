"""Keep what VAE and text encoder made of a table's rows: a folder of safetensors shards.

    features.json            what the rows were made with
    shard-00000.safetensors  tensors of some hundred rows; the rows themselves in its header
    index.jsonl              the same rows, one shard a line, so that a reader opens one file

A row has `<n>.mean` and `<n>.std` [C, t, h, w] of its latent, or `<n>.latent`, one draw; and
`<n>.text` [L, D], text states without padding. A shard appears whole under its name or not at all,
and says everything about its rows: a program that was killed at any moment goes on where the last
shard ends, and a lost index is made of the shards. Of two rows of one clip and size the later one
counts.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.data.batch import Size
from opensora.errors import UsageError
from opensora.files import flush, write_error, write_text

SETTINGS, INDEX = "features.json", "index.jsonl"
FORMAT = "opensora features 1"
#: Entries of features.json that must agree; others are notes.
BINDING = (
    "format",
    "latent",
    "vae",
    "text_encoder",
    "max_length",
    "clean_captions",
    "dtype",
    "frame_interval",
    "seed",
    "root",  # two tables may have a clip of one name
)


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """Describe one stored row.

    Attributes:
        name: of the clip; the path in its table.
        size: that it was encoded at, in frames and pixels; zeros if only its text was.
        fps: that the model is told.
        text: the caption as it stands in the table.
        shard: file that holds the tensors.
        place: of the row in the shard.
    """

    name: str
    size: Size
    fps: float
    text: str
    shard: str = ""
    place: int = 0

    @property
    def key(self) -> tuple[str, Size]:
        """Tell rows apart."""
        return self.name, self.size


class FeatureWriter:
    """Add rows to a folder of features; use it as a context manager.

    Several processes may write into one folder. On any way out of the block but a kill, the rows
    that were added are on the disk.

    Args:
        folder: made if missing.
        settings: what the rows are made with, see `BINDING`.
        rows_per_shard: how many rows a kill can cost.
        bytes_per_shard: a shard that has this many bytes is written earlier.

    Attributes:
        known: rows that the folder has.

    Raises:
        UsageError: the folder holds rows that were made with something else, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        rows_per_shard: int = 250,
        bytes_per_shard: int = 1 << 28,
    ) -> None:
        self.folder = Path(folder)
        self.settings = {"format": FORMAT, **settings}
        self.rows_per_shard, self.bytes_per_shard = rows_per_shard, bytes_per_shard
        self.known: dict[tuple[str, Size], FeatureRow] = {}
        self._rows: list[FeatureRow] = []
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        if (self.folder / SETTINGS).is_file():
            check_same(self.folder, read_settings(self.folder), self.settings)
            self.known = {row.key: row for row in read_rows(self.folder)}
            self._sweep()
        else:
            write_text(self.folder / SETTINGS, json.dumps(self.settings, indent=2) + "\n")

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, row: FeatureRow, tensors: Mapping[str, Tensor]) -> None:
        """Add a row; its shard is written when it is full.

        Args:
            row: what `tensors` is of; shard and place are filled in here.
            tensors: "mean", "std", "latent", "text" -> tensor on the CPU.
        """
        for name, tensor in tensors.items():
            self._tensors[f"{len(self._rows)}.{name}"] = tensor.contiguous()
            self._bytes += tensor.nbytes
        self._rows.append(row)
        if len(self._rows) >= self.rows_per_shard or self._bytes >= self.bytes_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait, if any, as a shard."""
        if not self._rows:
            return
        header = [_facts(row) for row in self._rows]
        partial = self.folder / f".opensora-{os.getpid()}-{secrets.token_hex(4)}.partial"
        try:
            metadata = {"format": "pt", "rows": json.dumps(header, ensure_ascii=False)}
            save_file(self._tensors, partial, metadata=metadata)
            partial.chmod(0o644)  # safetensors writes for the owner alone
            flush(partial)
            shard = self._name(partial)
            line = json.dumps({"shard": shard, "rows": header}, ensure_ascii=False) + "\n"
            with (self.folder / INDEX).open("ab", buffering=0) as index:
                index.write(line.encode())  # one write: other processes append too
        except SafetensorError as error:
            raise UsageError(f"cannot write features to {self.folder}: {error}") from error
        except OSError as error:
            raise write_error(self.folder, error) from error
        finally:
            partial.unlink(missing_ok=True)
        for place, row in enumerate(self._rows):
            self.known[row.key] = FeatureRow(row.name, row.size, row.fps, row.text, shard, place)
        self._rows, self._tensors, self._bytes = [], {}, 0

    def _name(self, partial: Path) -> str:
        """Give a finished file the first free name, which no other process can take as well."""
        number = len(list(self.folder.glob("shard-*.safetensors")))
        while True:
            name = f"shard-{number:05d}.safetensors"
            try:
                os.link(partial, self.folder / name)
            except FileExistsError:
                number += 1
                continue
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                if (self.folder / name).exists():
                    number += 1
                    continue
                partial.rename(self.folder / name)  # a file system without links
            return name

    def _sweep(self) -> None:
        """Remove what killed programs left; a younger file may be another process's."""
        for file in self.folder.glob(".opensora-*.partial"):
            try:
                if time.time() - file.stat().st_mtime > 3600:
                    file.unlink()
            except OSError:
                continue  # somebody else was faster


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return features.json.

    Raises:
        UsageError: there is none, or it is of another format.
    """
    path = Path(folder) / SETTINGS
    try:
        settings = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no {SETTINGS}; scripts/misc/extract_feat.py makes such folders"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise UsageError(f"{path} is not of the form {FORMAT!r}; make the features again")
    return settings


def check_same(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to mix rows that were made differently.

    Raises:
        UsageError: names the first difference.
    """
    for key in BINDING:
        if stored.get(key) != wanted.get(key):
            moved = f'; if the clips were moved, set "root" in {SETTINGS}' if key == "root" else ""
            raise UsageError(
                f"{folder} holds features made with {key} {stored.get(key)!r}, this run has "
                f"{wanted.get(key)!r}; give another folder, or remove this one{moved}"
            )


def read_rows(folder: str | Path) -> Iterator[FeatureRow]:
    """Yield the rows of all shards, those of a later shard later.

    Raises:
        UsageError: a shard is damaged.
    """
    folder = Path(folder)
    listed: dict[str, Any] = {}
    if (folder / INDEX).is_file():
        with (folder / INDEX).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    listed[entry["shard"]] = entry["rows"]
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a crash: the shard itself tells
    for shard in sorted(path.name for path in folder.glob("shard-*.safetensors")):
        rows = listed.get(shard)
        for place, facts in enumerate(_header(folder / shard) if rows is None else rows):
            try:
                size = Size(*(int(n) for n in facts["size"]))
                yield FeatureRow(
                    str(facts["name"]), size, float(facts["fps"]), str(facts["text"]), shard, place
                )
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{folder / shard}: row {place} cannot be read: {error}") from None


def _facts(row: FeatureRow) -> dict[str, Any]:
    return {"name": row.name, "size": list(row.size), "fps": row.fps, "text": row.text}


def _header(path: Path) -> list[dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as opened:
            rows = json.loads((opened.metadata() or {})["rows"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UsageError(
            f"{path} is damaged ({error}); remove it, and its rows are made again"
        ) from None
    if not isinstance(rows, list):
        raise UsageError(f"{path} is damaged; remove it, and its rows are made again")
    return rows
