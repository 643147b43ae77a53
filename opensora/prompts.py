"""Read Open-Sora's prompt language: scores, one text per loop, and a JSON tail.

    |0| a calm sea |2| a storm {"reference_path": "sea.png", "mask_strategy": "0"}

`|i| text` gives the text from loop i on (a prompt without it serves every loop). The JSON tail
names references and masks. Scores are sentences that the model was trained with, such as
" aesthetic score: 6.5.". `prepare_prompt` does everything in upstream's order: tail, split, scores,
cleaning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from opensora.captions import clean_caption, clean_prompt, plain_caption
from opensora.errors import UsageError

__all__ = [
    "PreparedPrompt",
    "append_scores",
    "clean_caption",
    "clean_prompt",
    "extract_json",
    "merge_prompt",
    "plain_caption",
    "prepare_prompt",
    "prompt_for_loop",
    "split_prompt",
]

TAIL_KEYS = ("reference_path", "mask_strategy")


def extract_json(prompt: str) -> tuple[str, str, str]:
    """Cut the JSON tail off a prompt.

    Args:
        prompt: text, with `{"reference_path": ..., "mask_strategy": ...}` at its end or without.

    Returns:
        The text before the tail, the reference path and the mask strategy ("" where not given).

    Raises:
        UsageError: text after "{" is not a JSON object of these keys with string values.
    """
    text, brace, rest = prompt.partition("{")
    if not brace:
        return prompt, "", ""
    try:
        tail = json.loads(brace + rest)
    except ValueError as error:
        raise UsageError(
            f"prompt {_short(prompt)}: what follows the brace is not JSON ({error}); end the "
            'prompt with one object such as {"reference_path": "a.png", "mask_strategy": "0"}, or '
            "remove the brace"
        ) from error
    for key, value in tail.items():
        if key not in TAIL_KEYS:
            raise UsageError(
                f"prompt {_short(prompt)}: unknown key {key!r} in its JSON tail; "
                f"use {' and '.join(TAIL_KEYS)}"
            )
        if not isinstance(value, str):
            raise UsageError(
                f'prompt {_short(prompt)}: {key} must be a string in quotes, such as "0"; '
                f"got {json.dumps(value)}"
            )
    return text, tail.get("reference_path", ""), tail.get("mask_strategy", "")


def split_prompt(prompt: str) -> tuple[list[str], list[int] | None]:
    """Split `|0| a |2| b` into (["a", "b"], [0, 2]); any other prompt into ([prompt], None).

    Raises:
        UsageError: it starts with |0| and a later |...| is not a whole number.
    """
    segments = _segments(prompt)
    if segments is None:
        return [prompt], None
    return [text.strip() for _, text in segments], [loop for loop, _ in segments]


def merge_prompt(texts: Sequence[str], loops: Sequence[int] | None) -> str:
    """Undo `split_prompt`: "|0|a|2|b"; without loops, the first text."""
    if loops is None:
        return texts[0]
    return "".join(f"|{loop}|{text}" for loop, text in zip(loops, texts, strict=True))


def prompt_for_loop(prompt: str, loop: int) -> str:
    """Return the text of a loop: the last segment whose number is not above it, spaces kept."""
    segments = _segments(prompt)
    if segments is None:
        return prompt
    current = segments[0][1]
    for start, text in segments:
        if start > loop:
            break
        current = text
    return current


def append_scores(
    text: str,
    *,
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """Append the score sentences that the text does not have yet.

    Args:
        text: prompt.
        aes: aesthetic score, about 4 to 7; one decimal is written.
        flow: motion score, about 0 to 30; one decimal is written.
        camera_motion: words such as "pan left"; "none" is written too.
    """
    scores = (
        ("aesthetic score:", None if aes is None else f"{aes:.1f}"),
        ("motion score:", None if flow is None else f"{flow:.1f}"),
        ("camera motion:", camera_motion),
    )
    for marker, value in scores:
        if value is not None and marker not in text:
            text = f"{text} {marker} {value}."
    return text


@dataclass(frozen=True)
class PreparedPrompt:
    """Hold a prompt as the text encoder gets it.

    Attributes:
        original: as typed.
        texts: one per segment, cleaned.
        loops: first loop of each segment; None if one text serves all.
        reference_path: ";"-separated images and videos, or "".
        mask_strategy: upstream's mask string, or "".
    """

    original: str
    texts: tuple[str, ...]
    loops: tuple[int, ...] | None
    reference_path: str = ""
    mask_strategy: str = ""

    @property
    def text(self) -> str:
        """The segments merged into one line."""
        return merge_prompt(self.texts, self.loops)

    def for_loop(self, loop: int) -> str:
        """Return the text of a loop, counted from 0."""
        starts = self.loops or (0,)
        return self.texts[max(i for i, start in enumerate(starts) if start <= loop)]


def prepare_prompt(
    prompt: str | None,
    *,
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
    clean: bool = True,
) -> PreparedPrompt:
    """Turn what a user typed into what is encoded.

    Args:
        prompt: in the prompt language of this module.
        aes: aesthetic score to append to every segment; None appends none.
        flow: motion score.
        camera_motion: words for the camera.
        clean: clean twice as upstream; False only lowers and strips.

    Raises:
        UsageError: no prompt, an empty segment, loops that do not rise, or a wrong JSON tail.
    """
    if prompt is None or not prompt.strip():
        raise UsageError("the prompt is empty; describe the clip, e.g. 'a red ball rolling left'")
    text, reference_path, mask_strategy = extract_json(prompt)
    texts, loops = split_prompt(text)
    if loops is not None and any(b <= a for a, b in pairwise(loops)):
        raise UsageError(
            f"prompt {_short(prompt)}: loop numbers must rise, got "
            f"{', '.join(str(loop) for loop in loops)}"
        )
    cleaned = []
    for index, segment in enumerate(texts):
        where = f"prompt {_short(prompt)}" if loops is None else f"text of loop {loops[index]}"
        if not segment.strip():
            raise UsageError(f"{where} has no words; describe the clip")
        words = clean_prompt(segment) if clean else plain_caption(segment)
        if not words:
            raise UsageError(
                f"{where}: cleaning left nothing of {_short(segment)} (it removes links, file "
                "names and Chinese characters); use English words, or turn cleaning off"
            )
        scored = append_scores(segment, aes=aes, flow=flow, camera_motion=camera_motion)
        cleaned.append(clean_prompt(scored) if clean else plain_caption(scored))
    return PreparedPrompt(
        original=prompt,
        texts=tuple(cleaned),
        loops=None if loops is None else tuple(loops),
        reference_path=reference_path,
        mask_strategy=mask_strategy,
    )


def _segments(prompt: str) -> list[tuple[int, str]] | None:
    """Return (loop, text) of each segment, text as written; None without a leading |0|."""
    if not prompt.startswith("|0|"):
        return None
    parts = prompt.split("|")[1:]
    if len(parts) % 2:
        parts.append("")
    segments = []
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        try:
            segments.append((int(number), text))
        except ValueError as error:
            raise UsageError(
                f"prompt {_short(prompt)}: |{number}| must hold a loop number; write "
                "|0| first text |1| second text, and no other vertical bars"
            ) from error
    return segments


def _short(text: str) -> str:
    """Quote a prompt, cut to one line of a message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
