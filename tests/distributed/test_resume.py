"""Check that a run goes on bit for bit after kill -9, and that other numbers of processes can load.

This file is also the program that is killed: `python test_resume.py {train,kill-loop} ...`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opensora.distributed import checkpoint_files
from opensora.distributed.checkpoint import Checkpointer, Progress
from opensora.distributed.run_folders import checkpoints
from opensora.errors import DoesNotFitError, WeightsError
from opensora.weight_loading import load_weights

# `Checkpointer` hides it; pytest shows again what is hidden.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS, SAVE_EVERY = 8, 2


class Averages:
    """A sharded float32 average of a model's weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.updates = model, 0
        self.state = {k: v.detach().clone().float() for k, v in self._values()}

    def _values(self) -> Any:
        return [(f"net.{k}", v) for k, v in get_model_state_dict(self.model).items()]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        for key, value in self._values():
            self.state[key].lerp_(value.float(), 1 / (1 + self.updates))


class Run:
    """A toy run whose every random draw comes from generators that a checkpoint must restore."""

    def __init__(self, rank: int, world_size: int, width: int = 7) -> None:
        torch.manual_seed(0)
        # Rows of 7, 3 and 1: over two ranks the parts are uneven, and one is empty.
        layers = (nn.Linear(5, width), nn.Dropout(0.3), nn.Linear(width, 3), nn.Linear(3, 1))
        self.model = nn.Sequential(*layers)
        if world_size > 1:
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(self.model)
        self.modules = {"net": self.model}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.ema = Averages(self.model)
        self.progress = Progress(batch_size=4, extra={"norms": torch.zeros(2), "skipped": []})
        torch.manual_seed(100 + rank)
        random.seed(rank)
        np.random.seed(rank)

    def step(self) -> None:
        x = torch.randn(4, 5) + random.random() + np.random.rand()
        loss = self.model(x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        p = self.progress
        p.global_step += 1
        p.step += 1
        p.batch += 2
        p.extra["norms"] = p.extra["norms"] * 0.9 + p.global_step
        p.extra["skipped"].append(p.batch)

    def save(self, saver: Checkpointer, **kwargs: Any) -> float:
        return saver.save(self.progress, self.modules, self.optimizer, self.ema, **kwargs)

    def load(self, saver: Checkpointer, which: str | Path = "latest") -> bool:
        progress = saver.load(which, self.modules, self.optimizer, self.ema)
        self.progress = progress or self.progress
        return progress is not None

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {**self.ema.state}
        for name, weight in self.model.named_parameters():
            found[f"model.{name}"] = weight.detach()
            for field, value in self.optimizer.state[weight].items():
                found[f"{name}.{field}"] = value
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()}
        return {**whole, "norms": self.progress.extra["norms"]}

    def digest(self) -> str:
        p = self.progress
        hashed = hashlib.sha256(repr((p.global_step, p.batch, p.extra["skipped"])).encode())
        for name, tensor in sorted(self.tensors().items()):
            hashed.update(name.encode() + tensor.numpy().tobytes())
        return hashed.hexdigest()


def train(folder: Path, out: Path, rank: int, world_size: int, kill_at: int = 0) -> None:
    """Train to STEPS from what the folder holds; kill this process at a step, a write in flight."""
    run = Run(rank, world_size)
    with Checkpointer(folder, rank=rank, world_size=world_size) as saver:
        first = run.load(saver) and run.progress.global_step
        while run.progress.global_step < STEPS:
            run.step()
            if run.progress.global_step % SAVE_EVERY == 0:
                run.save(saver)
            if run.progress.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    draws = [torch.rand(1).item(), random.random(), np.random.rand()]
    tensors = run.tensors()
    out.mkdir(exist_ok=True)
    torch.save(tensors, out / f"{rank}.pt")
    result = {"first": int(first), "digest": run.digest(), "draws": draws}
    (out / f"{rank}.json").write_text(json.dumps(result))


def check_together(folder: Path, rank: int) -> None:
    """Check what takes two ranks: weights into shards, and an error that only one of them meets."""
    run, fresh = Run(rank, 2), Run(rank, 2)
    with Checkpointer(folder, rank=rank, world_size=2) as saver:
        assert run.load(saver)
        report = load_weights(fresh.model, folder)
        assert report.step == STEPS
        for a, b in zip(run.model.parameters(), fresh.model.parameters(), strict=True):
            assert torch.equal(a.full_tensor(), b.full_tensor())  # type: ignore[operator]
        files = sorted(path.name for path in folder.iterdir())
        run.step()
        if rank == 1:
            checkpoint_files.save_file = no_room
        run.save(saver)
        with pytest.raises(DoesNotFitError, match="No space left on device; the last good one is"):
            saver.wait()
        dist.barrier()
        assert sorted(path.name for path in folder.iterdir()) == files
        with pytest.raises(WeightsError, match="folder not found"):  # on all: none waits in vain
            saver.load(folder / "none", run.modules)


