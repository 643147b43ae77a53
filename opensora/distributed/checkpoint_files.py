"""Store what torch.distributed.checkpoint plans as safetensors with a JSON index.

A checkpoint folder holds `00000.safetensors` and so on, one file per writing rank with that rank's
pieces of tensors; `running_states.json`; and `index.json`, which says where each piece lies, and
length and checksum of each file. DCP's own storage reads a pickle (`.metadata`) before anything
else, which can run code; here no pickle is written or read. The folder is written under a hidden
name and renamed when all of it is on the disk, so a folder with a final name is complete.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from opensora.distributed.checkpoint_index import FORMAT, Index, Piece, checksum
from opensora.distributed.run_folders import (
    INDEX,
    STATES,
    is_ours,
    partial_name,
    put_in_place,
    remove_files,
    sync,
)
from opensora.errors import WeightsError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class SafetensorsWriter(StorageWriter):
    """Write one safetensors file per rank, and on the coordinator the index; then rename.

    Args:
        folder: final name; must have the form of `run_folders.checkpoint_name`.
        states: content of running_states.json, JSON values.
    """

    def __init__(self, folder: Path, states: Mapping[str, Any]) -> None:
        self.folder, self.states = folder, states
        self.partial = folder.parent / partial_name(folder.name)
        self._rank = 0
        self._world_size = 1

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the rank, which names the file."""
        self._rank = int(kwargs.get("rank") or 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the hidden folder; only the coordinator comes here, before anyone writes."""
        self._world_size = len(plans)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.exists() and not is_ours(self.folder):
            raise FileExistsError(
                errno.EEXIST, "a folder that opensora did not make has its name", self.folder
            )
        remove_files(self.partial)
        self.partial.mkdir(exist_ok=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces to its file and flush it to the disk."""
        done: Future[list[WriteResult]] = Future()
        tensors: dict[str, Tensor] = {}
        results = []
        name = f"{self._rank:05d}.safetensors"
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            assert item.index.fqn not in tensors
            tensors[item.index.fqn] = tensor
        if tensors:
            path = self.partial / name
            try:
                save_file(tensors, path)
                # safetensors writes for the owner alone; the umask decides, as for the folder.
                path.chmod(self.partial.stat().st_mode & 0o666)
                sync(path)
            except SafetensorError as error:
                raise _as_os_error(error, path) from error
            size = path.stat().st_size
            stored = name, checksum(path)
            results = [WriteResult(item.index, size, stored) for item in plan.items]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write running_states.json and index.json, flush, and give the folder its final name."""
        written = [row for rows in results for row in rows]
        places = {row.index: row.storage_data[0] for row in written}
        files = {row.storage_data[0]: row.size_in_bytes for row in written}
        sums = dict(row.storage_data for row in written)
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            tensors[name] = {
                "dtype": str(stored.properties.dtype).removeprefix("torch."),
                "shape": list(stored.size),
                "pieces": [
                    (places[MetadataIndex(name, c.offsets)], list(c.offsets), list(c.sizes))
                    for c in stored.chunks
                ],
            }
        files[STATES] = _write_json(self.partial / STATES, self.states, indent=1)
        sums[STATES] = checksum(self.partial / STATES)
        index = {"format": FORMAT, "world_size": self._world_size, "files": files, "crc32": sums}
        _write_json(self.partial / INDEX, {**index, "tensors": tensors})
        put_in_place(self.partial, self.folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse to be chosen by a path."""
        return False


class StagedPlanner(DefaultSavePlanner):
    """Plan from the live tensors' shapes and placements, write the copies made of them.

    Args:
        staged: name -> this rank's part on the CPU, contiguous.
    """

    def __init__(self, staged: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the copy."""
        return self._staged[index.fqn]


class SafetensorsReader(StorageReader):
    """Read boxes of tensors from a folder that `SafetensorsWriter` made, on any number of ranks."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self._pieces = {
            (name, piece.offsets): piece
            for name, stored in index.tensors.items()
            for piece in stored.pieces
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index in DCP's terms."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=stored.dtype),
                    torch.Size(stored.shape),
                    [
                        ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes))
                        for p in stored.pieces
                    ],
                )
                for name, stored in self.index.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the index is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every box into the tensor it belongs to, file by file.

        Raises:
            WeightsError: a file is damaged.
        """
        by_file: dict[str, list[tuple[ReadItem, Piece]]] = {}
        for item in plan.items:
            piece = self._pieces[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            by_file.setdefault(piece.file, []).append((item, piece))
        for name, items in by_file.items():
            try:
                with safe_open(self.folder / name, framework="pt") as opened:
                    for item, piece in items:
                        tensor = opened.get_tensor(item.storage_index.fqn)
                        if tuple(tensor.shape) != piece.sizes:
                            raise WeightsError(
                                f"{self.folder} is damaged: {item.storage_index.fqn} in {name} is "
                                f"{list(tensor.shape)}, not {list(piece.sizes)}"
                            )
                        for axis, start in enumerate(item.storage_offsets):
                            tensor = tensor.narrow(axis, start, item.lengths[axis])
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(tensor)
                        planner.commit_tensor(item, target)
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{self.folder} is damaged: {name}: {error}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Refuse to be chosen by a path."""
        return False


def _write_json(path: Path, data: Any, indent: int | None = None) -> int:
    """Write and flush a JSON file; return its length in bytes."""
    path.write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")
    sync(path)
    return path.stat().st_size


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """Recover the system's error number, which safetensors puts into words."""
    found = _OS_ERROR.search(str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), os.fspath(path))
