"""Read and write low-rank updates of linears (LoRA): PEFT's names, and other programs' when read.

Written is `base_model.model.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank],
with PEFT's adapter_config.json beside the file or, for a lone file, in its header.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.errors import UsageError, WeightsError
from opensora.files import atomic, write_text
from opensora.weight_files import PICKLES, read_json, read_tensors

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: Entry of a lone file's header that holds the config; diffusers reads and writes it too.
HEADER = "lora_adapter_metadata"

_TENSOR = re.compile(
    r"(?P<module>.+?)\.(?:lora_(?P<half>A|B|down|up)|lora\.(?P<old>down|up))(?:\.[\w-]+)?\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
# What programs put before a module's name; several may follow each other.
_BEFORE = re.compile(
    r"(?:base_model\.model\.|transformer\.|diffusion_model\.|model\.|module\.|_orig_mod\."
    r"|lora_unet_|lora_transformer_)+"
)


@dataclass(frozen=True)
class LoraUpdate:
    """Hold scaling * up @ down, the update of one linear.

    Attributes:
        down: A [rank, in].
        up: B [out, rank].
        alpha: scaling * rank, or * sqrt(rank) for rank-stabilised updates.
        scaling: factor of the product.
    """

    down: Tensor
    up: Tensor
    alpha: float
    scaling: float


@dataclass(frozen=True)
class LoraFile:
    """Hold the updates of a file by the modules' names in it, and its header."""

    path: Path
    updates: dict[str, LoraUpdate]
    metadata: dict[str, str]


def parse_lora(text: str) -> tuple[Path, float]:
    """Split PATH or PATH:WEIGHT.

    Raises:
        UsageError: there is no such file or folder.
    """
    path, weight = Path(text).expanduser(), 1.0
    before, colon, after = text.rpartition(":")
    if colon and not path.exists():
        with suppress(ValueError):
            path, weight = Path(before).expanduser(), float(after)
    if not path.exists():
        raise UsageError(f"lora: {path} does not exist; give a .safetensors file or its folder")
    if not math.isfinite(weight):
        raise UsageError(f"lora: the weight of {path} must be a finite number, got {after}")
    return path, weight


