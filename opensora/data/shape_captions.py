"""Word scenes of moving shapes, each in one of some hundred thousand ways."""

from __future__ import annotations

import random
from collections.abc import Sequence

from opensora.data.shapes import Scene

_COLOUR_WORDS = {"purple": ("purple", "purple", "violet"), "cyan": ("cyan", "cyan", "turquoise")}
_SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc", "ball"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star", "star", "star", "five-pointed star"),
}
_SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big"),
}
_SPEED_WORDS = {"slow": ("slowly",), "normal": ("",), "fast": ("quickly", "fast")}
_AXIS_WORDS = {
    "right": ("right", "to the right", "rightwards", "from left to right", "towards the right"),
    "left": ("left", "to the left", "leftwards", "from right to left", "towards the left"),
    "up": ("up", "upwards", "upward", "to the top", "from bottom to top"),
    "down": ("down", "downwards", "downward", "to the bottom", "from top to bottom"),
}
_STILL_WORDS = (
    "standing still",
    "staying still",
    "not moving",
    "that does not move",
    "that stays in place",
    "at rest",
    "holding still",
    "stationary",
)
_GOING = (
    "moving",
    "moving",
    "moving",
    "going",
    "sliding",
    "gliding",
    "drifting",
    "travelling",
    "floating",
    "flying",
)
_GOES = (
    "moves",
    "moves",
    "moves",
    "goes",
    "slides",
    "glides",
    "drifts",
    "travels",
    "floats",
    "flies",
)
_OPENINGS = (
    ("a", 12),
    ("", 3),
    ("the", 1),
    ("one", 1),
    ("a video of a", 1),
    ("a clip of a", 1),
    ("there is a", 1),
    ("an animation of a", 1),
    ("this video shows a", 1),
)


def _direction(motion: str, rng: random.Random) -> str:
    if "-" not in motion:
        return rng.choice(_AXIS_WORDS[motion])
    vertical, horizontal = motion.split("-")
    upper, corner = ("upper", "top") if vertical == "up" else ("lower", "bottom")
    return rng.choice(
        (
            f"{vertical} and to the {horizontal}",
            f"{vertical} and {horizontal}",
            f"diagonally {vertical} and {horizontal}",
            f"to the {upper} {horizontal}",
            f"towards the {corner} {horizontal}",
            f"to the {corner} {horizontal} corner",
            f"{vertical}-{horizontal}",
            f"{vertical} {horizontal}",
        )
    )


def describe(
    scene: Scene,
    rng: random.Random,
    size_share: float = 0.4,
    *,
    finite: bool = True,
    openings: Sequence[tuple[str, int]] = _OPENINGS,
) -> tuple[str, list[str]]:
    """Word shape, colour and motion of a scene, its size and speed in a part of the texts.

    Args:
        scene: What to word.
        rng: Chooses the words.
        size_share: Probability that the text states the size.
        finite: Allow "moves" beside "moving".
        openings: (words, weight) that the text may begin with.

    Returns:
        (text, names of the attributes that it states).
    """
    names = ["shape", "colour", "motion"]
    colour = rng.choice(_COLOUR_WORDS.get(scene.colour, (scene.colour,)))
    subject = f"{colour} {rng.choice(_SHAPE_WORDS[scene.shape])}"
    if rng.random() < size_share:
        names.append("size")
        subject = f"{rng.choice(_SIZE_WORDS[scene.size])} {subject}"
    words, weights = zip(*openings, strict=True)
    opening = rng.choices(words, weights)[0]
    finite = finite and not opening.startswith(("there", "this"))
    text = f"{opening} {subject}".strip()
    if opening.endswith("a") and subject[0] in "aeiou":
        text = f"{opening}n {subject}"
    if scene.motion == "still":
        rest = rng.choice(_STILL_WORDS)
        if rng.random() < 0.3 and finite:
            rest = rng.choice(("stands still", "stays still", "does not move", "stays in place"))
        return f"{text} {rest}", names
    verb = rng.choice(_GOES if rng.random() < 0.4 and finite else _GOING)
    move = f"{verb} {_direction(scene.motion, rng)}"
    adverb = rng.choice(_SPEED_WORDS[scene.speed]) if rng.random() < 0.4 else ""
    if adverb:
        names.append("speed")
        move = f"{move} {adverb}" if rng.random() < 0.7 else f"{adverb} {move}"
    return f"{text} {move}", names


def place(text: str, background: str, rng: random.Random) -> str:
    """Add the background to a text."""
    word = "grey" if background == "gray" and rng.random() < 0.4 else background
    words = f"{rng.choice(('on', 'on', 'against', 'over'))} a {word} background"
    return f"{words}, {text}" if rng.random() < 0.2 else f"{text} {words}"


def caption(
    scene: Scene, rng: random.Random, size_share: float = 0.4
) -> tuple[str, tuple[str, ...]]:
    """Word a scene; `size_share` is the probability that the text states the size.

    Returns:
        (text, names): `names` are the attributes that the text states, out of "shape", "colour",
        "motion", "size", "background" and "speed".
    """
    text, names = describe(scene, rng, size_share)
    if rng.random() < 0.5:
        names.append("background")
        text = place(text, scene.background, rng)
    if rng.random() < 0.2:
        text += "."
    return text, tuple(names)
