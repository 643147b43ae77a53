"""Going on with a run that has other processes, settings or weights, and what is told of it."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from opensora.checkpoint import load_model
from opensora.data.batch import Batch, Sample, SampleError, Size
from opensora.data.shapes_dataset import ShapesDataset
from opensora.distributed import checkpoint_files
from opensora.distributed.run_folders import checkpoints
from opensora.errors import DoesNotFitError, NonFiniteError, UsageError
from opensora.models.stdit import STDiT3
from opensora.training.objective import Losses, Objective
from opensora.training.place import find_place, place, plan_digest
from opensora.weight_sources import read_weights
from tests.forks import Forks
from tests.training.test_program import CONFIG, losses, newest, run

FROZEN: dict[str, Any] = {
    "text_encoder": {"type": "t5", "from_pretrained": "tiny"},
    "model": {**(CONFIG.model or {}), "caption_channels": 128},
}


def averages(folder: Path) -> set[str]:
    """Return the names of a run's averages."""
    return {n.removeprefix("ema.transformer.") for n in newest(folder) if n.startswith("ema.")}


def test_frozen_weights_have_no_averages_and_are_exported_all_the_same(tmp_path: Path) -> None:
    model = {**FROZEN["model"], "freeze_y_embedder": True}
    folder = run(tmp_path, **{**FROZEN, "model": model}, max_steps=2, lr=1e-2)
    found = newest(folder)
    names = {n.removeprefix("model.transformer.") for n in found if n.startswith("model.")}
    frozen = {name for name in names if name.startswith(("y_embedder.", "rope."))}
    assert len(frozen) >= 5
    assert averages(folder) == names - frozen
    exported = load_model(STDiT3, folder / "transformer").state_dict()
    for name in names:
        source = "model" if name in frozen else "ema"
        assert torch.equal(exported[name], found[f"{source}.transformer.{name}"]), name
    changed = [
        n for n in names - frozen if not torch.equal(exported[n], found[f"model.transformer.{n}"])
    ]
    assert changed


