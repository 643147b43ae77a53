"""Check how processes find and group each other, and what they say when one is missing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opensora.distributed import collectives
from opensora.distributed.mesh import World, divide, start, start_group_of_one, stop
from opensora.distributed.sequence import Sequence
from opensora.errors import CollectiveError, UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_on_its_own_opens_nothing_and_answers_itself() -> None:
    world = start("cpu")
    assert (world.rank, world.size, world.dp_rank, world.dp_size) == (0, 1, 0, 1)
    assert world.is_main
    assert world.mesh is None
    assert Sequence.of(world) is None
    assert not dist.is_initialized()
    x = torch.ones(3)
    assert collectives.all_reduce(x, "a sum") is x
    assert collectives.all_gather(x, "parts").shape == (1, 3)
    assert collectives.broadcast_object({"a": 1}, "settings") == {"a": 1}
    assert collectives.all_gather_object(2, "numbers") == [2]
    collectives.barrier("the end")
    stop()


def test_a_group_of_one_needs_no_network() -> None:
    world = start_group_of_one(start("cpu"))
    assert world.mesh is not None
    assert world.mesh.mesh_dim_names == ("replicate", "shard", "sequence")
    assert collectives.all_reduce(torch.ones(2), "a sum", "mean").tolist() == [1, 1]
    stop()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("size", "sides", "message"),
    [
        (1, {"sp_size": 2}, r"sp_size 2 x replicate 1 does not divide the 1 processes.*"
         r"use an sp_size of 1, or start a multiple of 2 .*--nproc-per-node 2"),
        (6, {"sp_size": 4}, r"sp_size of 1 or 2 or 3 or 6"),
        (4, {"replicate": 3}, r"replicate 3 does not divide the 4 processes"),
        (4, {"sp_size": 0}, r"must be 1 or more"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide_say_which_do(
    size: int, sides: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        divide(World(size=size), **sides)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT not.*torchrun"):
        start("cpu")
    for name in VARIABLES[2:]:
        monkeypatch.setenv(name, "0")
    with pytest.raises(UsageError, match=r"WORLD_SIZE='two' is not a number"):
        start("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(UsageError, match="torch sees 0 CUDA devices"):
        start("cuda")


def on_every_rank() -> dict[str, Any]:
    """Use every call, then leave one rank out of three of them."""
    world = start("cpu", sp_size=1, timeout_s=2)
    rank = world.rank
    found: dict[str, Any] = {
        "sum": collectives.all_reduce(torch.tensor([rank + 1.0]), "a sum").item(),
        "mean": collectives.all_reduce(torch.tensor([rank + 1.0]), "a mean", "mean").item(),
        "most": collectives.all_reduce(torch.tensor([rank]), "a maximum", "max").item(),
        "parts": collectives.all_gather(torch.tensor([[rank, 7]]), "parts").tolist(),
        "scalars": collectives.all_gather(torch.tensor(rank), "parts").tolist(),
        "objects": collectives.all_gather_object({"rank": rank}, "facts"),
        "told": collectives.broadcast_object(f"rank {rank}", "a name", source=1),
        "places": [world.dp_rank, world.dp_size, world.sp_rank],
    }
    collectives.barrier("the first checkpoint")
    begun = time.monotonic()
    if rank == 1:
        time.sleep(6)
    try:
        if rank == 0:
            collectives.all_reduce(torch.zeros(1), "the loss")
    except CollectiveError as error:
        found["said"] = str(error)
    found["waited"] = time.monotonic() - begun
    try:
        with collectives.watched("step 7"):
            dist.all_reduce(torch.zeros(1))  # somebody else's: the pair broke above
    except CollectiveError as error:
        found["watched"] = str(error)
    return found


def test_a_rank_that_never_arrives_is_named_with_the_call(ranks: Any) -> None:
    first, second = ranks(str(Path(__file__)), 2)
    for rank in (first, second):
        assert rank["sum"] == 3
        assert rank["mean"] == 1.5
        assert rank["most"] == 1
        assert rank["parts"] == [[[0, 7]], [[1, 7]]]
        assert rank["scalars"] == [0, 1]
        assert rank["objects"] == [{"rank": 0}, {"rank": 1}]
        assert rank["told"] == "rank 1"
    assert first["places"] == [0, 2, 0]
    said = first["said"]
    assert "all_reduce of the loss failed on rank 0" in said
    assert "group: all processes, ranks 0, 1" in said
    assert "Not heard of: rank 1;" in said
    assert "timeout_s" in said
    assert 2 <= first["waited"] < 6
    assert "a collective of step 7 failed" in first["watched"]


def test_errors_of_the_program_are_not_taken_for_those_of_ranks() -> None:
    with pytest.raises(RuntimeError, match="shape"), collectives.watched("step 7"):
        torch.zeros(2).view(3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write("\n" + json.dumps(on_every_rank()) + "\n")
