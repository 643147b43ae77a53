"""Train a text-to-video transformer.

python scripts/train.py configs/tiny/train/stdit.py
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run from a checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from opensora.train import main as train

    return train(program="scripts/train.py")


if __name__ == "__main__":
    sys.exit(main())
