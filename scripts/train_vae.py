"""Train a video VAE.

python scripts/train_vae.py configs/vae/train/stage1.py --data-path meta.csv
python scripts/train_vae.py configs/tiny/train/vae.py
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run from a checkout, installed or not."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from opensora.train_vae import main as train

    return train(program="scripts/train_vae.py")


if __name__ == "__main__":
    sys.exit(main())
