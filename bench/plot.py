"""Draw bench results as an SVG of horizontal bars, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_ROW, _LEFT, _WIDTH = 22, 380, 480


def bars(entries: Sequence[dict[str, Any]], title: str) -> str:
    """Return an SVG: one bar a case, its share of same-run copy or product speed; 1.0 is the line.

    Args:
        entries: Results of `bench.gpu`; those without a share are left out.
        title: Heading.
    """
    rows = [entry for entry in entries if entry.get("share") is not None]
    height = _ROW * (len(rows) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 80}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16">{escape(title)}: '
        "share of a same-run copy or 8192^3 product</text>",
    ]
    for index, entry in enumerate(rows):
        y = _ROW * (index + 1) + 6
        share = max(0.0, min(1.2, entry["share"]))
        colour = "#2a7" if entry["correct"] else "#c33"
        name = escape(f"{entry['case']} {entry['dtype']}")
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{name}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{share / 1.2 * _WIDTH:.0f}" height="{_ROW - 6}" '
            f'fill="{colour}"/><text x="{_LEFT + share / 1.2 * _WIDTH + 6:.0f}" y="{y + 12}">'
            f"{entry['share']:.2f}</text>"
        )
    x = _LEFT + _WIDTH / 1.2
    parts.append(f'<path d="M{x:.0f} {_ROW}V{height}" stroke="#999"/></svg>')
    return "".join(parts) + "\n"
