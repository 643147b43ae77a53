"""Encode a table's clips and captions once, for training.

python scripts/misc/extract_feat.py CONFIG --data-path meta.csv --outputs features
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run from a checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from opensora.extract_features import main as extract

    return extract(program="scripts/misc/extract_feat.py")


if __name__ == "__main__":
    sys.exit(main())
