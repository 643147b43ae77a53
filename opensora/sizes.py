"""Name sizes, aspect ratios and lengths the way Open-Sora does, and say what the names mean.

A ratio is **height:width**, as upstream: "9:16" is the landscape 1280x720, "16:9" the portrait
720x1280. Sizes in code are (height, width); sizes in messages are width x height and say so.

The tables are upstream's but for 64p, 80p and 96p, the embedded model's. Every named resolution
keeps about the same pixel count over its ratios. Ratio keys are height / width to two decimals, but
for a few entries that upstream names otherwise: "50:27" stands for 2.08, which is 25:12.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from math import gcd
from pathlib import Path

from opensora.errors import UsageError

#: height:width -> key of the tables.
RATIOS = {
    "3:8": "0.38",
    "9:21": "0.43",
    "12:25": "0.48",
    "1:2": "0.50",
    "9:17": "0.53",
    "27:50": "0.54",
    "9:16": "0.56",
    "5:8": "0.62",
    "2:3": "0.67",
    "3:4": "0.75",
    "1:1": "1.00",
    "4:3": "1.33",
    "3:2": "1.50",
    "16:9": "1.78",
    "17:9": "1.89",
    "2:1": "2.00",
    "50:27": "2.08",
}
#: height x width for each ratio in the order of RATIOS.
_VIDEO = {
    "144p": "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 "
    "192x192 221x165 235x156 256x144 263x139 271x135 277x132",
    "240p": "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 "
    "320x320 370x278 392x262 426x240 440x232 452x226 462x222",
    "360p": "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 "
    "480x480 554x416 588x392 640x360 660x350 678x340 692x332",
    "480p": "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 "
    "640x640 740x555 784x522 854x480 880x466 906x454 924x444",
    "720p": "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 "
    "832x1110 960x960 1108x832 1176x784 1280x720 1320x698 1358x680 1386x666",
    "1080p": "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 "
    "1176x1764 1248x1664 1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998",
    "2k": "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 "
    "1568x2352 1662x2216 1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330",
    "4k": "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 "
    "2352x3528 2494x3326 2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994",
}
#: PixArt's sizes: height x width in units of side / 16 (side / 45 for 2880).
_SQUARE = (
    "8x32 8x31 8x30 8x29 9x28 9x27 9x26 10x25 10x24 11x23 11x22 11x21 12x21 12x20 13x19 13x18 "
    "14x18 14x17 15x17 15x16 16x16 16x15 17x15 17x14 18x14 18x13 19x13 20x12 21x12 22x11 23x11 "
    "24x10 25x10 26x9 27x9 28x9 29x8 30x8 31x8 32x8"
)
_SQUARE_2880 = (
    "22x90 22x87 22x84 22x81 25x78 25x75 25x73 28x70 28x67 30x64 30x61 30x59 33x60 33x56 36x53 "
    "36x50 39x50 39x47 42x47 42x45 45x45 45x42 47x42 47x39 50x39 50x36 53x36 56x33 60x33 61x30 "
    "64x30 67x28 70x28 73x25 75x25 78x25 81x22 84x22 87x22 90x22"
)
#: Of the embedded model, ours: what its VAE and its patches divide.
_EMBEDDED = {
    "64p": {"0.60": (48, 80), "1.00": (64, 64), "1.67": (80, 48)},
    "80p": {"0.67": (64, 96), "1.00": (80, 80), "1.50": (96, 64)},
    "96p": {"0.62": (80, 128), "1.00": (96, 96), "1.60": (128, 80)},
}
_KEYS_2880 = {(22, 90): "0.25", (22, 87): "0.26", (22, 84): "0.27", (22, 81): "0.28"} | {
    (90, 22): "4.0"
}

_FRAMES_PER_UNIT = 51
#: Named lengths in frames: 1x is 51 frames; "2s" is 51 too, at 24 frames per second.
FRAME_NAMES = {f"{n}x": _FRAMES_PER_UNIT * n for n in (1, 2, 4, 8, 16)} | {
    f"{2 * n}s": _FRAMES_PER_UNIT * n for n in (1, 2, 4, 8, 16)
}


def _pairs(text: str) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in (item.split("x") for item in text.split())]


def _tables() -> dict[str, dict[str, tuple[int, int]]]:
    """Build resolution -> ratio key -> (height, width), by pixel count."""
    tables = {
        name: dict(zip(RATIOS.values(), _pairs(sizes), strict=True))
        for name, sizes in _VIDEO.items()
    }
    for side in (256, 512, 1024, 2048):
        tables[str(side)] = {
            str(round(h / w, 2)): (h * side // 16, w * side // 16) for h, w in _pairs(_SQUARE)
        }
    tables["2880"] = {
        _KEYS_2880.get((h, w), str(round(h / w, 2))): (h * 64, w * 64)
        for h, w in _pairs(_SQUARE_2880)
    }
    tables |= _EMBEDDED
    return dict(sorted(tables.items(), key=lambda item: _pixels(item[1])))


def _pixels(table: dict[str, tuple[int, int]]) -> int:
    height, width = next(table[key] for key in ("0.56", "1.0", "1.00") if key in table)
    return height * width


#: resolution -> ratio key -> (height, width); resolutions by pixel count.
SIZES = _tables()
#: resolution -> nominal pixel count (of 9:16, or of the square).
NUM_PIXELS = {name: _pixels(table) for name, table in SIZES.items()}


def get_image_size(resolution: str, ratio: str) -> tuple[int, int]:
    """Return (height, width) in pixels of a named resolution and ratio.

    Args:
        resolution: a key of SIZES, such as "720p".
        ratio: height:width, such as "9:16", or a key of the resolution's table, such as "0.57".

    Raises:
        UsageError: unknown names (says which are valid), or a ratio that this resolution lacks
            (says which of its sizes is nearest).
    """
    table = _table(resolution)
    ratio = str(ratio).strip()
    if ratio in table:
        return table[ratio]
    if ratio not in RATIOS:
        if re.fullmatch(r"\d+(\.\d+)?", ratio):
            raise UsageError(
                f"aspect ratio {ratio} is not in the table of {resolution}; use one of "
                f"{', '.join(table)}"
            )
        raise _unknown("aspect ratio (height:width)", ratio, RATIOS, _nearest_ratio(ratio))
    if RATIOS[ratio] in table:
        return table[RATIOS[ratio]]
    # PixArt's tables write 0.50 as 0.5; upstream finds only keys that are spelled alike.
    height, width = (int(side) for side in ratio.split(":"))
    key = closest_ratio(resolution, height, width)
    near_height, near_width = table[key]
    raise UsageError(
        f"resolution {resolution} has no aspect ratio {ratio}; its nearest is {key}, which is "
        f"{describe_size(near_height, near_width)}: use --image-size {near_height} {near_width}, "
        "or a resolution such as 240p, 480p, 720p"
    )


def closest_ratio(resolution: str, height: float, width: float) -> str:
    """Return the ratio key of a resolution that is nearest to height / width."""
    target = height / width
    return min(_table(resolution), key=lambda key: abs(float(key) - target))


def get_num_frames(value: str | int) -> int:
    """Return a number of frames from 51, "51", "2s" (at 24 fps) or "1x".

    Raises:
        UsageError: not a positive whole number and not a key of FRAME_NAMES.
    """
    text = str(value).strip()
    if text in FRAME_NAMES:
        return FRAME_NAMES[text]
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise _unknown("number of frames (a whole number, or a length)", text, FRAME_NAMES)
    return int(text)


def describe_size(height: int, width: int) -> str:
    """Say a size as people read it: "1280x720 (width x height), landscape"."""
    shape = "square" if height == width else "landscape" if width > height else "portrait"
    return f"{width}x{height} (width x height), {shape}"


def describe_ratio(resolution: str, ratio: str) -> str:
    """Say what a resolution and ratio mean, in one line."""
    height, width = get_image_size(resolution, ratio)
    divisor = gcd(height, width)
    exact = f"{width // divisor}:{height // divisor}"
    text = f"{resolution}, aspect ratio {ratio} (height:width) = {describe_size(height, width)}"
    if ratio in RATIOS:
        high, wide = ratio.split(":")
        exact = f"{wide}:{high}" if ratio != "50:27" else "12:25"
    return f"{text}, {exact} as players name it"


def save_path(
    save_dir: str | Path,
    *,
    sample_name: str | None = None,
    sample_idx: int = 0,
    prompt: str | None = None,
    prompt_as_path: bool = False,
    num_sample: int = 1,
    k: int = 0,
) -> Path:
    """Name an output file, without its suffix.

        {save_dir}/{sample_name or "sample"}_{sample_idx:04d}     or, with prompt_as_path,
        {save_dir}/{sample_name}{prompt},     and -{k} if num_sample > 1

    A prompt becomes one file name whatever it contains: separators and control characters turn
    into "_", leading dots go, a long name is cut. A name that was changed ends in a digest of the
    prompt, so that two prompts never share a file.

    Raises:
        UsageError: sample_name is not a plain file name, or prompt_as_path without a prompt.
    """
    if sample_name is not None and (_safe_name(sample_name) != sample_name or not sample_name):
        raise UsageError(
            f"sample name {sample_name!r} must be a plain file name, without / or a leading dot; "
            "choose the folder with --save-dir"
        )
    if prompt_as_path:
        if not prompt:
            raise UsageError("prompt_as_path needs a prompt")
        full = (sample_name or "") + prompt
        name = _safe_name(full)
        if name != full:
            name = f"{name}-{hashlib.sha256(full.encode('utf-8', 'replace')).hexdigest()[:8]}"
    else:
        name = f"{sample_name or 'sample'}_{sample_idx:04d}"
    return Path(save_dir) / (f"{name}-{k}" if num_sample > 1 else name)


def _safe_name(text: str) -> str:
    """Turn any text into one file name of at most 200 bytes (255 is the limit of file systems)."""
    safe = "".join(
        "_" if char in "/\\" or unicodedata.category(char).startswith("C") else char
        for char in text
    )
    return safe.lstrip(".").encode()[:200].decode(errors="ignore")


def _table(resolution: str) -> dict[str, tuple[int, int]]:
    name = str(resolution).strip()
    if name not in SIZES:
        raise _unknown("resolution", name, SIZES)
    return SIZES[name]


def _nearest_ratio(ratio: str) -> str | None:
    """Return the named ratio nearest in value to "h:w" or "h/w"; None for other text."""
    match = re.fullmatch(r"(\d{1,5})\s*[:/xX]\s*(\d{1,5})", ratio)
    if match is None or int(match[2]) == 0:
        return None
    target = int(match[1]) / int(match[2])
    return min(RATIOS, key=lambda name: abs(float(RATIOS[name]) - target))


def _unknown(
    kind: str, value: str, valid: Iterable[str], suggestion: str | None = None
) -> UsageError:
    """Build the error for an unknown name, with the nearest valid one if there is any."""
    names = list(valid)
    close = [suggestion] if suggestion else difflib.get_close_matches(value, names, 1, 0.5)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return UsageError(f"unknown {kind} {value!r}{hint} Use one of {', '.join(names)}")
