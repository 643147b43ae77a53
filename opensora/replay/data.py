"""Replay what prepares training data: transforms, frames, buckets, the order of batches, masks."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import opensora
from opensora.config_file import load_config_file
from opensora.data import transforms
from opensora.data.batch import Entry as Row
from opensora.data.buckets import BucketId, Buckets
from opensora.data.masks import MaskGenerator
from opensora.data.sampler import BatchSampler
from opensora.replay.modules import Outputs
from opensora.replay.recording import Case, Mismatch
from opensora.replay.tables import Entry, Table, in_sections, only, refused, rows, same

# --- transforms -----------------------------------------------------------------------------

_TRANSFORM = re.compile(r"(pil_)?(?:(resize_crop)|(?:ucf|center)(\d+)_)(\d+)")


def is_transforms(case: Case) -> bool:
    """Whether all inputs are clips `in.clip<i>` and images `in.img<i>`."""
    inputs = case.names("in.")
    return bool(inputs) and all(re.fullmatch(r"(clip|img)\d+", name) for name in inputs)


def run_transforms(case: Case) -> Outputs:
    """Bring clips and images to the sizes of the metadata, or else of the outputs.

    Outputs `resize_crop<i>` and `ucf<side>_<i>` come from clip i, `pil_resize_crop<i>` and
    `pil_center<side>_<i>` from image i.
    """
    from PIL import Image

    sizes = case.read("sizes_h_w_th_tw")
    found: Outputs = {}
    for name in case.names("out."):
        match = _TRANSFORM.fullmatch(name)
        if match is None:
            continue
        image, crop, side, index = match.groups()
        given = case.given(f"img{index}") if image else case.input(f"clip{index}")
        shape = case.tensors[f"out.{name}"].shape
        height, width = shape[:2] if image else shape[-2:]
        if crop and sizes is not None:
            *source, height, width = sizes[int(index)]
            if source != list(given.shape[:2] if image else given.shape[-2:]):
                raise Mismatch(f"input {index} has not the size {source} of the metadata")
        if image:
            picture = Image.fromarray(given.numpy())
            pixels = (
                transforms.resize_crop_image(picture, height, width)
                if crop
                else transforms.center_image(picture, int(side))
            )
            found[f"out.{name}"] = torch.from_numpy(pixels.copy())
        elif crop:
            found[f"out.{name}"] = transforms.resize_crop(given, height, width)
        else:
            found[f"out.{name}"] = transforms.center(given, int(side))
    return found


def _crops(content: Any) -> Iterator[Entry]:
    for row in content:
        only(("total", "num_frames", "frame_interval", "seed", "frames"), row)
        ours = partial(_crop, row["total"], row["num_frames"], row["frame_interval"], row["seed"])
        label = f"{row['num_frames']} of {row['total']} frames, seed {row['seed']}"
        yield Entry(label, ours, row["frames"])


def _crop(total: int, frames: int, interval: int, seed: int) -> list[int]:
    # The original's last start is one before ours; where a clip starts is all that differs.
    last = max(0, transforms.last_start(total, frames, interval) - 1)
    return transforms.frame_indices(total, frames, interval, random.Random(seed).randint(0, last))


# --- buckets --------------------------------------------------------------------------------

_COLUMNS = ["T", "H", "W", "frame_interval", "seed"]


def _is_decisions(content: Any) -> bool:
    return isinstance(content, dict) and {"config", "rows"} <= content.keys()


def _decisions(content: Any) -> Iterator[Entry]:
    """Rows are [frames, height, width, interval, seed, bucket or null]."""
    only(("config", "rows", "columns", "num_bucket", "order", "bucket_index"), content)
    if content.get("columns", _COLUMNS)[: len(_COLUMNS)] != _COLUMNS:
        raise Mismatch(f"columns: expected {', '.join(_COLUMNS)}")
    buckets = Buckets(content["config"])
    places = {n: {str(t): r.place for t, r in x.items()} for n, x in buckets.rules.items()}
    ours = {"num_bucket": buckets.count, "order": list(buckets.rules), "bucket_index": places}
    for name in (name for name in ours if name in content):
        yield Entry(name, partial(ours.__getitem__, name), content[name])
    for *clip, recorded in content["rows"]:
        if len(clip) != len(_COLUMNS):
            raise Mismatch(f"a row of {len(clip) + 1} values, expected {len(_COLUMNS) + 1}")
        yield Entry(f"clip {clip}", partial(buckets.choose, *clip), recorded)


def _bucket_sizes(content: Any) -> Iterator[Entry]:
    """Compare sizes by the bucket's name; the rest with the published stage that it agrees with."""
    stage = _stage(content)
    for row in content:
        only(("id", "thw", "prob", "bs"), row)
        bucket = BucketId(*row["id"])
        yield Entry(bucket.name, partial(getattr, bucket, "size"), row["thw"])
        ours = partial(_rule, stage, bucket)
        recorded = [row.get("prob"), row.get("bs")]
        yield Entry(f"{bucket.name}: probability and batch size", ours, recorded, _of_no_stage)


