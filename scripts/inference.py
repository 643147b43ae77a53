"""Generate clips or images from text; the same program as `opensora generate`.

python scripts/inference.py configs/opensora-v1-2/inference/sample.py --num-frames 4s \
    --resolution 720p --aspect-ratio 9:16 --prompt "waves at sunset"
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def leave(*_: object) -> None:
    """End at once on Ctrl-C: while torch is loading it may be swallowed, and nothing is open."""
    os.write(2, b"interrupted; nothing partial was left\n")
    os._exit(130)


def main() -> int:
    """Run from a checkout, installed or not."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from opensora.sample import main as generate

    return generate(program="scripts/inference.py")


if __name__ == "__main__":
    sys.exit(main())
