"""Draw bench results as bars and training runs as curves, in SVG, without a plotting library.

python -m bench.plot --output loss.svg "stage 1=outputs/a/metrics.jsonl" "stage 2=..."
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from opensora.training.plot import curves

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


def read_metrics(path: Path, key: str, after: float = 0.0) -> list[tuple[float, float]]:
    """Read a metrics.jsonl of a training program: (after + step, value), a step's last record.

    Raises:
        ValueError: No record has the key, or a line is no JSON.
    """
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    values = {record["step"]: record[key] for record in records if key in record}
    if not values:
        raise ValueError(f"no record has {key!r}")
    return [(after + step, values[step]) for step in sorted(values)]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the metrics of training runs; stages follow one another, `+LABEL=` starts from zero."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=main.__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FILE")
    parser.add_argument("--key", default="loss", help="the value drawn; loss")
    parser.add_argument("--title", default="", help="heading")
    parser.add_argument("--output", type=Path, required=True, help="the SVG")
    args = parser.parse_args(argv)
    series: dict[str, list[tuple[float, float]]] = {}
    after = 0.0
    for run in args.runs:
        label, _, path = run.partition("=")
        try:
            alone = label.startswith("+")
            line = read_metrics(Path(path), args.key, 0.0 if alone else after)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"cannot read {args.key!r} of {run!r}: {error}; pass LABEL=metrics.jsonl")
        series[label.removeprefix("+")] = line
        if line and not alone:
            after = line[-1][0]
    args.output.write_text(curves(series, args.title or args.key), "utf-8")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