def _of_no_stage(ours: Any) -> str | None:
    unknown = type(ours) is LookupError  # not a KeyError, which names a bucket
    return "probabilities and batch sizes of a configuration that is not here" if unknown else None


def _stage(content: Any) -> Buckets | None:
    """Return the published stage that most rows agree with; None if it is fewer than half."""

    def agreeing(buckets: Buckets) -> int:
        count = 0
        for row in content:
            name, frames, _ = row["id"]
            known = frames in buckets.rules.get(name, {})
            recorded = [row.get("prob"), row.get("bs")]
            count += known and same(_rule(buckets, BucketId(*row["id"])), recorded)
        return count

    best = max(_stages(), key=agreeing, default=None)
    return best if best is not None and 2 * agreeing(best) >= len(content) else None


@cache
def _stages() -> tuple[Buckets, ...]:
    folder = Path(opensora.__file__).parents[1] / "configs/opensora-v1-2/train"
    files = sorted(folder.glob("stage[0-9].py"))  # none beside an installed package
    return tuple(Buckets(load_config_file(file)["bucket_config"]) for file in files)


def _rule(buckets: Buckets | None, bucket: BucketId) -> list[Any]:
    """Return probability, or the pair of them, and batch size of a bucket."""
    if buckets is None:
        raise LookupError
    rule = buckets.rules[bucket.resolution][bucket.frames]
    chance = rule.keep if rule.attempt is None else [rule.keep, rule.attempt]
    return [chance, rule.batch_size or None]


# --- the order of batches -------------------------------------------------------------------


def _batches(content: Any) -> Iterator[Entry]:
    """Rows are [frames, height, width, number], samples "number-frames-height-width"."""
    for case in content:
        settings = ("frame_interval", "seed", "shuffle", "drop_last")
        states = [key for key in case if re.fullmatch(r"state_dict_step\d+", key)]
        known = ("table", "config", "batches", "num_replicas", "epoch", "start_step")
        only((*known, *settings, *states), case)
        if any(row[3:] != [number] for number, row in enumerate(case["table"])):
            raise Mismatch("the rows of a table are not numbered from 0 on")
        replicas, epoch = case.get("num_replicas", 1), case.get("epoch", 0)
        sampler = BatchSampler(
            [Row(str(row), *row[:3]) for row in case["table"]],
            Buckets(case["config"]),
            replicas=replicas,
            **{name: case[name] for name in settings if name in case},
        )
        plan = sampler.epoch(epoch)[case.get("start_step", 0) * replicas :]
        label = f"seed {sampler.seed}, epoch {epoch}"
        for rank, recorded in case["batches"].items():
            mine = [
                [f"{index}-{'-'.join(map(str, batch.size))}" for index in batch.indices]
                for batch in plan[int(rank) :: replicas]
            ]
            yield Entry(f"{label}, replica {rank}", partial(list, mine), recorded)
        for key in states:
            # Where a run is, is one number here: that of the next batch.
            number = int(key.removeprefix("state_dict_step")) * sampler.replicas
            state = {"seed": sampler.seed, "epoch": epoch, "last_micro_batch_access_index": number}
            yield Entry(f"{label}, {key}", partial(dict, state), case[key])


# --- masks ----------------------------------------------------------------------------------

_MASKS = ("ratios", "T", "n", "seed")
#: Kinds that give nothing to make of a clip of two frames, in the original.
_WHOLE = ("image_head_tail", "mask_image_head_tail")


