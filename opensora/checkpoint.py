"""Load and save models, strictly: every name and shape is checked before a weight is taken.

A model class has `config_class` (`from_dict`, `to_dict`), `family` and `config`; it may have a
static `infer_config(shapes)` for files without config.json.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from opensora.errors import UsageError, WeightsError
from opensora.models.families import UNKNOWN, identify_family
from opensora.weight_files import locate, read_json, read_tensors, resolve
from opensora.weight_saving import save_model

__all__ = ["PretrainedMixin", "load_model", "read_config", "save_model", "weights_digest"]

log = logging.getLogger("opensora")

ModelT = TypeVar("ModelT", bound=nn.Module)
Progress = Callable[[int, int], None]
Shapes = dict[str, tuple[int, ...]]


def load_model(
    cls: type[ModelT],
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    config: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ModelT:
    """Return a model of class `cls` with the weights of `source`, in eval mode.

    Names and shapes must match exactly and every value must be finite.

    Args:
        cls: the model class.
        source: folder with config.json and *.safetensors (sharded too); one .safetensors, .pt,
            .pth, .bin or .ckpt file; a training run's folder; a hub id.
        subfolder: folder inside the source.
        config: used instead of config.json: the config or its dictionary.
        dtype: of floating weights; None keeps each as stored.
        device: where the weights go, one tensor at a time.
        progress: called with (bytes done, bytes in all) after every tensor.

    Raises:
        WeightsError: files are missing, damaged, unsafe, of another model, or hold NaN.
        UsageError: the configuration has an unknown key.
    """
    found = locate(source, subfolder)
    tensors = read_tensors(found.files)
    family = identify_family(tensors)
    if config is None and found.config is not None:
        config = read_json(found.config)
    wanted_family: str = cls.family  # type: ignore[attr-defined]
    if family not in (wanted_family, UNKNOWN):
        raise WeightsError(
            f"{found.source}: this is {family}; you asked for {wanted_family}"
            f"{_compared_with_any(cls, config, tensors)}"
        )
    if config is None:
        infer = getattr(cls, "infer_config", None)
        if infer is None or not found.self_describing:
            raise WeightsError(
                f"{found.source} has no config.json, which says how the model is built; put it "
                "beside the weights"
            )
        if family == UNKNOWN:
            first = ", ".join(list(tensors)[:3])
            raise WeightsError(
                f"{found.source}: these weights ({first}, ...) are of no known model; you asked "
                f"for {wanted_family}"
            )
        config = infer(shapes_of(tensors))
    if isinstance(config, Mapping):
        config = cls.config_class.from_dict(config)  # type: ignore[attr-defined]
    with torch.device("meta"):
        model = cls(config)
    apply_renamings(model, tensors)
    wanted, given = shapes_of(model.state_dict()), shapes_of(tensors)
    if wanted != given:
        raise WeightsError(
            f"{found.source}: the weights do not fit this {cls.__name__} of {len(wanted)} tensors: "
            f"{describe_mismatch(wanted, given)}; use the config.json published with them"
        )
    _assign(model, tensors, found.source, dtype, torch.device(device), progress)
    _fill_unsaved_buffers(model, cls, config, torch.device(device))
    log.info("loaded %s: %d/%d tensors of %s", found.source, len(given), len(wanted), cls.__name__)
    return model.eval()


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of every tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def describe_mismatch(wanted: Shapes, given: Shapes) -> str:
    """Say in one line how tensors differ from those wanted: counts and first examples."""
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    wrong = [
        f"{key} is {list(given[key])}, expected {list(wanted[key])}"
        for key in wanted
        if key in given and wanted[key] != given[key]
    ]
    return "; ".join(
        f"{len(rows)} {what} ({', '.join(rows[:3])}{', ...' if len(rows) > 3 else ''})"
        for what, rows in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if rows
    )


def _compared_with_any(cls: Any, config: Any, tensors: Mapping[str, Tensor]) -> str:
    """Compare weights of another family with `cls`, of the given config if it can be one."""
    try:
        config = cls.config_class.from_dict(config) if isinstance(config, Mapping) else config
    except UsageError:
        config = None
    with torch.device("meta"):
        model = cls(config or cls.config_class())
    return f" ({describe_mismatch(shapes_of(model.state_dict()), shapes_of(tensors))})"


def apply_renamings(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Apply the renamings of older names that modules registered for `load_state_dict`."""
    for prefix, module in model.named_modules():
        for hook in module._load_state_dict_pre_hooks.values():
            hook(tensors, f"{prefix}." if prefix else "", {}, True, [], [], [])


