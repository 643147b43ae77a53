"""Read what a checkpoint's index.json says, and check the files against it."""

from __future__ import annotations

import math
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from opensora.distributed.run_folders import INDEX, STATES
from opensora.errors import WeightsError
from opensora.weight_files import read_json

FORMAT = "opensora-checkpoint-1"

_SHARD = re.compile(r"\d{5}\.safetensors")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in one file.

    Attributes:
        file: name in the checkpoint folder.
        offsets, sizes: of the box, one integer a dimension.
    """

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A whole tensor: its type, shape, and the pieces that cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Index:
    """What index.json says: tensors by name, and the length and CRC-32 of every file.

    Checkpoints of earlier versions have no sums.
    """

    world_size: int
    tensors: dict[str, Stored]
    files: dict[str, int]
    sums: dict[str, int]


def read_index(folder: Path) -> Index:
    """Read index.json and check that every file it names has the length it says.

    Raises:
        WeightsError: a file is missing, cut short or no file of ours; the checkpoint is damaged.
    """
    data = read_json(folder / INDEX)
    if data.get("format") != FORMAT:
        raise WeightsError(
            f"{folder / INDEX} is of format {data.get('format')!r}, not {FORMAT!r}; this version "
            "of opensora cannot read it"
        )
    try:
        files = {str(name): int(size) for name, size in data["files"].items()}
        tensors = {
            str(name): Stored(
                _DTYPES[row["dtype"]],
                tuple(map(int, row["shape"])),
                tuple(
                    Piece(str(file), tuple(map(int, offsets)), tuple(map(int, sizes)))
                    for file, offsets, sizes in row["pieces"]
                ),
            )
            for name, row in data["tensors"].items()
        }
        sums = {str(name): int(value) for name, value in data.get("crc32", {}).items()}
        index = Index(int(data["world_size"]), tensors, files, sums)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder / INDEX} is damaged ({error!r})") from error
    for name, row in tensors.items():
        if not _is_whole(row):
            raise WeightsError(f"{folder / INDEX} is damaged: pieces of {name} are missing")
    wrong = [name for name in files if name != STATES and not _SHARD.fullmatch(name)]
    stray = {piece.file for row in tensors.values() for piece in row.pieces} - files.keys()
    if wrong or stray:
        raise WeightsError(f"{folder / INDEX} names {[*wrong, *stray][0]!r}, which is no shard")
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise WeightsError(f"{folder} is damaged: {name} {state}")
    return index


def check_sums(folder: Path, index: Index) -> None:
    """Read all files of a checkpoint and compare their checksums, about 1 GB/s a core.

    Raises:
        WeightsError: a file is not what was written, or cannot be read.
    """
    with ThreadPoolExecutor(min(8, max(1, len(index.sums)))) as pool:
        found = pool.map(lambda name: checksum(folder / name), index.sums)
        try:
            for (name, expected), value in zip(index.sums.items(), found, strict=True):
                if value != expected:
                    raise WeightsError(
                        f"{folder} is damaged: {name} is not what was written (CRC-32 {value:08x} "
                        f"instead of {expected:08x})"
                    )
        except OSError as error:
            raise WeightsError(f"{folder} is damaged: {error}") from error


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


def _is_whole(stored: Stored) -> bool:
    """Tell whether pieces lie inside the tensor and have as many elements as it."""
    for piece in stored.pieces:
        if not len(piece.offsets) == len(piece.sizes) == len(stored.shape):
            return False
        ends = [start + size for start, size in zip(piece.offsets, piece.sizes, strict=True)]
        if any(end > length for end, length in zip(ends, stored.shape, strict=True)):
            return False
    return sum(math.prod(piece.sizes) for piece in stored.pieces) == math.prod(stored.shape)
