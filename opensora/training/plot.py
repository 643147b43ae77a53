"""Draw the curves of a training run in SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from opensora.files import write_text
from opensora.training.metrics import read_metrics

COLOURS = ("#27c", "#2a7", "#c70", "#a3c", "#c33", "#777", "#0aa", "#840", "#58f", "#d6a")
_AREA = (60, 40, 720, 320)  # left, top, width, height of the axes
_FIGURE = (820, 18)  # width, height of a line of the legend
_MOST_POINTS = 1000  # of a line: more than the pixels it is drawn on

Series = Mapping[str, Sequence[tuple[float, float]]]


def curves(series: Series, title: str, *, log_x: bool = False) -> str:
    """Return an SVG of lines over an axis of steps, values on a logarithmic axis.

    Args:
        series: label -> (step, value), in order of steps; points that are not finite or not
            positive are left out.
        title: heading.
        log_x: steps on a logarithmic axis too, from 1 on.

    Raises:
        ValueError: there is no point to draw.
    """
    content, height = _panel(series, title, 0, log_x)
    return _figure([content], height)


def write_loss_plot(folder: Path, *, log_x: bool = False) -> Path | None:
    """Draw `loss.svg` from a run's metrics.jsonl: loss, loss by timestep band, validation loss.

    Args:
        folder: of the run.
        log_x: steps on a logarithmic axis.

    Returns:
        The file, None if there is nothing to draw yet.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    panels: dict[str, dict[str, Sequence[tuple[float, float]]]] = {
        "training loss": {"loss": _points(lines, "loss"), "smoothed": []},
        "training loss by timestep": _nested(lines, "bands"),
        "validation loss": {
            "all": _points(lines, "validation_loss"),
            **_nested(lines, "validation_buckets"),
        },
        "validation loss by timestep": _nested(lines, "validation_timesteps"),
    }
    panels["training loss"]["smoothed"] = smooth(panels["training loss"]["loss"])
    panels = {
        title: {label: thin(line) for label, line in series.items()}
        for title, series in panels.items()
    }
    drawn, top = [], 0
    for title, series in panels.items():
        if any(series.values()):
            content, height = _panel(series, title, top, log_x)
            drawn.append(content)
            top += height
    if not drawn:
        return None
    path = folder / "loss.svg"
    write_text(path, _figure(drawn, top))
    return path


def smooth(line: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """Return the exponential mean over about `share` of the points, unbiased at the start."""
    keep = 1 - 1 / max(1.0, share * len(line))
    mean, weight, result = 0.0, 0.0, []
    for step, value in line:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append((step, mean / weight))
    return result


def thin(
    line: Sequence[tuple[float, float]], most: int = _MOST_POINTS
) -> Sequence[tuple[float, float]]:
    """Return a line of at most `most` points, each the mean of neighbours."""
    size = -(-len(line) // most)
    if size <= 1:
        return line
    groups = (line[i : i + size] for i in range(0, len(line), size))
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _nested(
    lines: Sequence[Mapping[str, Any]], key: str
) -> dict[str, Sequence[tuple[float, float]]]:
    """Return the series of every name that a mapping under `key` has in some line."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in (line.get(key) or {}).items():
            found.setdefault(name, []).append((line["step"], value))
    # By number where names begin with one: "100-200" follows "0-100".
    return dict(sorted(found.items(), key=lambda item: _leading(item[0])))


def _leading(name: str) -> tuple[float, str]:
    try:
        return float(name.split("-")[0]), name
    except ValueError:
        return math.inf, name


def _figure(panels: Sequence[str], height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_FIGURE[0]}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "".join(panels)
        + "</svg>\n"
    )


def _panel(series: Series, title: str, above: int, log_x: bool) -> tuple[str, int]:
    """Return the elements of one diagram and its height."""
    drawable = {
        label: [(s, v) for s, v in line if math.isfinite(v) and v > 0 and (s >= 1 or not log_x)]
        for label, line in series.items()
    }
    drawable = {label: line for label, line in drawable.items() if line}
    points = [point for line in drawable.values() for point in line]
    if not points:
        raise ValueError("nothing to draw: no series has a point")
    left, top, width, height = _AREA
    top += above
    to_x: Callable[[float], float] = math.log10 if log_x else float
    start = to_x(min(step for step, _ in points)) if log_x else 0.0
    span = (to_x(max(step for step, _ in points)) - start) or 1.0
    low, high = (math.log10(f(value for _, value in points)) for f in (min, max))
    low, high = low - 0.02, max(high + 0.02, low + 0.1)

    def x(step: float) -> float:
        return left + width * (to_x(step) - start) / span

    def y(value: float) -> float:
        return top + height * (high - math.log10(value)) / (high - low)

    parts = [f'<text x="8" y="{above + 20}">{escape(title)}</text>']
    for value in _ticks(low, high):
        parts.append(
            f'<path d="M{left} {y(value):.1f}h{width}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for fifth in range(6):
        place = start + span * fifth / 5
        step, below = 10**place if log_x else place, top + height + 18
        parts.append(f'<text x="{x(step):.1f}" y="{below}" text-anchor="middle">{step:.0f}</text>')
    for index, (label, line) in enumerate(drawable.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        below = top + height + 40 + _FIGURE[1] * index
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            f'<text x="{left}" y="{below}" fill="{colour}">{escape(label)}</text>'
        )
    return "".join(parts), _AREA[1] + height + 50 + _FIGURE[1] * len(drawable)


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield 1, 2 and 5 times the powers of ten between two logarithms."""
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if low <= math.log10(value) <= high:
                yield value
