"""Read the prompts and the size of a generating run from its settings."""

from __future__ import annotations

import re
from pathlib import Path

from opensora.config import Sources
from opensora.errors import UsageError
from opensora.sample_config import SampleConfig
from opensora.sizes import RATIOS, describe_size, get_image_size

MAX_PROMPT_BYTES = 64 << 20

_RANKS = {"default": 0, "checkpoint": 0, "environment": 2, "command line": 3}


def read_prompts(config: SampleConfig, sources: Sources) -> list[str]:
    """Return the prompts of the run, from the flag or the file, cut to start and end index.

    Raises:
        UsageError: none, two sources, an unreadable file, or indices beyond its end.
    """
    given, path = config.prompt, config.prompt_path
    if given and path:
        if _rank(sources, "prompt") == _rank(sources, "prompt_path"):
            raise UsageError("--prompt and --prompt-path exclude each other: give one of them")
        if _rank(sources, "prompt") > _rank(sources, "prompt_path"):
            path = None
    if path:
        prompts = _prompt_file(Path(path))
    elif given:
        prompts = list(given)
    else:
        raise UsageError('no prompt: give --prompt "what to show" or --prompt-path FILE')
    for prompt in prompts:
        if not prompt.isprintable() and any("\ud800" <= char <= "\udfff" for char in prompt):
            raise UsageError(f"the prompt {prompt!a} is not valid UTF-8; retype it")
    chosen = prompts[config.start_index : config.end_index]
    if not chosen:
        raise UsageError(
            f"--start-index {config.start_index} and --end-index {config.end_index} leave none of "
            f"the {len(prompts)} prompts"
        )
    return chosen


def _prompt_file(path: Path) -> list[str]:
    """Read one prompt a line; empty lines do not count."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
        lines = data.decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UsageError(f"prompt file {path} does not exist; check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"prompt file {path} is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the prompt file {path}: {why}") from None
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"prompt file {path} is larger than {MAX_PROMPT_BYTES} bytes; split it")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def _rank(sources: Sources, *names: str) -> int:
    """Return the precedence of the strongest source of some settings."""
    return max(_RANKS.get(sources[name], 1) for name in names)


def read_size(config: SampleConfig, sources: Sources, notes: list[str]) -> tuple[int, int] | None:
    """Return (height, width), or None if no setting names a size.

    The strongest source wins: a flag over a key of the file. Of two flags, none.
    """
    named = config.resolution is not None or config.aspect_ratio is not None
    ways = [
        ("--size", _rank(sources, "size"), config.size is not None),
        ("--image-size", _rank(sources, "image_size"), config.image_size is not None),
        ("--resolution", _rank(sources, "resolution", "aspect_ratio"), named),
    ]
    ways = [way for way in ways if way[2]]
    best = [way[0] for way in ways if way[1] == max(way[1] for way in ways)]
    if not best:
        return None
    if len(best) > 1 and best[0] == "--size":
        raise UsageError(f"{' and '.join(best)} exclude each other: give one of them")
    if best[0] == "--size":
        match = re.fullmatch(r"\s*(\d{1,6})\s*[x*×]\s*(\d{1,6})\s*", str(config.size))  # noqa: RUF001
        if match is None:
            raise UsageError(f"--size must be WIDTHxHEIGHT such as 64x64, got {config.size!r}")
        return int(match[2]), int(match[1])
    if best[0] == "--image-size":
        return config.image_size
    if config.resolution is None:
        raise UsageError("--aspect-ratio needs --resolution, such as 240p")
    if config.aspect_ratio is None:
        raise UsageError(
            "--resolution needs --aspect-ratio as height:width, such as 9:16 for landscape; known: "
            + ", ".join(RATIOS)
        )
    height, width = get_image_size(config.resolution, config.aspect_ratio)
    notes.append(
        f"{config.resolution} {config.aspect_ratio} (h:w) -> {describe_size(height, width)}"
    )
    return height, width
