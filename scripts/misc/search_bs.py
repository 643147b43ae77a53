"""Search the batch sizes of all buckets.

python scripts/misc/search_bs.py configs/opensora-v1-2/misc/bs.py
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run from a checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    from opensora.search_batch_size import main as search

    return search(program="scripts/misc/search_bs.py")


if __name__ == "__main__":
    sys.exit(main())
