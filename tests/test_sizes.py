"""Check sizes, lengths and file names against recordings of Open-Sora, and their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.errors import UsageError
from opensora.sizes import (
    FRAME_NAMES,
    NUM_PIXELS,
    RATIOS,
    SIZES,
    closest_ratio,
    describe_ratio,
    describe_size,
    get_image_size,
    get_num_frames,
    save_path,
)

GOLDEN = Path(__file__).parent / "golden"
ASPECT = json.loads((GOLDEN / "aspect.json").read_text())


def cases(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_text())
    return loaded


def test_tables_match_recording() -> None:
    own = ("64p", "80p", "96p")
    as_lists = {n: {k: list(v) for k, v in t.items()} for n, t in SIZES.items() if n not in own}
    assert as_lists == ASPECT["tables"]
    assert ASPECT["ratio_map"] == RATIOS
    assert {n: count for n, count in NUM_PIXELS.items() if n not in own} == ASPECT["num_pixels"]
    assert set(own) < set(SIZES)


@pytest.mark.parametrize("resolution", ASPECT["get_image_size"])
def test_image_size_matches_recording(resolution: str) -> None:
    for ratio, expected in ASPECT["get_image_size"][resolution].items():
        if isinstance(expected, dict):
            with pytest.raises(UsageError, match="nearest"):
                get_image_size(resolution, ratio)
        else:
            assert list(get_image_size(resolution, ratio)) == expected


@pytest.mark.parametrize("name", ASPECT["num_frames"])
def test_num_frames_match_recording(name: str) -> None:
    expected = ASPECT["num_frames"][name]
    if isinstance(expected, dict):
        with pytest.raises(UsageError, match="16x"):
            get_num_frames(name)
    else:
        assert get_num_frames(name) == expected


@pytest.mark.parametrize("case", cases("closest_ratio"), ids=str)
def test_closest_ratio_matches_recording(case: dict[str, Any]) -> None:
    assert closest_ratio(case["res"], case["h"], case["w"]) == case["out"]


@pytest.mark.parametrize("case", cases("save_path"), ids=str)
def test_save_path_matches_recording(case: dict[str, Any]) -> None:
    path = save_path("dir", **case["kw"])
    if "/" in case["kw"].get("prompt", ""):
        # Upstream would write into a folder that does not exist.
        assert path.parent == Path("dir")
        assert path.name.startswith("a b_c-")
    else:
        assert path == Path(case["out"])


@given(st.text(min_size=1, max_size=400))
def test_prompt_as_path_is_one_safe_file_name(prompt: str) -> None:
    path = save_path("out", prompt=prompt, prompt_as_path=True, num_sample=2, k=11)
    assert path.parent == Path("out")
    assert path.name not in ("", ".", "..")
    assert len(f"{path.name}.mp4".encode()) <= 255
    assert path.name.isprintable() or any(char.isspace() for char in path.name)


def test_prompts_that_sanitise_alike_get_different_files() -> None:
    prompts = ["a/b", "a\\b", "a_b", "..a_b", "x" * 300, "x" * 301]
    names = {save_path("d", prompt=prompt, prompt_as_path=True) for prompt in prompts}
    assert len(names) == len(prompts)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a\x00b"])
def test_sample_name_must_be_a_file_name(name: str) -> None:
    with pytest.raises(UsageError, match="plain file name"):
        save_path("d", sample_name=name)


def test_prompt_as_path_needs_a_prompt() -> None:
    with pytest.raises(UsageError, match="needs a prompt"):
        save_path("d", prompt_as_path=True)


def test_ratio_is_height_to_width() -> None:
    assert get_image_size("720p", "9:16") == (720, 1280)
    assert get_image_size("720p", "16:9") == (1280, 720)
    landscape = describe_ratio("720p", "9:16")
    assert "1280x720 (width x height), landscape" in landscape
    assert "16:9 as players name it" in landscape
    assert "portrait" in describe_ratio("720p", "16:9")
    assert describe_size(64, 64) == "64x64 (width x height), square"


def test_table_keys_are_ratios_too() -> None:
    assert get_image_size("256", "0.57") == (192, 336)
    assert "7:4 as players name it" in describe_ratio("256", "0.57")


@pytest.mark.parametrize(
    ("resolution", "ratio", "message"),
    [
        ("720", "9:16", "did you mean 720p"),
        ("8k", "9:16", "144p, .*4k"),
        ("720p", "9:15", "did you mean 5:8"),
        ("720p", "16/9", "did you mean 16:9"),
        ("720p", "1:0", "3:8"),
        ("720p", "wide", "50:27"),
        ("720p", "0.57", "0.56"),
        ("1024", "9:16", "--image-size 768 1344"),
        ("256", "1:1", "--image-size 256 256"),
    ],
)
def test_wrong_names_are_explained(resolution: str, ratio: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_image_size(resolution, ratio)


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "", "4 s", "\u0663", True, "99999999999"])
def test_wrong_lengths_are_explained(value: str) -> None:
    with pytest.raises(UsageError, match="32s"):
        get_num_frames(value)


def test_numbers_are_lengths() -> None:
    assert get_num_frames(17) == 17
    assert get_num_frames(" 51 ") == 51
    assert FRAME_NAMES["4s"] == FRAME_NAMES["2x"] == 102
