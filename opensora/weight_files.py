"""Find the files of a model - in a folder, as one file, on the hub - and read their tensors.

Only tensors are ever read: safetensors, or PyTorch files with `weights_only=True`, which refuses
code. Every failure is a WeightsError that says what to do.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.errors import WeightsError
from opensora.models.families import plain_names, unwrap

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
log = logging.getLogger("opensora")

_SUFFIXES = (".safetensors", *PICKLES)
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_NUMBERED = re.compile(r"(.+?-)(\d{5})(?:-of-(\d{5}))?(\.\w+)")
_PARTS = ("transformer", "vae")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """Hold where a model's weights lie.

    Attributes:
        source: what the user gave, for messages.
        files: weight files, shards in order.
        config: config.json, or None.
        self_describing: there need be no config.json: a lone file, or a training run's folder.
    """

    source: str
    files: tuple[Path, ...]
    config: Path | None
    self_describing: bool


def resolve(source: str | os.PathLike[str], subfolder: str | None = None) -> Path:
    """Return the local file or folder that `source` names, downloading a hub id.

    Raises:
        WeightsError: it does not exist, or the hub cannot serve it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if subfolder is not None:
            raise WeightsError(f"{source} is a file, but subfolder {subfolder!r} needs a folder")
        return path
    if not path.is_dir():
        name = os.fspath(source)
        if path.suffix in _SUFFIXES or not _HUB_ID.fullmatch(name):
            raise WeightsError(
                f"file not found: {source}; give an existing folder or file, or a hub id such as "
                "hpcai-tech/OpenSora-STDiT-v3"
            )
        path = download(name, subfolder)
    if subfolder is not None:
        path = path / subfolder
        if not path.is_dir():
            raise WeightsError(f"folder not found: {subfolder} in {source}")
    return path


def locate(source: str | os.PathLike[str], subfolder: str | None = None) -> WeightFiles:
    """Return the weight files and the config.json that `source` names.

    Args:
        source: folder with config.json and weights (sharded or not); one .safetensors, .pt, .pth,
            .bin or .ckpt file; a training run's folder with `model/`; a hub id.
        subfolder: folder inside it.

    Raises:
        WeightsError: files are missing; names them and says what to do.
    """
    path = resolve(source, subfolder)
    shown = f"{source}/{subfolder}" if subfolder else os.fspath(source)
    if path.is_file():
        if path.name.endswith(_INDEXES):
            files = _shards(path)
        elif path.suffix in _SUFFIXES:
            files = (path,)
        else:
            raise WeightsError(
                f"{path} is no weight file; expected one that ends with {', '.join(_SUFFIXES)}"
            )
        config = path.parent / "config.json"
        return WeightFiles(shown, files, config if config.is_file() else None, True)
    config = path / "config.json"
    if (path / "index.json").is_file() and (path / "running_states.json").is_file():
        raise WeightsError(
            f"{shown} is a training checkpoint; make a model of it: opensora export {shown} OUT"
        )
    if any(path.glob("epoch*-global_step*/index.json")):
        raise WeightsError(
            f"{shown} is a training run; name the model or pipeline folder in it, or make one of "
            f"its newest checkpoint: opensora export {shown} OUT"
        )
    if (path / "model").is_dir() and not config.is_file():
        # A training run's folder; the averages beside it (ema.pt) are not the whole model.
        config, files = path / "model" / "config.json", _weights_in(path / "model")
        return WeightFiles(shown, _some(files, path), config if config.is_file() else None, True)
    files = _weights_in(path)
    if not config.is_file():
        if (path / "model_index.json").is_file():
            parts = [part for part in _PARTS if (path / part).is_dir()]
            raise WeightsError(
                f"{shown} holds a whole pipeline; name one of its models: subfolder= "
                f"{' or '.join(map(repr, parts)) or 'the folder of the model'}"
            )
        return WeightFiles(shown, _some(files, path), None, False)
    return WeightFiles(shown, _some(files, path), config, False)