def _is_masks(content: Any) -> bool:
    return isinstance(content, dict) and (
        rows(*_MASKS)(content.get("cases")) or rows("T", "k", "out")(content.get("small_T"))
    )


def _drawn(section: Any) -> Iterator[Entry]:
    for case in section:
        only((*_MASKS, "first20", "mean_unmasked", "frac_all_ones", "per_frame"), case)
        ratios, frames = case["ratios"], case["T"]
        masks = _draw(ratios, frames, case["n"], case["seed"])
        ours = {
            "first20": masks[:20].int().tolist(),
            "mean_unmasked": masks.float().mean().item(),
            "frac_all_ones": masks.all(1).float().mean().item(),
            "per_frame": masks.float().mean(0).tolist(),
        }
        for name in (name for name in ours if name in case):
            yield Entry(
                f"masks of {frames} frames, seed {case['seed']}, {name}",
                partial(ours.__getitem__, name),
                case[name],
                partial(_made_somewhere, case, name),
                1e-6,  # means in float32
            )


def _draw(ratios: Mapping[str, float], frames: int, count: int, seed: int) -> torch.Tensor:
    """Draw masks as a run whose two generators have this seed."""
    generator = torch.Generator().manual_seed(seed)
    return MaskGenerator(ratios).masks(count, frames, random.Random(seed), generator)


def _made_somewhere(case: Any, name: str, ours: Any) -> str | None:
    """Tell whether two frames that the original gives both are one given and one made here."""
    if case["T"] != 2 or not any(case["ratios"].get(kind) for kind in _WHOLE):
        return None
    recorded = case[name]
    if name == "first20":
        recorded = [[0, 1] if mask == [0, 0] else mask for mask in recorded]
        agrees = same(ours, recorded)
    elif name == "per_frame":
        agrees = same(ours[0], recorded[0], 1e-6) and recorded[1] < ours[1]
    else:
        agrees = name == "mean_unmasked" and recorded < ours
    return "clips of two frames keep one to make" if agrees else None


def _refusals(section: Any) -> Iterator[Entry]:
    for row in section:
        recorded = row["out"]

        def deviates(ours: Any, row: Any = row, recorded: Any = recorded) -> str | None:
            rest = 1.0 - sum(row["r"].values())
            if refused(ours) and rest < 0 and same({**row["r"], "identity": rest}, recorded):
                return "ratios above 1 refused"
            old = any(name.startswith("mask_") for name in row["r"])
            drawn = recorded.get("__error__") == "AssertionError" and not refused(ours)
            return "1.1's names understood" if old and drawn else None

        ours = partial(_ratios, row["r"])
        yield Entry(f"ratios {row['r']}", ours, recorded, deviates)


def _ratios(ratios: Mapping[str, float]) -> dict[str, float]:
    return MaskGenerator(ratios).ratios


def _short(section: Any) -> Iterator[Entry]:
    for row in section:
        frames, kind, recorded = row["T"], row["k"], row["out"]
        if "__error__" not in recorded:
            if recorded["T"] != frames or kind not in recorded["ratios"]:
                raise Mismatch(f"{kind} of {frames} frames is a case of other frames or kinds")
            yield from _drawn([recorded])
            continue
        short = kind.startswith("quarter") and frames < 4 and recorded["__error__"] == "ValueError"

        def deviates(ours: Any, short: bool = short) -> str | None:
            drawn = isinstance(ours, torch.Tensor)
            return "quarters of clips below 4 frames drawn" if short and drawn else None

        ours = partial(_draw, {kind: 1.0}, frames, 5, 0)
        yield Entry(f"{kind} of {frames} frames", ours, recorded, deviates)


_SECTIONS = {"cases": _drawn, "errors": _refusals, "small_T": _short}

TABLES = {
    "frames of a clip": Table(
        rows("total", "num_frames", "frame_interval", "seed", "frames"), _crops
    ),
    "buckets": Table(_is_decisions, _decisions),
    "sizes of buckets": Table(rows("id", "thw"), _bucket_sizes),
    "order of batches": Table(rows("table", "config", "batches"), _batches),
    "frame masks": Table(_is_masks, partial(in_sections, _SECTIONS)),
}
