"""Check cleaning and the prompt language against recordings of Open-Sora, and their errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.captions import RULES
from opensora.errors import UsageError
from opensora.prompts import (
    append_scores,
    clean_caption,
    clean_prompt,
    extract_json,
    merge_prompt,
    plain_caption,
    prepare_prompt,
    prompt_for_loop,
    split_prompt,
)
from opensora.text_repair import repair, strip_tags

GOLDEN = Path(__file__).parent / "golden"
CLEANING = json.loads((GOLDEN / "text_cleaning.json").read_text(encoding="utf-8"))
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CLEANING, ids=lambda case: ascii(case["s"]))
def test_cleaning_matches_recording(case: dict[str, str]) -> None:
    assert clean_caption(case["s"]) == case["once"]
    assert clean_prompt(case["s"]) == case["twice"]
    assert plain_caption(case["s"]) == case["plain"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see http://foo.edu/a-b and bar.net", "see and"),
        ("see http://foo.xyz/a", "see foo. xyz a"),
        ("a <i class='x'>red</i> ball<!-- no -->", "a red ball"),
        ("10.0.0.12 and #7", "and"),
        ("cat.JPEG dog.WebP", ""),
        ("tom &amp;amp; jerry", "tom ; jerry"),
        ("a\u2010b \u2014 c", "a-b - c"),
        ("snow_white-and-the seven", "snow_white-and-the seven"),
        ("snow_white-and-the-seven_dwarfs", "snow white and the seven dwarfs"),
        ("Click for more, then images", "then images"),
        ("abc123def and ab12 and x1y2z", "and ab12 and"),
        ("30x20 and 4\u00d74.5 tiles", "and tiles"),
        ("it\u00e2\u20ac\u0153s \u00e2\u20ac\u00a6", 'it"s \u2026'),
        ("25 fps, 3.5 seconds", "25 fps, 3.5 seconds"),
    ],
)
def test_cleaning_generalises(text: str, expected: str) -> None:
    assert clean_prompt(text) == expected


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_cleaning_never_fails_and_leaves_no_outer_space(text: str) -> None:
    cleaned = clean_prompt(text)
    assert cleaned == cleaned.strip()
    assert "\n" not in cleaned


@given(st.lists(st.sampled_from(["a", "small", "red", "ball", "rolls", "over"]), min_size=1))
@settings(max_examples=50, deadline=None)
def test_plain_words_survive_cleaning(words: list[str]) -> None:
    text = " ".join(words)
    assert clean_prompt(text) == text


@pytest.mark.parametrize("piece", ["a-", "a.", "1.", "<a ", "a1", '"', "&amp;", "free ", "\u00e2"])
def test_cleaning_time_stays_bounded(piece: str) -> None:
    start = time.process_time()
    clean_prompt(piece * (4000 // len(piece)))
    assert time.process_time() - start < 5


def test_rules_are_named_once() -> None:
    names = [name for name, _ in RULES]
    assert len(set(names)) == len(names)


def test_html_is_read_like_a_browser() -> None:
    assert strip_tags("a < b, 3<5, <b>c</b> &lt;d&gt; &#8217;") == "a < b, 3<5, c <d> \u2019"
    assert strip_tags("x<script>var y;</script><style>z</style>!") == "x!"
    assert strip_tags("<![CDATA[kept]]>") == "kept"


def test_repair_fixes_damage_and_keeps_foreign_words() -> None:
    assert repair("\u00e2\u20ac\u0153x\u00e2\u20ac\u009d") == '"x"'
    assert repair("\ufb01ne \uff21\uff22 \x1b[31mred\x1b[0m\x07") == "fine AB red"
    assert repair("e\u0301") == "\u00e9"
    for text in ("voil\u00e0\u2026", "stra\u00dfe", "\u00c5ngstr\u00f6m", "na\u00efve caf\u00e9"):
        assert repair(text) == text


def results(section: str) -> list[Any]:
    return [pytest.param(case, id=json.dumps(case)[:70]) for case in PROMPTS[section]]


@pytest.mark.parametrize("case", results("split"))
def test_split_matches_recording(case: dict[str, Any]) -> None:
    if isinstance(case["out"], dict):
        with pytest.raises(UsageError, match="loop number"):
            split_prompt(case["p"])
    else:
        assert list(split_prompt(case["p"])) == case["out"]


@pytest.mark.parametrize("case", results("merge"))
def test_merge_matches_recording(case: dict[str, Any]) -> None:
    assert merge_prompt(case["a"], case["b"]) == case["out"]


@pytest.mark.parametrize("case", results("loop"))
def test_loop_text_matches_recording(case: dict[str, Any]) -> None:
    if isinstance(case["out"], dict):
        with pytest.raises(UsageError, match="loop number"):
            prompt_for_loop(case["p"], case["i"])
    else:
        assert [prompt_for_loop(case["p"], case["i"])] == case["out"]


@pytest.mark.parametrize("case", results("json"))
def test_json_tail_matches_recording(case: dict[str, Any]) -> None:
    if isinstance(case["out"], dict):
        with pytest.raises(UsageError):
            extract_json(case["p"])
    else:
        assert [[part] for part in extract_json(case["p"])] == case["out"]


@pytest.mark.parametrize("case", results("score"))
def test_scores_match_recording(case: dict[str, Any]) -> None:
    scores = {key: case[key] for key in ("aes", "flow", "camera_motion")}
    assert [append_scores(case["p"], **scores)] == case["out"]


def test_prompt_is_prepared_in_upstreams_order() -> None:
    prompt = prepare_prompt(
        '|0| A  calm SEA |2| a storm{"reference_path": "sea.png", "mask_strategy": "0"}',
        aes=6.5,
        camera_motion="pan left",
    )
    assert prompt.loops == (0, 2)
    assert prompt.reference_path == "sea.png"
    assert prompt.mask_strategy == "0"
    assert prompt.text == (
        "|0|a calm sea aesthetic score: 6.5. camera motion: pan left."
        "|2|a storm aesthetic score: 6.5. camera motion: pan left."
    )
    assert [prompt.for_loop(i) for i in range(4)] == [prompt.texts[i] for i in (0, 0, 1, 1)]


def test_prompt_without_loops_serves_every_loop() -> None:
    prompt = prepare_prompt("A Cat", clean=False)
    assert prompt.text == prompt.for_loop(0) == prompt.for_loop(7) == "a cat"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "empty"),
        ("  \n", "empty"),
        ('{"mask_strategy": "0"}', "no words"),
        ("|0| a |1|  ", "loop 1 has no words"),
        ("|0| a |0| b", "must rise"),
        ("\u4e16\u754c", "cleaning off"),
        ("a {b", "not JSON"),
        ('a {"x": "1"}', "unknown key 'x'"),
        ('a {"mask_strategy": 0}', "must be a string"),
    ],
)
def test_unusable_prompts_are_explained(prompt: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_prompt(prompt, aes=6.5)


def test_json_tail_is_data_never_code() -> None:
    with pytest.raises(UsageError):
        extract_json("a {__import__('os').getcwd(): '0'}")
    assert extract_json('a {"reference_path": "x{1}.png"}') == ("a ", "x{1}.png", "")