def _some(files: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
    if not files:
        raise WeightsError(
            f"{folder} has no weights; expected model.safetensors, or shards with "
            "model.safetensors.index.json"
        )
    return files


def _weights_in(folder: Path) -> tuple[Path, ...]:
    """Return a folder's weight files: shards by their index, else one safetensors, else one .pt."""
    for ending in _INDEXES:
        for index in sorted(folder.glob(f"*{ending}")):
            return _shards(index)
    for suffixes in ((".safetensors",), PICKLES):
        files = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
        if len(files) > 1 and _are_all_shards(files):
            return tuple(files)
        if len(files) > 1:
            named = [p for p in files if p.stem in ("model", "diffusion_pytorch_model")]
            if len(named) != 1:
                raise WeightsError(
                    f"{folder} has several weight files and no index "
                    f"({', '.join(p.name for p in files[:3])}, ...); give the one to load"
                )
            files = named
        if files:
            return (files[0],)
    return ()


def _are_all_shards(files: list[Path]) -> bool:
    """Tell whether files are numbered parts of one model, with none left out."""
    parts = [_NUMBERED.fullmatch(file.name) for file in files]
    if not all(parts) or len({(p[1], p[3], p[4]) for p in parts if p}) != 1:
        return False
    numbers = [int(p[2]) for p in parts if p]
    first, total = numbers[0], parts[0][3] if parts[0] else None
    in_order = first in (0, 1) and numbers == list(range(first, first + len(numbers)))
    return in_order and (total is None or int(total) == len(numbers))


def _shards(index: Path) -> tuple[Path, ...]:
    """Return the shards that an index names.

    Raises:
        WeightsError: the index cannot be read, or a shard is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map; download it again")
    files = [index.parent / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards "
            f"({', '.join(missing[:3])}); download them again into that folder"
        )
    return tuple(files)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        WeightsError: it cannot be read or is no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path} ({error}); download it again") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} holds no JSON object; download it again")
    return data


def read_tensors(files: tuple[Path, ...]) -> dict[str, Tensor]:
    """Return all tensors by plain name, on the CPU and still backed by the files.

    Raises:
        WeightsError: a file is damaged, holds code, or holds no tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(
            _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        )
    if not tensors:
        raise WeightsError(f"{files[0]} holds no tensors; give a file with a model's state dict")
    return dict(zip(plain_names(tensors), tensors.values(), strict=True))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        _damaged(file, error)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        refused = re.search(
            r"unsupported (?:global|class|type)\W+(?:global )?([\w.]+)", str(error), re.IGNORECASE
        )
        if refused is None:
            _damaged(file, ValueError("not a PyTorch file of tensors alone"))
        raise WeightsError(
            f"{file} holds Python objects besides tensors ({refused[1]}), which can run code and "
            "are never loaded; where you trust the file, convert its state dict to .safetensors"
        ) from error
    except Exception as error:
        # Damaged bytes are instructions to the unpickler: nearly any type can come out of it.
        _damaged(file, error)
    return unwrap(content)


def _is_zip(file: Path) -> bool:
    """Tell torch's own format since 1.6, the only one that can be mapped, from the older one."""
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


def _damaged(file: Path, error: Exception) -> NoReturn:
    """Raise what is known about a file that cannot be read."""
    with file.open("rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise WeightsError(
                f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            ) from error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise WeightsError(
        f"{file} is cut short or damaged ({file.stat().st_size} bytes; {reason}); download it again"
    ) from error


def download(repo: str, subfolder: str | None = None) -> Path:
    """Return a local snapshot of a hub repository; the cache is asked first.

    `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` have their usual meaning.

    Raises:
        WeightsError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    # The hub client calls a snapshot incomplete that lacks any file of the patterns asked for.
    small = [f"{inside}*.{kind}" for kind in ("json", "txt", "model")]
    safe = [*small, f"{inside}*.safetensors"]
    unsafe = [*small, *(f"{inside}*{kind}" for kind in PICKLES)]
    for patterns in (safe, unsafe):
        try:
            cached = Path(snapshot_download(repo, local_files_only=True, allow_patterns=patterns))
            if (cached / inside).is_dir() and _weights_in(cached / inside):
                return cached
        except (OSError, ValueError, WeightsError) as error:
            log.debug("%s is not complete in the local cache: %s", repo, error)
    if constants.HF_HUB_OFFLINE:
        _unreachable(repo, "HF_HUB_OFFLINE is set")
    try:
        # One request with a short limit: without a network it fails at once, not after retries.
        siblings = HfApi().model_info(repo, timeout=10).siblings or []
        names = [file.rfilename for file in siblings if file.rfilename.startswith(inside)]
        patterns = safe if any(name.endswith(".safetensors") for name in names) else unsafe
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:
        # The hub client, its HTTP library and the disk raise unrelated types; each means the same.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _unreachable(repo, reason)


def _unreachable(repo: str, reason: str) -> NoReturn:
    raise WeightsError(
        f"{repo} is not a local path and the hub cannot be reached ({reason}); download it to a "
        f"folder (hf download {repo} --local-dir FOLDER) and pass the folder"
    ) from None
