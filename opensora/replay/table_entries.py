"""List the entries of each kind of table that this library can replay."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from opensora import prompts, sizes
from opensora.captions import clean_caption, clean_prompt, plain_caption
from opensora.models.vae import OPENSORA_VAE_V1_2, VideoAutoencoder
from opensora.replay.recording import Mismatch
from opensora.replay.tables import Entry, Table, in_sections, refused, rows, sections

# --- sizes and lengths ----------------------------------------------------------------------


def _lookup(ours: Any, section: Any, label: str) -> Iterator[Entry]:
    """Compare a recorded mapping, of any depth, with ours, key by key."""
    for key, value in section.items():
        if isinstance(value, dict) and "__error__" not in value:
            yield from _lookup(ours[key], value, f"{label} {key}")
        else:
            yield Entry(f"{label} {key}", partial(ours.__getitem__, key), value)


def _image_sizes(section: Any) -> Iterator[Entry]:
    for resolution, row in section.items():
        for ratio, size in row.items():
            ours = partial(sizes.get_image_size, resolution, ratio)
            yield Entry(f"{resolution} {ratio}", ours, size)


def _frames(section: Any) -> Iterator[Entry]:
    for name, number in section.items():

        def deviates(ours: Any, number: Any = number) -> str | None:
            below_one = type(number) is int and number < 1
            return "lengths below 1 refused" if refused(ours) and below_one else None

        yield Entry(f"frames {name!r}", partial(sizes.get_num_frames, name), number, deviates)


def _is_frames(content: Any) -> bool:
    return isinstance(content, dict) and bool(sizes.FRAME_NAMES.keys() & content.keys())


_ASPECT: dict[str, Callable[[Any], Iterator[Entry]]] = {
    "ratio_map": lambda section: _lookup(sizes.RATIOS, section, "ratio"),
    "num_pixels": lambda section: _lookup(sizes.NUM_PIXELS, section, "pixels of"),
    "tables": lambda section: _lookup(sizes.SIZES, section, "size"),
    "get_image_size": _image_sizes,
    "num_frames": _frames,
}


def _closest_ratios(content: Any) -> Iterator[Entry]:
    for row in content:
        ours = partial(sizes.closest_ratio, row["res"], row["h"], row["w"])
        yield Entry(f"{row['res']} {row['h']}x{row['w']}", ours, row["out"])


def _is_latent_sizes(content: Any) -> bool:
    return isinstance(content, dict) and any(re.match(r"by_(frames|hw)_\d", k) for k in content)


def _latent_sizes(content: Any) -> Iterator[Entry]:
    """Sections by_frames_<h>x<w> (frames -> micro<n> or micro_none -> size) and by_hw_<n>f."""
    with torch.device("meta"):
        vae = VideoAutoencoder(OPENSORA_VAE_V1_2)

    def size(micro: int | None, frames: int | None, height: int, width: int) -> Any:
        vae.micro_frame_size = micro
        return vae.get_latent_size((frames, height, width))

    for name, section in content.items():
        by_frames = re.fullmatch(r"by_frames_(\d+)x(\d+)", name)
        by_size = re.fullmatch(r"by_hw_(\d+)f", name)
        if by_frames:
            height, width = int(by_frames[1]), int(by_frames[2])
            for frames, row in section.items():
                length = None if frames == "None" else int(frames)
                for kind, recorded in row.items():
                    micro = None if kind == "micro_none" else int(kind.removeprefix("micro"))
                    ours = partial(size, micro, length, height, width)
                    yield Entry(f"{frames} frames, {kind}", ours, recorded)
        elif by_size:
            for shape, recorded in section.items():
                height, width = (int(side) for side in shape.split("x"))
                ours = partial(
                    size, OPENSORA_VAE_V1_2.micro_frame_size, int(by_size[1]), height, width
                )
                yield Entry(shape, ours, recorded)
        elif name != "note":
            raise Mismatch(f"not compared: section {name!r}")


# --- text -----------------------------------------------------------------------------------

_CLEANERS = {"once": clean_caption, "twice": clean_prompt, "plain": plain_caption}


def _cleaning(content: Any) -> Iterator[Entry]:
    for row in content:
        for kind, recorded in row.items():
            if kind in _CLEANERS:
                yield Entry(f"{kind} {row['s']!r}", partial(_CLEANERS[kind], row["s"]), recorded)
            elif kind not in ("s", "note"):
                raise Mismatch(f"not compared: column {kind!r}")


def _splits(section: Any) -> Iterator[Entry]:
    for row in section:
        yield Entry(f"split {row['p']!r}", partial(prompts.split_prompt, row["p"]), row["out"])


def _merges(section: Any) -> Iterator[Entry]:
    for row in section:
        ours = partial(prompts.merge_prompt, row["a"], row["b"])
        yield Entry(f"merge {row['a']!r}", ours, row["out"])


def _batch_of_one(function: Callable[..., str], *args: Any, **keywords: Any) -> list[str]:
    """Return what the original returns for a batch of one prompt."""
    return [function(*args, **keywords)]


def _tail(prompt: str) -> list[list[str]]:
    return [[part] for part in prompts.extract_json(prompt)]


def _loops(section: Any) -> Iterator[Entry]:
    for row in section:
        ours = partial(_batch_of_one, prompts.prompt_for_loop, row["p"], row["i"])
        yield Entry(f"loop {row['i']} of {row['p']!r}", ours, row["out"])


def _tails(section: Any) -> Iterator[Entry]:
    for row in section:

        def deviates(ours: Any, row: Any = row) -> str | None:
            parts = row["out"] if isinstance(row["out"], list) else []
            odd = any(not isinstance(value, str) for part in parts for value in part)
            return (
                "JSON tails with values that are not text refused"
                if refused(ours) and odd
                else None
            )

        ours = partial(_tail, row["p"])
        yield Entry(f"json {row['p']!r}", ours, row["out"], deviates)


def _scores(section: Any) -> Iterator[Entry]:
    for row in section:
        scores = {key: row.get(key) for key in ("aes", "flow", "camera_motion")}
        ours = partial(_batch_of_one, prompts.append_scores, row["p"], **scores)
        yield Entry(f"score {row['p']!r} {scores}", ours, row["out"])


_PROMPTS = {
    "split": _splits,
    "merge": _merges,
    "loop": _loops,
    "json": _tails,
    "score": _scores,
}


# --- file names -----------------------------------------------------------------------------


def _save_paths(content: Any) -> Iterator[Entry]:
    """Names that are safe must be equal; unsafe ones must be made safe or be refused."""
    for row in content:
        keywords, recorded = dict(row["kw"]), row["out"]
        folder = keywords.pop("save_dir", None) or str(recorded).split("/")[0]

        def deviates(
            ours: Any, recorded: Any = recorded, folder: str = folder, keywords: Any = keywords
        ) -> str | None:
            if not isinstance(recorded, str) or _is_safe(recorded.removeprefix(f"{folder}/")):
                return None
            if refused(ours):
                return "unsafe names refused"
            wanted = _made_safe(recorded, folder, keywords)
            return "unsafe names made safe" if re.fullmatch(wanted, str(ours)) else None

        ours = partial(_save_path, folder, **keywords)
        yield Entry(f"save path {keywords}", ours, recorded, deviates)


def _save_path(folder: str, **keywords: Any) -> str:
    return str(sizes.save_path(folder, **keywords))


def _is_safe(name: str) -> bool:
    """Whether a recorded name is one that any file system takes as it is."""
    odd = any(c in "/\\" or unicodedata.category(c).startswith("C") for c in name)
    return not odd and not name.startswith(".") and 0 < len(name.encode()) <= 200


def _made_safe(recorded: str, folder: str, keywords: Mapping[str, Any]) -> str:
    """Return a pattern: the recorded name with "_" for separators and such, then a digest."""
    name = recorded.removeprefix(f"{folder}/")
    end = f"-{keywords.get('k')}" if keywords.get("num_sample", 1) > 1 else ""
    name = name.removesuffix(end)
    name = "".join(
        "_" if c in "/\\" or unicodedata.category(c).startswith("C") else c for c in name
    )
    name = name.lstrip(".").encode()[:200].decode(errors="ignore")
    return rf"{re.escape(folder)}/{re.escape(name)}-[0-9a-f]{{8}}{re.escape(end)}"


TABLES = {
    "sizes and ratios": Table(sections(set(_ASPECT)), partial(in_sections, _ASPECT)),
    "named lengths": Table(_is_frames, _frames),
    "closest ratios": Table(rows("res", "h", "w", "out"), _closest_ratios),
    "latent sizes": Table(_is_latent_sizes, _latent_sizes),
    "text cleaning": Table(rows("s", "once"), _cleaning),
    "prompts": Table(sections(set(_PROMPTS)), partial(in_sections, _PROMPTS)),
    "file names": Table(rows("kw", "out"), _save_paths),
}
