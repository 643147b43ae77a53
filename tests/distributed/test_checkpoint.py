"""Check that checkpoints are asynchronous, atomic, kept as asked, and refused when damaged."""

from __future__ import annotations

import json
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from opensora.distributed import checkpoint_files
from opensora.distributed.checkpoint import Checkpointer, Progress
from opensora.distributed.run_folders import (
    checkpoints,
    find_run,
    new_run_folder,
    reading,
    remove,
)
from opensora.errors import DoesNotFitError, UsageError, WeightsError
from opensora.optim import Muon
from opensora.training.ema import EMA

# `Checkpointer` hides it; pytest shows again what is hidden.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Run:
    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        self.modules = {"net": self.model}
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.model.parameters(), **{"lr": 0.01, **options}
        )
        self.ema = EMA(self.modules, 0.9)
        self.number = 0

    def step(self) -> None:
        self.model(torch.ones(3, 4)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.number += 1

    def save(self, saver: Checkpointer, step: int | None = None, **options: Any) -> float:
        progress = Progress(global_step=self.number if step is None else step)
        return saver.save(progress, self.modules, self.optimizer, self.ema, **options)

    def load(self, saver: Checkpointer, which: str | Path | None = "latest") -> Progress | None:
        return saver.load(which, self.modules, self.optimizer, self.ema)

    def weights(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self.model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def steps(folder: Path) -> list[int]:
    return [saved.step for saved in checkpoints(folder)]


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold writes up until the event is set."""
    go, write = threading.Event(), checkpoint_files.save_file

    def wait_and_write(*args: Any, **kwargs: Any) -> None:
        assert go.wait(30)
        write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_file", wait_and_write)
        yield go
        go.set()


def test_state_is_that_of_the_save_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run()
    run.step()
    with slow_disk(monkeypatch) as go, Checkpointer(tmp_path) as saver:
        expected = run.weights()
        run.save(saver)
        assert saver.in_flight()
        run.step()
        assert not checkpoints(tmp_path)
        go.set()
    assert not same(run.weights(), expected)
    other = Run()
    with Checkpointer(tmp_path) as saver:
        assert other.load(saver) == Progress(global_step=1)
    assert same(other.weights(), expected)


def test_second_save_waits_for_the_first_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    with slow_disk(monkeypatch) as go, Checkpointer(tmp_path) as saver:
        assert run.save(saver, 1) < 0.2
        threading.Timer(0.3, go.set).start()
        assert run.save(saver, 2) > 0.2
    assert steps(tmp_path) == [1, 2]
    assert "waited 0.3 s for the checkpoint before this one" in caplog.text


def test_progress_and_extra_come_back(tmp_path: Path) -> None:
    run = Run()
    extra = {
        "schedule": {"warmup": 3, "rate": 1e-3},
        "clip": {"norms": torch.tensor([1.5, 2.5], dtype=torch.float64), "bad": [["a", 1]]},
        "loss": float("inf"),
        "none": None,
    }
    progress = Progress(2, 7, 31, 64, 1, 8, extra)
    with Checkpointer(tmp_path) as saver:
        saver.save(progress, run.modules, run.optimizer, wait=True)
        found = saver.load("latest", run.modules, run.optimizer)
    assert found is not None
    norms = found.extra["clip"].pop("norms")
    assert torch.equal(norms, extra["clip"].pop("norms"))  # type: ignore[attr-defined]
    assert found == progress
    (folder,) = tmp_path.iterdir()
    assert folder.name == "epoch2-global_step31"
    states = json.loads((folder / "running_states.json").read_text())
    upstream = ("epoch", "step", "global_step", "batch_size")
    assert [states[name] for name in upstream] == [2, 7, 31, 8]
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1


def test_what_cannot_be_stored_is_refused_at_once(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path) as saver, pytest.raises(TypeError, match=r"extra\.a\.0 is a set"):
        saver.save(Progress(extra={"a": [{1}]}), run.modules, run.optimizer)


def test_weights_that_are_swapped_with_their_averages_are_not_saved(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path) as saver:
        with run.ema.swap(), pytest.raises(RuntimeError, match="hold the averages"):
            run.save(saver)
        run.save(saver)
        with pytest.raises(ValueError, match="of none of the modules"):
            saver.save(Progress(), {"other": run.model}, run.optimizer, run.ema)
    assert steps(tmp_path) == [0]


def test_float32_state_of_bfloat16_weights_stays_exact(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.weight] = {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 4)}
    expected = optimizer.state[model.weight]["exp_avg"].clone()
    with Checkpointer(tmp_path) as saver:
        saver.save(Progress(), {"net": model}, optimizer, wait=True)
        optimizer.state.clear()
        saver.load("latest", {"net": model}, optimizer)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], expected)
    assert model.bias not in optimizer.state  # it had none


def test_optimizers_with_numbers_for_state_resume_exactly(tmp_path: Path) -> None:
    def run_with_muon() -> Run:
        run = Run()
        run.optimizer = Muon(run.model.named_parameters())
        return run

    run = run_with_muon()
    run.step()
    with Checkpointer(tmp_path) as saver:
        run.save(saver, wait=True)
        other = run_with_muon()
        other.load(saver)
    run.step()
    other.step()
    assert same(run.weights(), other.weights())
    assert [type(s.get("step", 0)) for s in other.optimizer.state.values()] == [int] * 4


def test_hyperparameters_are_those_of_the_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(weight_decay=0.1)
    run.optimizer.param_groups[0]["lr"] = 0.5
    with Checkpointer(tmp_path) as saver:
        run.save(saver, wait=True)
        other = Run(weight_decay=0.2)
        other.load(saver)
    group = other.optimizer.param_groups[0]
    assert (group["weight_decay"], group["lr"], group["betas"]) == (0.2, 0.5, (0.9, 0.999))
    assert "weight_decay was 0.1 in the checkpoint and is 0.2" in caplog.text
    assert "betas" not in caplog.text


def test_saving_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    run, other = Run(), Run()
    with Checkpointer(tmp_path) as saver:
        run.save(saver, wait=True)
    run.step()
    other.step()
    assert same(run.weights(), other.weights())


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [200, 9000])  # in the JSON files or in the tensors
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, room: int) -> None:
    run = Run()
    saver = Checkpointer(tmp_path)
    run.save(saver, 1, wait=True)
    before = run.weights()
    with full_disk(room):
        run.save(saver, 2)
        with pytest.raises(DoesNotFitError) as raised:
            run.save(saver, 3)
    message = str(raised.value)
    assert "cannot write the checkpoint" in message
    assert (
        "epoch0-global_step2: File too large; the last good one is epoch0-global_step1" in message
    )
    assert [path.name for path in tmp_path.iterdir()] == ["epoch0-global_step1"]
    assert same(run.weights(), before)
    run.save(saver, 3)  # the error was told once; there is room again
    saver.close()
    assert steps(tmp_path) == [1, 3]


def test_error_of_the_last_write_is_raised_by_close(tmp_path: Path) -> None:
    run = Run()
    with full_disk(100), pytest.raises(DoesNotFitError), Checkpointer(tmp_path) as saver:
        run.save(saver)


def test_folder_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="give another --outputs folder"):
        Checkpointer(tmp_path / "file")


def test_folder_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "epoch0-global_step4/model").mkdir(parents=True)
    run = Run()
    saver = Checkpointer(tmp_path)
    with pytest.raises(UsageError, match="a folder that opensora did not make has its name"):
        run.save(saver, 4, wait=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["epoch0-global_step4", "model"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: flip(f / "00000.safetensors"),
        lambda f: flip(f / "running_states.json"),
        lambda f: cut(f / "00000.safetensors"),
        lambda f: (f / "00000.safetensors").unlink(),
        lambda f: cut(f / "running_states.json"),
        lambda f: (f / "running_states.json").unlink(),
        lambda f: cut(f / "index.json"),
        lambda f: (f / "index.json").write_text("{}"),
    ],
    ids=[
        "bit",
        "bit-states",
        "cut",
        "no-shard",
        "cut-states",
        "no-states",
        "cut-index",
        "empty-index",
    ],
)
def test_damaged_checkpoint_is_reported_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    run = Run()
    with Checkpointer(tmp_path) as saver:
        run.save(saver, 1)
        run.step()
        run.save(saver, 2)
    damage(tmp_path / "epoch0-global_step2")
    with Checkpointer(tmp_path) as saver:
        assert run.load(saver) == Progress(global_step=1)
        with pytest.raises(WeightsError, match="epoch0-global_step2"):
            run.load(saver, tmp_path / "epoch0-global_step2")
        assert "CHECKPOINT NOT USABLE, taking the one before it" in caplog.text
        (tmp_path / "epoch0-global_step1/00000.safetensors").unlink()
        with pytest.raises(WeightsError, match="all 2 checkpoints"):
            run.load(saver)


def test_index_with_a_piece_left_out_or_too_big_is_refused(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path) as saver:
        run.save(saver, 1)
    index = tmp_path / "epoch0-global_step1/index.json"
    data = json.loads(index.read_text())
    row = data["tensors"]["model.net.0.weight"]
    assert row["pieces"] == [["00000.safetensors", [0, 0], [6, 4]]]
    for shape, pieces, message in (
        ([6, 4], [], "pieces of model.net.0.weight are missing"),
        ([6, 4], [["00000.safetensors", [3, 0], [6, 4]]], "are missing"),
        ([6, 8], [["00000.safetensors", [0, 0], [6, 8]]], "another model"),
        ([6, 4], [["00000.safetensors", [0, 0], [3, 4]]] * 2, r"is \[6, 4\], not \[3, 4\]"),
    ):
        row.update(shape=shape, pieces=pieces)
        index.write_text(json.dumps(data))
        with Checkpointer(tmp_path) as saver, pytest.raises(WeightsError, match=message):
            run.load(saver, index.parent)


def test_index_that_points_outside_is_refused(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path / "run") as saver:
        run.save(saver, 1)
    folder = tmp_path / "run/epoch0-global_step1"
    (folder / "00000.safetensors").rename(tmp_path / "00000.safetensors")
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace("00000.safe", "../../00000.safe"))
    with Checkpointer(tmp_path / "run") as saver, pytest.raises(WeightsError, match="no shard"):
        run.load(saver, folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_pickles_in_the_folder_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run()
    with Checkpointer(tmp_path / "run") as saver:
        run.save(saver, 1, wait=True)
        folder = tmp_path / "run/epoch0-global_step1"
        for name in (".metadata", "ema.pt", "optimizer.pt", "__0_0.distcp"):
            (folder / name).write_bytes(pickle.dumps(Bomb()))
        assert run.load(saver) is not None
        (folder / "00000.safetensors").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(WeightsError):
            run.load(saver)
    assert not (tmp_path / "exploded").exists()


def test_retention_keeps_the_last_and_every_kth(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path, keep_last=2, keep_every=4) as saver:
        for step in range(1, 10):
            run.save(saver, step)
    assert steps(tmp_path) == [4, 8, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"epoch0-global_step{s}" for s in (4, 8, 9)
    ]


def test_retention_touches_only_what_it_made(tmp_path: Path) -> None:
    run = Run()
    foreign = ["epoch0-global_step0/model/w.bin", "notes.txt", ".other.partial/x", "pipeline/a"]
    foreign += [".epoch9-global_step9.partial/mine.txt"]
    for name in foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    with Checkpointer(outside) as saver:
        run.save(saver, 0)
    (tmp_path / "epoch1-global_step0").symlink_to(outside / "epoch0-global_step0")
    with Checkpointer(tmp_path, keep_last=1) as saver:
        run.save(saver, 1, wait=True)
        (tmp_path / "epoch0-global_step1/mine.txt").write_text("")
        run.save(saver, 2)
    assert steps(tmp_path) == [2]
    assert all((tmp_path / name).is_file() for name in foreign)
    assert steps(outside) == [0]
    assert len(list(tmp_path.rglob("mine.txt"))) == 2
    assert not list(tmp_path.glob("*_step1/*.safetensors"))


def test_checkpoint_that_is_read_is_not_removed(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path, keep_last=1) as saver:
        run.save(saver, 1, wait=True)
        with reading(tmp_path / "epoch0-global_step1"):
            run.save(saver, 2, wait=True)
            assert steps(tmp_path) == [1, 2]
            assert not remove(tmp_path / "epoch0-global_step1")
        run.save(saver, 3)
    assert steps(tmp_path) == [3]


def test_latest_is_the_last_saved_even_if_a_run_went_back(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path, keep_last=2) as saver:
        for step in (10, 20, 30):
            run.save(saver, step)
        run.load(saver, tmp_path / "epoch0-global_step20")
        run.step()
        run.save(saver, 25)
        run.step()
        run.save(saver, 30, wait=True)  # in place of the one of the abandoned branch
        assert steps(tmp_path) == [25, 30]
        other = Run()
        assert other.load(saver) == Progress(global_step=30)
        assert same(other.weights(), run.weights())


def test_replaced_checkpoint_comes_back_if_its_replacement_was_not_finished(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path) as saver:
        run.save(saver, 1)
    (tmp_path / "epoch0-global_step1").rename(tmp_path / ".epoch0-global_step1.replaced")
    with Checkpointer(tmp_path) as saver:
        assert run.load(saver) == Progress(global_step=1)


def test_another_model_is_refused_with_a_list(tmp_path: Path) -> None:
    run, other = Run(), Run()
    other.model.append(nn.Linear(2, 2))
    other.ema = EMA(other.modules, 0.9)
    with Checkpointer(tmp_path) as saver:
        run.save(saver, 1, wait=True)
        with pytest.raises(WeightsError, match=r"4 missing \(model.net.2.weight"):
            other.load(saver)


def test_checkpoints_without_checksums_load_and_their_random_state_is_checked(
    tmp_path: Path,
) -> None:
    run = Run()
    with Checkpointer(tmp_path) as saver:
        run.save(saver, 1)
        saver.wait()
        folder = tmp_path / "epoch0-global_step1"
        index = json.loads((folder / "index.json").read_text())
        assert set(index.pop("crc32")) == {"00000.safetensors", "running_states.json"}
        (folder / "index.json").write_text(json.dumps(index))
        assert run.load(saver) == Progress(global_step=1)
        shard = folder / "00000.safetensors"
        tensors = load_file(shard)
        tensors["rng.0.python"][-5] = 200
        save_file(tensors, shard)
        with pytest.raises(WeightsError, match="is damaged: no random state"):
            run.load(saver)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path) as saver:
        run.save(saver, 1)
        two = [{"params": [p]} for p in run.model.parameters()]
        run.optimizer = torch.optim.AdamW(two)
        with pytest.raises(WeightsError, match=r"has 4 groups .* had 1: .*--start-from-scratch"):
            run.load(saver)


def test_latest_of_a_new_run_and_none_load_nothing(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path / "new") as saver:
        assert run.load(saver) is None
        assert run.load(saver, None) is None
        with pytest.raises(WeightsError, match="folder not found"):
            run.load(saver, tmp_path / "nothing")
        with pytest.raises(WeightsError, match="holds no checkpoint"):
            run.load(saver, tmp_path)


def test_keep_options_are_checked(tmp_path: Path) -> None:
    for options in ({"keep_last": 0}, {"keep_every": -1}):
        with pytest.raises(UsageError, match="must be at least 1"):
            Checkpointer(tmp_path, **options)


def test_run_folders_are_never_used_again(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    assert new_run_folder(outputs, "STDiT3-XL/2") == outputs / "000-STDiT3-XL-2"
    assert new_run_folder(outputs, "vae") == outputs / "001-vae"
    (outputs / "000-STDiT3-XL-2").rmdir()
    assert new_run_folder(outputs, "vae").name == "002-vae"
    (outputs / "041-x").mkdir()
    (outputs / "notes").mkdir()
    assert new_run_folder(outputs, "").name == "042-model"


def test_run_folders_made_at_once_are_different(tmp_path: Path) -> None:
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda i=i: made.append(new_run_folder(tmp_path, f"m{i % 2}")))
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name[:3] for path in made) == [f"{i:03d}" for i in range(16)]


def test_latest_run_is_the_newest_with_a_checkpoint(tmp_path: Path) -> None:
    assert find_run(tmp_path / "none") is None
    runs = [new_run_folder(tmp_path, "m") for _ in range(3)]
    assert find_run(tmp_path) is None
    with Checkpointer(runs[1]) as saver:
        Run().save(saver)
    assert find_run(tmp_path) == runs[1]
    assert find_run(tmp_path, "2") == find_run(tmp_path, "002-m") == runs[2]
    with pytest.raises(UsageError, match="no run '7'"):
        find_run(tmp_path, "7")
