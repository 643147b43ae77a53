"""Run recorded cases of Open-Sora against this library and say which agree.

python scripts/replay_golden.py FOLDER [--json] [--only PATTERN]
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run from a checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from opensora.replay.program import main as replay

    return replay(program="scripts/replay_golden.py")


if __name__ == "__main__":
    sys.exit(main())