def no_room(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read(out: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((out / f"{rank}.json").read_text())


def read_tensors(out: Path, rank: int = 0) -> dict[str, Tensor]:
    return torch.load(out / f"{rank}.pt", weights_only=True)


def kill_loop(folder: Path, rounds: int) -> None:
    """Fork a run that saves without pause, kill it at a random moment, check, and again."""
    rng = random.Random(0)
    log = folder / "log"
    log.touch()
    hit = resumed = 0
    warm = Run(0, 1, width=4000)  # what is imported late is imported here, not in every child
    warm.step()
    for _ in range(2):
        begun = time.monotonic()
        with Checkpointer(folder / "warm") as saver:
            warm.save(saver)
        took = time.monotonic() - begun
    for number in range(rounds):
        child = os.fork()
        if child == 0:
            save_for_ever(folder / "run", log)
        size, deadline = log.stat().st_size, time.monotonic() + 10
        while number % 4 and log.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.001)  # three of four are killed once they save, one while it starts
        time.sleep(rng.uniform(0, 3 * min(took, 0.05)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"round {number}: the run ended by itself, see stderr"
        hit += any(path.name.endswith(".partial") for path in (folder / "run").glob(".*"))
        lines = log.read_text().splitlines()
        done = max((int(x.split()[1]) for x in lines if x.startswith("done ")), default=0)
        run = Run(0, 1, width=4000)
        with Checkpointer(folder / "run") as saver:
            if run.load(saver):
                resumed += 1
                assert f"saving {run.progress.global_step} {run.digest()}" in lines
            assert run.progress.global_step >= done, (run.progress.global_step, done)
        assert not list((folder / "run").glob(".*"))
    with Checkpointer(folder / "run", keep_last=2) as saver:
        run.step()
        run.save(saver)
    assert len(checkpoints(folder / "run")) == 2
    print(json.dumps({"hit": hit, "resumed": resumed, "step": run.progress.global_step}))


def save_for_ever(folder: Path, log: Path) -> None:
    try:
        run = Run(0, 1, width=4000)
        saver = Checkpointer(folder, keep_last=2)
        run.load(saver)
        with log.open("a", buffering=1) as lines:
            last = 0
            while True:
                run.step()
                saver.wait()
                if last:
                    lines.write(f"done {last}\n")
                last = run.progress.global_step
                lines.write(f"saving {last} {run.digest()}\n")
                run.save(saver)
    finally:
        sys.stderr.flush()
        os._exit(1)


def start(world_size: int, tmp_path: Path, *jobs: tuple[str, str, int], check: str = "") -> None:
    """Train in processes, one job after the other: run folder, result folder, step to die at."""
    checked = [str(tmp_path / check)] if check else []
    store = f"file://{tmp_path}/store-{time.monotonic_ns()}"
    paths = [(str(tmp_path / folder), str(tmp_path / out), kill) for folder, out, kill in jobs]
    processes = []
    for rank in range(world_size):
        command = [sys.executable, __file__, "train", str(rank), str(world_size), store]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([*command, json.dumps(paths), *checked], env=environment))
    try:
        statuses = [process.wait(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    expected = -signal.SIGKILL if any(kill for _, _, kill in jobs) else 0
    assert statuses == [expected] * world_size


def test_run_killed_and_resumed_equals_uninterrupted_run_on_one_process(tmp_path: Path) -> None:
    start(1, tmp_path, ("run", "none", 5))
    assert not (tmp_path / "none").exists()
    train(tmp_path / "run", tmp_path / "resumed", 0, 1)
    train(tmp_path / "whole", tmp_path / "uninterrupted", 0, 1)
    resumed = read(tmp_path / "resumed")
    assert resumed["first"] in (2, 4)  # the write of step 4 may not have been complete
    assert {**resumed, "first": 0} == read(tmp_path / "uninterrupted")


def test_run_killed_and_resumed_equals_uninterrupted_run_on_two_processes(tmp_path: Path) -> None:
    start(2, tmp_path, ("whole", "uninterrupted", 0), ("run", "none", 5))
    expected = read_tensors(tmp_path / "uninterrupted")

    # What two ranks wrote, one process loads, and the other way round.
    alone = Run(0, 1)
    with Checkpointer(tmp_path / "whole") as saver:
        assert alone.load(saver)
        assert_same(alone.tensors(), expected)
        last = checkpoints(tmp_path / "whole")[-1].folder
        assert sorted(path.name for path in last.glob("*.safetensors")) == [
            "00000.safetensors",
            "00001.safetensors",
        ]
    with Checkpointer(tmp_path / "single") as saver:
        alone.save(saver)

    start(2, tmp_path, ("run", "resumed", 0), ("single", "again", 0), check="whole")
    whole = [read(tmp_path / "uninterrupted", rank) for rank in (0, 1)]
    resumed = [read(tmp_path / "resumed", rank) for rank in (0, 1)]
    assert resumed[0]["first"] == resumed[1]["first"]
    assert resumed[0]["first"] in (2, 4)
    assert [{**row, "first": 0} for row in resumed] == whole
    assert whole[0]["draws"] != whole[1]["draws"]
    for rank in (0, 1):
        assert read(tmp_path / "again", rank)["first"] == STEPS
        assert_same(read_tensors(tmp_path / "again", rank), expected)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def test_kill_at_sixty_random_moments_leaves_a_checkpoint_that_was_saved(tmp_path: Path) -> None:
    command = [sys.executable, __file__, "kill-loop", tmp_path, "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, timeout=120, check=True, stdout=subprocess.PIPE, text=True
    )
    result = json.loads(done.stdout)
    assert result["resumed"] >= 30
    assert result["hit"] >= 3  # kills that met a write half done
    assert result["step"] >= 5


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "kill-loop":
        kill_loop(Path(sys.argv[2]), int(sys.argv[3]))
        return
    rank, world_size, store = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if world_size > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    for folder, out, kill_at in json.loads(sys.argv[5]):
        train(Path(folder), Path(out), rank, world_size, kill_at)
    if world_size > 1:
        if len(sys.argv) > 6:
            check_together(Path(sys.argv[6]), rank)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
