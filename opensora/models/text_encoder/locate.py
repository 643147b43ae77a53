"""Find the folders of a text encoder: a pipeline folder, a model folder, or a Hugging Face id."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NoReturn

from opensora.errors import WeightsError

SMALL_FILES = ["*.json", "*.model", "*.txt"]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def locate(source: str | Path, subfolder: str | None = None) -> Path:
    """Return the folder that holds `config.json` and the weights, downloading a hub id if needed.

    A hub id already in the local cache is used without touching the network. Of a remote
    repository, the safetensors files are taken, and the .bin files only where there are none.

    Args:
        source: folder, or hub id such as "DeepFloyd/t5-v1_1-xxl".
        subfolder: folder inside the source; None looks at the source and at its `text_encoder`.

    Raises:
        WeightsError: nothing usable is there; says what to download.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _inside(path, subfolder, str(source))
    if path.is_file():
        raise WeightsError(f"text encoder: {source} is a file; give the folder that contains it")
    if not _is_hub_id(str(source)):
        raise WeightsError(
            f"text encoder: folder {source} does not exist; give an existing folder or a Hugging "
            'Face id such as "DeepFloyd/t5-v1_1-xxl"'
        )
    return _inside(_download(str(source), subfolder), subfolder, str(source))


def weights_in(folder: Path) -> str | None:
    """Name the weight file or index of shards, safetensors first; None if a file is missing."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return name
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise WeightsError(f"text encoder: cannot read {index}: {error}") from error
            if all((folder / shard).is_file() for shard in shards):
                return index.name
    return None


def _inside(root: Path, subfolder: str | None, source: str) -> Path:
    """Pick the model folder inside a source and check that it is complete."""
    folder = root / subfolder if subfolder else root
    if not subfolder and not (root / "config.json").is_file():
        nested = root / "text_encoder"
        folder = nested if (nested / "config.json").is_file() else root
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"text encoder: {folder} has no config.json; give the folder of a T5 encoder, or one "
            "that contains it as text_encoder"
        )
    if weights_in(folder) is None:
        raise WeightsError(
            f"text encoder: {folder} has no complete {' or '.join(WEIGHT_FILES)} (a shard may be "
            f"missing); download it again: hf download {source}"
        )
    return folder


def _is_hub_id(source: str) -> bool:
    """Tell an `owner/name` id from a path."""
    parts = source.split("/")
    return len(parts) == 2 and all(
        part and part not in (".", "..") and not part.startswith(("~", ".")) for part in parts
    )


def _download(repo: str, subfolder: str | None) -> Path:
    """Return a complete local snapshot of a hub repository."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        cached = Path(snapshot_download(repo, local_files_only=True))
        if weights_in(cached / prefix) is not None:
            return cached
    except LocalEntryNotFoundError:
        pass
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        _unavailable(repo, "HF_HUB_OFFLINE is set")
    try:
        # One request with a short limit: without a network this fails at once, not after retries.
        siblings = HfApi().model_info(repo, timeout=10).siblings or []
        names = [file.rfilename for file in siblings if file.rfilename.startswith(prefix)]
        kind = ".safetensors" if any(name.endswith(".safetensors") for name in names) else ".bin"
        patterns = [*SMALL_FILES, f"{prefix}*{kind}"]
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:
        # The hub client, its HTTP library and the disk raise unrelated types; each means the same.
        reason = str(error).strip().splitlines()
        _unavailable(repo, reason[0] if reason else type(error).__name__)


def _unavailable(repo: str, reason: str) -> NoReturn:
    """Raise the one sentence that says what to download and how to point at it."""
    raise WeightsError(
        f"text encoder: {repo} is not on this machine and cannot be downloaded ({reason}); on a "
        f"machine with network access run `hf download {repo} --local-dir t5`, copy the folder "
        "here and give its path as text_encoder.from_pretrained"
    )
