"""Reconstruct clips with a video VAE and measure the loss.

python scripts/inference_vae.py configs/vae/inference/video.py --data-path meta.csv
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run from a checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from opensora.inference_vae import main as reconstruct

    return reconstruct(program="scripts/inference_vae.py")


if __name__ == "__main__":
    sys.exit(main())
