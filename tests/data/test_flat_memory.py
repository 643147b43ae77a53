"""Read clips over and over: memory must stay where it was after the first ones.

A hundred thousand: `python tests/data/test_flat_memory.py 100000`, seven minutes on one core.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATM = Path("/proc/self/statm")
#: Rows that are read before memory counts: decoders, threads and allocators have what they need.
WARM = 400
PARTS = 10


def resident() -> float:
    """Return the memory that this process holds, MiB."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_table(folder: Path) -> Path:
    """Write a table of clips of several lengths, a picture, and files that cannot be read."""
    from PIL import Image

    from tests.data.conftest import write_video

    paths = [write_video(folder / f"{n}.mp4", n, size=(64, 64)) for n in (20, 30, 40)]
    Image.new("RGB", (80, 70), (9, 99, 200)).save(folder / "picture.png")
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (folder / "cut.mp4").write_bytes(paths[2].read_bytes()[:3000])
    frames = {"picture.png": 1, "noise.mp4": 30, "cut.mp4": 40}
    with (folder / "meta.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "text", "num_frames", "height", "width", "fps"])
        for path in [*paths * 3, *(folder / name for name in frames)] * 4:
            count = frames.get(path.name) or int(path.stem)
            rows.writerow([path, "noise", count, 64, 64, 25])
    return folder / "meta.csv"


def read(folder: Path, fetches: int) -> dict[str, Any]:
    """Read that many rows through a loader; returns the most memory held in each tenth of them."""
    from opensora.data.dataset import build_dataset
    from opensora.data.loader import Loader
    from opensora.data.plan import make_plan
    from opensora.data.quarantine import Quarantine
    from opensora.progress import Progress

    dataset = build_dataset({"data_path": str(write_table(folder))})
    plan = make_plan(dataset, bucket_config={"64p": {1: (1.0, 2), 17: (1.0, 4)}})
    quarantine = Quarantine(folder)
    loader = Loader(dataset, plan.sampler(dataset.entries()), quarantine=quarantine)
    taken, held, batches = -WARM, [0.0] * PARTS, loader.batches()
    with Progress() as progress:
        report = progress.stage("reading", "row")
        while taken < fetches:
            batch = next(batches)
            taken += len(batch) + len(batch.failed)
            if 0 <= taken < fetches:
                part = taken * PARTS // fetches
                held[part] = max(held[part], resident())
            report(max(0, taken), fetches)
    return {"mib": [round(most, 1) for most in held], "bad": len(quarantine)}


@pytest.mark.skipif(not STATM.exists(), reason="reads memory from /proc")
def test_memory_stays_flat_however_many_clips_are_read(tmp_path: Path) -> None:
    command = [sys.executable, __file__, "900", str(tmp_path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environ, timeout=120, check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout)
    assert max(found["mib"][-3:]) < max(found["mib"][:3]) + 8
    assert found["bad"] == 8  # each of the two files that cannot be read, under four names


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as own:
        place = Path(sys.argv[2] if len(sys.argv) > 2 else own)
        print(json.dumps(read(place, int(sys.argv[1]))))