def test_what_is_frozen_or_thawed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {**FROZEN["model"], "freeze_y_embedder": True}
    frozen: dict[str, Any] = {**FROZEN, "model": model}
    everything = averages(run(tmp_path, **FROZEN, max_steps=1))
    # Of an earlier version, or before they were frozen: averages of weights not trained now.
    fewer = averages(run(tmp_path, **frozen, max_steps=2, load="latest"))
    assert fewer < everything
    before = newest(tmp_path / "000-STDiT3")
    folder = run(tmp_path, **FROZEN, max_steps=3, load="latest", ema_decay=1.0)
    assert averages(folder) == everything
    for name in everything - fewer:  # they begin at what the weights were
        expected = before[f"model.transformer.{name}"]
        assert torch.equal(newest(folder)[f"ema.transformer.{name}"], expected)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Collect (epoch, names) of the batches that are trained on."""
    found: list[tuple[int, tuple[str, ...]]] = []
    call = Objective.__call__

    def watched(self: Objective, batch: Batch) -> Losses:
        found.append((batch.epoch, tuple(batch.names)))
        return call(self, batch)

    monkeypatch.setattr(Objective, "__call__", watched)
    return found


def test_another_accumulation_goes_on_in_the_epoch_without_a_batch_twice(
    tmp_path: Path, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    # An epoch holds 8 batches; at 3 a step, 6 of them.
    run(tmp_path, max_steps=11)
    first = seen[8:]
    seen.clear()
    run(tmp_path, max_steps=12, accumulation_steps=3, load="latest")
    printed = capsys.readouterr().out
    assert "not an exact continuation" in printed
    assert "epoch 1 after 3 of its 6 batches" in printed
    assert "accumulation_steps: 1 -> 3" in printed
    assert [epoch for epoch, _ in seen] == [1] * 3
    assert len({names for _, names in (*first, *seen)}) == 6


def test_places_are_found_in_any_plan() -> None:
    rows = ShapesDataset([(17, 64, 64, 12), (1, 64, 64, 16)])
    from opensora.training.data import sampler_of

    def plan(replicas: int, **changes: Any) -> Any:
        return sampler_of(dataclasses.replace(CONFIG, **changes), rows, replicas)

    one, two, other = plan(1), plan(3), plan(3, seed=7)
    digest = plan_digest(one)
    assert digest.startswith(plan_digest(two))
    assert not digest.startswith(plan_digest(other)[:8])
    saved = place(one, 24, None, digest)
    assert (saved["epoch"], saved["offset"]) == (2, 4)
    assert find_place(one, 24, saved, digest) == (24, None)
    assert find_place(one, 24, {}, digest) == (24, None)  # of an older checkpoint
    number, note = find_place(two, 24, saved, digest)
    assert (number, number % 3) == (2 * 9 + 6, 0)
    assert "3" in str(note)
    number, note = find_place(other, 24, saved, plan_digest(other))
    assert number == 2 * 9 + 6
    assert "table, buckets or seed" in str(note)


def test_changed_settings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, max_steps=1)
    capsys.readouterr()
    run(tmp_path, max_steps=2, lr=1e-3, load="latest")
    printed = capsys.readouterr().out
    assert "changed since the run was last started: lr: 0.003 -> 0.001" in printed
    assert "load" not in printed.replace("--load", "")
    run(tmp_path, max_steps=2, lr=1e-3, load="latest")
    assert "changed since" not in capsys.readouterr().out


def poison(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    call = Objective.__call__

    def poisoned(self: Objective, batch: Batch) -> Losses:
        found = call(self, batch)
        factor = math.nan if batch.number in bad else 1.0
        return Losses(found.loss * factor, found.t, found.tokens)

    monkeypatch.setattr(Objective, "__call__", poisoned)


def test_a_run_that_cannot_go_back_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 0, 1, 2)
    with pytest.raises(NonFiniteError, match=r"no checkpoint to go back to.*--ckpt-every"):
        run(tmp_path, max_bad_steps=3)


def test_a_disk_that_was_full_for_a_while_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full, write = {"epoch0-global_step2"}, checkpoint_files.save_file

    def limited(tensors: dict[str, Tensor], path: Path) -> None:
        if path.parent.name.strip(".").removesuffix(".partial") in full:
            raise SafetensorError("No space left on device (os error 28)")
        write(tensors, path)

    monkeypatch.setattr(checkpoint_files, "save_file", limited)
    folder = run(tmp_path / "a", max_steps=6, ckpt_every=2)
    assert "epoch0-global_step2: No space left on device; there is no earlier one" in caplog.text
    assert [saved.step for saved in checkpoints(folder)] == [4, 6]
    full.add("epoch0-global_step4")
    with pytest.raises(DoesNotFitError, match="global_step4: No space left"):
        run(tmp_path / "b", max_steps=6, ckpt_every=2)
    assert not list((tmp_path / "b").rglob("*.partial"))


def test_bad_steps_cost_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1, 5)
    folder = run(tmp_path, max_steps=6, ckpt_every=2)
    # That of step 2 waits for a good step; the last step is saved though it was bad.
    assert [saved.step for saved in checkpoints(folder)] == [3, 4, 6]


def test_a_run_goes_back_to_what_it_was_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, max_steps=4, ckpt_every=2)
    older = next(saved.folder for saved in checkpoints(folder) if saved.step == 2)
    before = read_weights(older, ema=False).parts["transformer"]
    poison(monkeypatch, 2, 3)
    taken: list[dict[str, Tensor]] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any) -> Any:
        taken.append({"first": self.param_groups[0]["params"][0].detach().clone()})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run(tmp_path, max_steps=4, load=str(older), max_bad_steps=2)
    assert "back to the last good checkpoint" in capsys.readouterr().out
    assert any(torch.equal(taken[0]["first"], value) for value in before.values())


def test_a_step_without_a_row_changes_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ShapesDataset.load
    reading = {"on": True}

    def failing(self: ShapesDataset, index: int, size: Size, rng: Any) -> Sample:
        if not reading["on"]:
            raise SampleError("planted")
        return load(self, index, size, rng)

    monkeypatch.setattr(ShapesDataset, "load", failing)
    folder = run(tmp_path, max_steps=2, num_workers=0)
    before = newest(folder)
    reading["on"] = False
    run(tmp_path, max_steps=3, num_workers=0, load="latest", weight_decay=0.1)
    after = newest(folder)
    changed = [n for n, v in before.items() if not torch.equal(v, after[n])]
    assert [name for name in changed if name.startswith(("model.", "ema.", "optimizer."))] == []


def test_weights_come_from_runs_checkpoints_and_files(tmp_path: Path) -> None:
    """Of ours, of upstream's folders, and single files; `latest` among them."""
    folder = run(tmp_path / "a", **FROZEN, max_steps=1)
    last = checkpoints(folder)[-1].folder
    plain = read_weights(folder, ema=False).parts["transformer"]
    averaged = load_model(STDiT3, folder / "transformer").state_dict()
    torch.save(plain, tmp_path / "weights.pt")
    upstream = tmp_path / "epoch0-global_step9/model"
    upstream.mkdir(parents=True)
    torch.save(plain, upstream / "pytorch_model.bin")
    start: dict[str, dict[str, Any]] = {
        "run": {"load": str(folder), "start_from_scratch": True},
        "checkpoint": {"load": str(last), "start_from_scratch": True},
        "latest": {"load": "latest", "start_from_scratch": True},
        "file": {"ckpt_path": str(tmp_path / "weights.pt")},
        "upstream": {"ckpt_path": str(upstream.parent)},
        "exported": {"ckpt_path": str(folder / "transformer")},
    }
    from opensora.training.models import build_models

    for name, settings in start.items():
        config = dataclasses.replace(CONFIG, **FROZEN, outputs=str(tmp_path / "a"), **settings)
        loaded = build_models(config, torch.device("cpu")).transformer.state_dict()
        different = [
            [key for key, value in known.items() if not torch.equal(loaded[key], value.float())]
            for known in (plain, averaged)
        ]
        assert [] in different, (name, different)