def _assign(
    model: nn.Module,
    tensors: dict[str, Tensor],
    source: str,
    dtype: torch.dtype | None,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Put copies of the tensors into a model on the meta device.

    Raises:
        WeightsError: a value is NaN or infinite, named with its tensor.
    """
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    state = {}
    for name in list(tensors):
        tensor = tensors.pop(name)  # so that a mapped file's pages can go
        done += tensor.nbytes
        if tensor.is_floating_point():
            check_finite(source, name, tensor)
            tensor = tensor.to(device, dtype or tensor.dtype, copy=True)
        else:
            tensor = tensor.to(device, copy=True)
        state[name] = tensor
        if progress is not None:
            progress(done, total)
    model.load_state_dict(state, strict=True, assign=True)


def check_finite(source: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor holds numbers alone.

    Raises:
        WeightsError: a value is NaN or infinite.
    """
    if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
        raise WeightsError(
            f"{source}: {name} holds {bad} NaN or infinite of {tensor.numel()} values; "
            "the file is damaged or training diverged: use another checkpoint"
        )


def _fill_unsaved_buffers(
    model: nn.Module, cls: type[nn.Module], config: Any, device: torch.device
) -> None:
    """Compute buffers that a state dict does not hold, by building the model once for real."""
    unsaved = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if not unsaved:
        return
    built = dict(cls(config).named_buffers())
    for name in unsaved:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, built[name].to(device))


def read_config(source: str | os.PathLike[str], subfolder: str | None = None) -> dict[str, Any]:
    """Return the config.json of a folder, hub id, or file's folder.

    Raises:
        WeightsError: there is none, or it cannot be read.
    """
    path = resolve(source, subfolder)
    config = (path.parent if path.is_file() else path) / "config.json"
    if not config.is_file():
        raise WeightsError(f"{config} does not exist; give the folder of one model")
    return read_json(config)


def weights_digest(source: str | os.PathLike[str], subfolder: str | None = None) -> str:
    """Return "sha256:..." of the weight files.

    Of one file it is what `sha256sum` prints. Of shards, and of all models of a pipeline folder,
    it is the digest of the lines "<sha256>  <relative path>", in the order of the paths.
    """
    path = resolve(source, subfolder)
    if path.is_dir() and (path / "model_index.json").is_file():
        files = sorted(path.rglob("*.safetensors"))
    else:
        files = list(locate(path).files)
    if not files:
        raise WeightsError(f"{source} has no weight files")
    sums = [_sha256(file) for file in files]
    if len(sums) == 1:
        return f"sha256:{sums[0]}"
    base = path if path.is_dir() else path.parent
    names = [file.relative_to(base).as_posix() for file in files]
    lines = "".join(f"{s}  {name}\n" for s, name in zip(sums, names, strict=True))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class PretrainedMixin:
    """Give a model class `from_pretrained` and `save_pretrained`; see `load_model`."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return a model with the weights of `source`, in eval mode; see `load_model`."""
        return load_model(cls, source, subfolder=subfolder, dtype=dtype, device=device)  # type: ignore[type-var]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and the weights; see `save_model`."""
        assert isinstance(self, nn.Module)
        save_model(self, folder)
