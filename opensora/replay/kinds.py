"""Find out what a case is, replay it and judge it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

from opensora.replay import (
    autoencoder,
    bare_layers,
    data,
    flow,
    judging,
    layers,
    table_entries,
    training,
    transformer,
)
from opensora.replay.judging import Difference, Result, measure, worst
from opensora.replay.modules import Outputs
from opensora.replay.recording import (
    LOW_PRECISION,
    Case,
    Mismatch,
    Unsupported,
    split_precision,
)
from opensora.replay.tables import compare_entries


@dataclasses.dataclass(frozen=True)
class Kind:
    """Describe a kind of tensor case.

    Attributes:
        matches: whether a case is of this kind, by its metadata and tensor names.
        run: computes the case's tensors in its working precision, by full name.
        tolerance: for float32.
        float32_inside: parts are float32 by definition, also in a float64 run.
        suffixes: names such as `out.y_bf16` are `out.y` of a run in that precision.
    """

    matches: Callable[[Case], bool]
    run: Callable[[Case], Outputs]
    tolerance: float = judging.TOLERANCE
    float32_inside: bool = False
    suffixes: bool = False


def _layer(matches: Callable[[Case], bool], run: Callable[[Case], Outputs]) -> Kind:
    return Kind(matches, run, float32_inside=True, suffixes=True)


def _flow(matches: Callable[[Case], bool], run: Callable[[Case], Outputs]) -> Kind:
    return Kind(matches, run, float32_inside=True)  # timesteps are


#: A case with a class is matched by that alone, so the order does not matter.
KINDS = {
    "STDiT3": Kind(transformer.is_stdit3, transformer.run_stdit3, float32_inside=True),
    "layer": _layer(layers.is_layer, layers.run_layer),
    "temporal VAE": Kind(autoencoder.is_temporal, autoencoder.run_temporal),
    "video VAE": Kind(autoencoder.is_video, autoencoder.run_video, tolerance=1e-4),
    "caption embedder": _layer(bare_layers.is_caption_embedder, bare_layers.run_caption_embedder),
    "RMSNorm": _layer(bare_layers.is_rms_norm, bare_layers.run_rms_norm),
    "rotary embedding": _layer(bare_layers.is_rotary, bare_layers.run_rotary),
    "timestep embedder": _layer(
        bare_layers.is_timestep_embedder, bare_layers.run_timestep_embedder
    ),
    "size embedder": _layer(bare_layers.is_size_embedder, bare_layers.run_size_embedder),
    "modulation": _layer(bare_layers.is_modulation, bare_layers.run_modulation),
    "position embedding": _layer(
        bare_layers.is_position_embedding, bare_layers.run_position_embedding
    ),
    "causal convolution": _layer(bare_layers.is_causal_conv, bare_layers.run_causal_conv),
    "rectified flow: noise": _flow(flow.is_add_noise, flow.run_add_noise),
    "rectified flow: loss": _flow(flow.is_loss, flow.run_loss),
    "rectified flow: sample": _flow(flow.is_sample, flow.run_sample),
    "rectified flow: drawn timesteps": _flow(flow.is_drawn_timesteps, flow.run_drawn_timesteps),
    "rectified flow: timestep transform": _flow(
        flow.is_timestep_transform, flow.run_timestep_transform
    ),
    "average of weights": Kind(training.is_average, training.run_average, float32_inside=True),
    "discriminator": Kind(training.is_discriminator, training.run_discriminator, suffixes=True),
    "losses of the VAE": Kind(
        training.is_vae_losses, training.run_vae_losses, float32_inside=True, suffixes=True
    ),
    "transforms": Kind(data.is_transforms, data.run_transforms),
}
_BY_CLASS = ("STDiT3", "layer", "temporal VAE", "video VAE", "discriminator")
TABLES = {**table_entries.TABLES, **training.TABLES, **data.TABLES}


def replay_file(path: Path) -> Result:
    """Replay one case file and judge it; never raises for what is in the file."""
    try:
        replay = _replay_table if path.suffix == ".json" else _replay_tensors
        differences, detail = replay(path)
    except Unsupported as reason:
        return Result(path.stem, "unsupported", None, None, str(reason))
    except Mismatch as reason:
        return Result(path.stem, "fail", None, None, str(reason))
    except Exception as error:
        # Whatever a damaged file, or our own code, throws is a verdict on this case alone.
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return Result(path.stem, "fail", None, None, f"{type(error).__name__}: {first_line}")
    worst_one = worst(differences)
    verdict = "pass" if all(d.passes for d in differences) else "fail"
    if verdict == "fail" and path.suffix != ".json":
        wrong = sum(not d.passes for d in differences)
        detail = f"{detail}; {wrong} of them differ, {worst_one.name} most"
    return Result(path.stem, verdict, worst_one.error, worst_one.tolerance, detail)


def _replay_table(path: Path) -> tuple[list[Difference], str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    for kind, table in TABLES.items():
        if table.matches(content):
            difference, detail = compare_entries(table.entries(content))
            return [difference], f"{kind}: {detail}"
    first = content[0] if isinstance(content, list) and content else content
    keys = (
        ", ".join(str(key)[:20] for key in list(first)[:4]) if isinstance(first, dict) else "none"
    )
    raise Unsupported(f"no such kind of table here (its keys: {keys})")


def find_kind(case: Case) -> tuple[str, Kind]:
    """Return the name and description of a case's kind.

    Raises:
        Unsupported: there is none; names the class or what the case holds.
    """
    for name, kind in KINDS.items():
        if (name in _BY_CLASS or not case.metadata.get("cls")) and kind.matches(case):
            return name, kind
    if case.metadata.get("cls"):
        raise Unsupported(f"no class {case.class_name} here")
    for key in ("scheduler", "config"):
        value = case.read(key)
        named = value.get("type") or value.get("cls") if isinstance(value, dict) else None
        if named:
            raise Unsupported(f"no {key} {named} here")
    outputs = case.names("out.")
    shown = ", ".join(outputs[:4]) + (", ..." if len(outputs) > 4 else "")
    raise Unsupported(f"no such kind of case here (outputs: {shown or 'none'})")


def _replay_tensors(path: Path) -> tuple[list[Difference], str]:
    case = Case.load(path)
    name, kind = find_kind(case)
    recorded = case.recorded()
    if not recorded:
        raise Mismatch("the file holds no out. or grad. tensors")
    differences: list[Difference] = []
    for dtype, names in _by_precision(case, kind).items():
        differences += _compare(case, kind, dtype, names)
    unused = set(case.names("in.")) - case.used
    if unused:
        raise Mismatch(f"inputs that nothing used: {', '.join(sorted(unused))}")
    detail = f"{name}: {len(differences)} tensor{'s' * (len(differences) != 1)}"
    return differences, "; ".join([detail, *sorted(case.notes)])


def _by_precision(case: Case, kind: Kind) -> dict[torch.dtype, dict[str, str]]:
    """Return precision -> full name in the file -> full name in a run of that precision."""
    found: dict[torch.dtype, dict[str, str]] = {}
    for name in case.recorded():
        plain, dtype = split_precision(name) if kind.suffixes else (name, None)
        found.setdefault(dtype or case.recorded_dtype, {})[name] = plain
    return found


def _compare(case: Case, kind: Kind, dtype: torch.dtype, names: dict[str, str]) -> list[Difference]:
    """Run the case in one precision and measure each of its tensors recorded in it."""
    ours = kind.run(case.seen_in(dtype))
    low = dtype in LOW_PRECISION.values()
    truth = kind.run(case.seen_in(torch.float32, rounding=dtype)) if low else {}
    missing = [name for name, plain in names.items() if plain not in ours]
    if missing:
        raise Mismatch(f"not compared: {', '.join(sorted(missing))}")
    tolerance = kind.tolerance
    if dtype == torch.float64 and not kind.float32_inside:
        tolerance = judging.TOLERANCE_FLOAT64
    step = torch.finfo(dtype).eps
    differences = [
        measure(
            name,
            ours[plain],
            case.tensors[name],
            truth=truth.get(plain),
            step=step,
            tolerance=tolerance,
            scale=_scale(case, name),
        )
        for name, plain in names.items()
    ]
    return judging.allow_for_chance(differences, step) if low else differences


def _scale(case: Case, name: str) -> float:
    """Return the least magnitude that an error of a tensor is measured against."""
    if name.startswith("grad."):
        largest = max(float(case.tensors[f"grad.{n}"].abs().max()) for n in case.names("grad."))
        return judging.VANISHING * largest
    weights = case.tensors.get("in.loss_w")
    if name == "out.loss" and weights is not None:
        # A sum of terms of both signs: what it would be if the signs were random.
        terms = [t for n, t in case.recorded().items() if n != name and t.shape == weights.shape]
        return max((float((t.double() * weights).norm()) for t in terms), default=0.0)
    return 0.0