def test_lora_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": {"type": "STDiT3", "from_pretrained": "tiny"},
        "lora": {"rank": 2},
        "text_encoder": FROZEN["text_encoder"],
    }
    whole = run(tmp_path / "whole", **settings, max_steps=4)
    run(tmp_path / "cut", **settings, max_steps=2)
    cut = run(tmp_path / "cut", **settings, max_steps=4, load="latest")
    mine, theirs = newest(cut), newest(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert losses(cut) == losses(whole)


def test_offloaded_weights_train_with_a_text_encoder_as_others_do(
    tmp_path: Path, forks: Forks
) -> None:
    fork = forks.start(Path(__file__), "offload", str(tmp_path / "a"))
    assert fork.wait() == 0, fork.printed
    found = losses(tmp_path / "a/000-STDiT3")
    assert found == pytest.approx(losses(run(tmp_path / "b", max_steps=3)), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp16"}, "bf16"),
        ({"validation": {"every": 0}}, r"validation\.every"),
        (
            {"validation": {"dataset": {"clips": [(9, 64, 64, 8)]}}},
            "validation: there would be 0 steps",
        ),
        ({"validation": {"data_path": "none.csv"}}, "validation: .*no setting 'data_path'"),
        ({"load": "latest", "start_from_scratch": True}, "holds no run"),
        ({"recompute": "evry-2"}, "every"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_models_are_read(
    tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.training.models._load_vae", lambda *_: pytest.fail("read"))
    with pytest.raises(UsageError, match=message):
        run(tmp_path, **changes)


def test_outputs_that_cannot_be_written_are_told_before_models_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.training.models._load_vae", lambda *_: pytest.fail("read"))
    (tmp_path / "file").touch()
    for outputs in (tmp_path / "file", tmp_path / "file/below", Path("/proc/none")):
        with pytest.raises(UsageError, match="cannot write"):
            run(outputs)


def test_rows_that_one_process_of_a_sequence_group_cannot_read_are_left_out_on_all(
    tmp_path: Path, forks: Forks
) -> None:
    """Two processes share every batch; one of them cannot read some rows."""
    forks.ranks(2, Path(__file__), "rows", str(tmp_path / "two"))
    load, damaged = ShapesDataset.load, damage
    try:
        damaged()
        alone = train_damaged(tmp_path / "one", 1)
    finally:
        ShapesDataset.load = load  # type: ignore[method-assign]
    two = tmp_path / "two/000-STDiT3"
    assert losses(two) == pytest.approx(losses(alone), rel=2e-5)
    assert len(list(two.glob("clips/*.png"))) == 2


def damage() -> None:
    """Make some rows unreadable."""
    load = ShapesDataset.load

    def failing(self: ShapesDataset, index: int, size: Size, rng: Any) -> Sample:
        if index % 3 == 1 and self.seed == 42:
            raise SampleError("planted")
        return load(self, index, size, rng)

    ShapesDataset.load = failing  # type: ignore[method-assign]


def train_damaged(outputs: Path, sp_size: int) -> Path:
    """Train with validation and clips, which must leave training as it is."""
    section = {
        "every": 2,
        "dataset": {"clips": [(17, 64, 64, 4), (1, 64, 64, 4)], "seed": 9},
        "samples": 2,
        "timesteps": 2,
        "prompts": ["a red circle"],
    }
    validation = section if sp_size > 1 else None
    return run(outputs, max_steps=3, sp_size=sp_size, validation=validation)


if __name__ == "__main__":
    if sys.argv[1] == "offload":
        run(Path(sys.argv[2]), max_steps=3, cpu_offload=True)
    else:
        if os.environ["RANK"] == "1":
            damage()
        train_damaged(Path(sys.argv[2]), 2)
