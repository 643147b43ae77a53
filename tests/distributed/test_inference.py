"""Check that several processes generate the clip of one, and write it once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.distributed.collectives import all_gather
from opensora.distributed.mesh import World, start, stop
from opensora.distributed.sequence import Sequence
from opensora.errors import UsageError
from opensora.pipeline import OpenSoraPipeline
from opensora.sample import generate
from opensora.sample_config import SampleConfig
from opensora.sample_ranks import join

PROMPTS = ["a red circle moving right", "a blue square"]
SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "progress": False, "output_type": "latent"}


def on_every_rank(folder: str) -> dict[str, Any]:
    world = start("cpu", sp_size=2, timeout_s=60)
    pipe = OpenSoraPipeline.from_pretrained("tiny", device="cpu", progress=False)
    alone = pipe(PROMPTS[0], seed=3, num_frames=9, **SETTINGS).frames
    pipe.transformer.sequence = Sequence.of(world)
    shared = pipe(PROMPTS[0], seed=3, num_frames=9, **SETTINGS).frames
    first, second = all_gather(shared, "the clip")
    drawn = pipe(PROMPTS[0], height=32, width=32, num_frames=1, **SETTINGS).seeds
    found: dict[str, Any] = {
        "error": ((shared - alone).abs().max() / alone.abs().max()).item(),
        "ranks agree": torch.equal(first, second),
        "drawn": drawn,
    }
    stop()
    for name, more in (("shared", []), ("each", ["--sp-size", "1"])):
        # A port of its own: the store of the last meeting may still hold that one.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            arguments = ["--device", "cpu", "--num-sampling-steps", "1", "--num-frames", "1", "-q"]
            generate(["--prompt", *PROMPTS, "-o", f"{folder}/{name}", *arguments, *more])
        found[name] = said.getvalue().splitlines()
    return found


@pytest.fixture(scope="module")
def found(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("clips")
    result: list[dict[str, Any]] = ranks(str(Path(__file__)), 2, str(folder))
    return result


def test_two_processes_make_the_clip_of_one(found: Any) -> None:
    for rank in found:
        assert rank["error"] < 1e-4
        assert rank["ranks agree"]


def test_a_seed_that_nobody_gave_is_one_for_all_ranks(found: Any) -> None:
    first, second = found
    assert first["drawn"] == second["drawn"]


def test_every_clip_is_written_once(found: Any) -> None:
    first, second = found
    assert [Path(line.split()[0]).name for line in first["shared"]] == [
        "sample_0000.png",
        "sample_0001.png",
    ]
    assert second["shared"] == []
    assert [len(rank["each"]) for rank in found] == [1, 1]
    for rank in found:
        assert all(Path(line.split()[0]).is_file() for line in rank["shared"] + rank["each"])


def test_groups_cannot_share_one_stream_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora.sample_ranks.start", lambda device: World(size=4))
    with pytest.raises(UsageError, match=r"use --noise per-sample, or --sp-size 4"):
        join(SampleConfig(noise="upstream", sp_size=2))
    with pytest.raises(UsageError, match=r"nproc-per-node 3"):
        join(SampleConfig(sp_size=3))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write("\n" + json.dumps(on_every_rank(sys.argv[1])) + "\n")
