"""Generate clips or images from text; the same program as `opensora generate`.

python scripts/inference.py configs/opensora-v1-2/inference/sample.py --num-frames 4s \
    --resolution 720p --aspect-ratio 9:16 --prompt "waves at sunset"
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run from a checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    try:
        from opensora.sample import main as generate
    except KeyboardInterrupt:
        print("interrupted; nothing partial was left", file=sys.stderr)
        return 130
    return generate(program="scripts/inference.py")


if __name__ == "__main__":
    sys.exit(main())