def locate_lora(source: str | os.PathLike[str]) -> Path:
    """Return the weight file of a file or folder.

    Raises:
        WeightsError: there is none, or there are several.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = (
            [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
        )
        files = files or sorted(path.glob("adapter_model.bin"))
        if len(files) != 1:
            raise WeightsError(
                f"{path} holds {len(files)} LoRA files, expected {WEIGHTS}; give the file"
            )
        return files[0]
    if not path.is_file():
        raise WeightsError(f"file not found: {source}; give a LoRA file or its folder")
    if path.suffix not in (".safetensors", *PICKLES):
        raise WeightsError(f"{path} is no weight file; expected one that ends with .safetensors")
    return path


def read_lora(source: str | os.PathLike[str]) -> LoraFile:
    """Read the updates of a PEFT folder or file, or a file with names of diffusers or kohya.

    The scale is that of the file: its alphas, its header, or adapter_config.json beside it; a file
    that does not say has alpha = rank.

    Raises:
        WeightsError: damaged, not finite, or holding anything but plain updates of linears.
    """
    path = locate_lora(source)
    tensors = read_tensors((path,))
    metadata = _metadata(path)
    config = _config(path, metadata)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    other = []
    for key, tensor in tensors.items():
        if found := _TENSOR.fullmatch(key):
            half = {"A": "down", "B": "up"}.get(found["half"], found["half"] or found["old"])
            halves.setdefault(_module(found["module"]), {})[half] = tensor
        elif (found := _ALPHA.fullmatch(key)) and tensor.numel() == 1:
            alphas[_module(found["module"])] = float(tensor)
        else:
            other.append(key)
    if other or not halves:
        raise WeightsError(
            f"{path} holds {len(other)} tensors that are no LoRA matrices "
            f"({', '.join(other[:3])}{', ...' if other[3:] else ''}); only plain updates of "
            "linears can be loaded"
        )
    updates = {}
    for module, pair in halves.items():
        if len(pair) != 2:
            raise WeightsError(f"{path}: {module} has only one of its two matrices")
        down, up = pair["down"], pair["up"]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            raise WeightsError(
                f"{path}: the matrices of {module} are {list(down.shape)} and {list(up.shape)}, "
                "expected [rank, in] and [out, rank]"
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise WeightsError(f"{path}: {module} holds NaN or infinity; use another file")
        updates[module] = _scaled(down, up, alphas.get(module), module, config)
    return LoraFile(path, updates, metadata)


def write_lora(
    path: str | os.PathLike[str],
    updates: Mapping[str, LoraUpdate],
    *,
    dropout: float = 0.0,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write updates under PEFT's names.

    Args:
        path: a .safetensors file, whose header then holds the config; or a folder, for
            adapter_model.safetensors and adapter_config.json.
        updates: module -> update.
        dropout: noted in the config.
        metadata: further entries of the header, such as trigger words.

    Raises:
        UsageError, DoesNotFitError: it cannot be written.
    """
    path = Path(path)
    config = _describe(updates, dropout)
    tensors = {}
    for module, update in updates.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = update.down.detach().cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = update.up.detach().cpu().contiguous()
    header = {"format": "pt", HEADER: json.dumps(config), **(metadata or {})}
    folder = path.suffix != ".safetensors"
    file = path / WEIGHTS if folder else path
    with atomic(file) as partial:
        try:
            save_file(tensors, partial, metadata=header)
        except SafetensorError as error:
            raise UsageError(f"cannot write {file}: {error}; give another folder") from error
        partial.chmod(0o644)  # safetensors writes for the owner alone
    if folder:
        write_text(path / CONFIG, json.dumps(config, indent=2) + "\n")


def _describe(updates: Mapping[str, LoraUpdate], dropout: float) -> dict[str, Any]:
    """Return PEFT's config; what most updates have is its r and alpha, others are listed."""
    ranks = {name: int(update.down.shape[0]) for name, update in updates.items()}
    # PEFT multiplies by alpha / r.
    alphas = {name: update.scaling * ranks[name] for name, update in updates.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": list(updates),
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata() or {})


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the adapter's config from the header or from beside the file, checked; or {}.

    Raises:
        WeightsError: it is unreadable, or of a kind that is more than B A.
    """
    config: Any = {}
    if HEADER in metadata:
        try:
            config = json.loads(metadata[HEADER])
        except ValueError as error:
            raise WeightsError(f"{path}: {HEADER} in its header is no JSON: {error}") from None
        # diffusers says which part each key is of.
        config = {str(key).removeprefix("transformer."): v for key, v in dict(config).items()}
    elif (path.parent / CONFIG).is_file():
        config = read_json(path.parent / CONFIG)
    kind = config.get("peft_type", "LORA")
    more = [key for key in ("use_dora", "use_qalora", "use_bdlora") if config.get(key)]
    if kind != "LORA" or more:
        raise WeightsError(
            f"{path}: {more[0] if more else kind} is not plain LoRA and cannot be loaded; merge it "
            "into the weights with the program that made it"
        )
    return dict(config)


def _scaled(
    down: Tensor, up: Tensor, alpha: float | None, module: str, config: Mapping[str, Any]
) -> LoraUpdate:
    rank = int(down.shape[0])
    if alpha is None:
        alpha = config.get("lora_alpha", rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            with suppress(re.error):
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise WeightsError(f"{module}: alpha {alpha!r} is no finite number")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LoraUpdate(down, up, float(alpha), float(alpha) / divisor)


def _module(name: str) -> str:
    return _BEFORE.sub("", name, count=1) if _BEFORE.match(name) else name
