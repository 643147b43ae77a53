"""Write a model's config.json and weights so that a failure leaves the earlier model in place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora.errors import DoesNotFitError, UsageError, WeightsError
from opensora.models.families import plain_names


def save_model(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write config.json and model.safetensors, or shards with their index.

    Files are written under temporary names in the folder and renamed when all are complete: a
    failure leaves the folder's earlier model in place. Weights of that model that are no longer
    needed are removed last.

    Args:
        model: has `config` with `to_dict`; weights keep their dtype.
        folder: made if missing.
        max_shard_bytes: size above which the weights are split.

    Raises:
        DoesNotFitError: the disk has no room.
        WeightsError: the folder cannot be written.
    """
    folder = Path(folder)
    state = model.state_dict()
    state = dict(zip(plain_names(state), state.values(), strict=True))
    shards = _split(state, max_shard_bytes)
    total = sum(tensor.nbytes for tensor in state.values())
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    texts = {"config.json": model.config.to_dict()}  # type: ignore[operator, union-attr]
    if count > 1:
        weight_map = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
        texts["model.safetensors.index.json"] = {
            "metadata": {"total_size": total},
            "weight_map": weight_map,
        }
    final = [*names, *texts]
    written = {name: folder / f".{name}.{os.getpid()}.tmp" for name in final}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < total:
            raise DoesNotFitError(
                f"{folder}: the model needs {total / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                "make room or choose another folder"
            )
        for name, shard in zip(names, shards, strict=True):
            dense = {key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()}
            save_file(dense, written[name], metadata={"format": "pt"})
        for name, data in texts.items():
            written[name].write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        for file in written.values():
            # safetensors writes for the owner alone; the umask decides, as for config.json.
            shutil.copymode(written["config.json"], file)
            _sync(file)
        for name in final:
            os.replace(written[name], folder / name)
        for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
            if old.name not in final:
                old.unlink(missing_ok=True)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write the model to {folder}: {error}") from error
    finally:
        for file in written.values():
            with suppress(OSError):  # what went wrong before is what the user must see
                file.unlink(missing_ok=True)


def _split(state: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Return the tensors in order, in groups of at most `max_shard_bytes` (or one tensor)."""
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
