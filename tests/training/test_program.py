"""Run the training program: resume, processes, given frames, bad data, LoRA, validation."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.checkpoint import load_model
from opensora.data.batch import Sample, SampleError, Size
from opensora.data.shapes_dataset import ShapesDataset
from opensora.distributed.run_folders import checkpoints
from opensora.errors import NonFiniteError, UsageError
from opensora.export import export as export_weights
from opensora.models.stdit import STDiT3
from opensora.pipeline import OpenSoraPipeline
from opensora.train import train
from opensora.train_config import TrainConfig
from opensora.training.metrics import read_metrics
from opensora.training.objective import Losses, Objective
from tests.forks import Forks

PROGRAM = Path(__file__).resolve().parents[2] / "scripts/train.py"
CONFIG = TrainConfig(
    dataset={
        "type": "ShapesDataset",
        "clips": [(17, 64, 64, 8), (1, 64, 64, 16)],
        "pair_share": 0.3,
    },
    bucket_config={"64p": {1: (1.0, 4), 17: (1.0, 2)}},
    mask_ratios={"image_head": 0.3, "random": 0.3},
    model={
        "type": "STDiT3",
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "caption_channels": 32,
        "model_max_length": 120,
        "pred_sigma": False,
        "input_sq_size": 64,
    },
    vae={"type": "VideoAutoencoderPipeline", "from_pretrained": "tiny"},
    text_encoder={
        "type": "byt5", "max_length": 120, "d_model": 32, "d_ff": 32, "num_layers": 1,
        "num_heads": 2,
    },
    scheduler={"type": "rflow", "sample_method": "logit-normal"},
    defaults={"num_frames": 17, "height": 64, "width": 64, "fps": 8},
    lr=3e-3,
    warmup_steps=2,
    grad_clip=1.0,
    ema_decay=0.9,
    dtype="fp32",
    device="cpu",
    max_steps=6,
    log_every=1,
    num_workers=1,
    quiet=True,
)  # fmt: skip


def run(outputs: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(CONFIG, outputs=str(outputs), **changes))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def newest(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the newest checkpoint but for generators that nothing uses."""
    path = max(checkpoints(folder), key=lambda saved: saved.serial).folder
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return {name: value for name, value in tensors.items() if not name.startswith("rng.")}


def write_config(path: Path, **changes: Any) -> Path:
    """Write the configuration as a user would."""
    values = dataclasses.asdict(dataclasses.replace(CONFIG, **changes))
    defaults = dataclasses.asdict(TrainConfig())
    lines = [f"{k} = {v!r}\n" for k, v in values.items() if v != defaults[k]]
    path.write_text("".join(lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run six steps without interruption."""
    return run(tmp_path_factory.mktemp("whole"))


def test_writes_averaged_weights_that_generate(whole: Path) -> None:
    pipeline = OpenSoraPipeline.from_pretrained(whole / "pipeline", device="cpu")
    frames = pipeline("a red circle", num_inference_steps=2, num_frames=1, progress=False).frames
    assert frames[0].shape == (1, 64, 64, 3)
    averaged = {k[len("ema.transformer.") :]: v for k, v in newest(whole).items() if "ema.tr" in k}
    stored = load_model(STDiT3, whole / "pipeline", subfolder="transformer").state_dict()
    for name, value in averaged.items():
        torch.testing.assert_close(stored[name].float(), value, atol=1e-2, rtol=1e-2)


def test_the_loss_falls_on_a_few_clips(tmp_path: Path) -> None:
    few = {"type": "ShapesDataset", "clips": [(17, 64, 64, 2)]}
    folder = run(tmp_path, dataset=few, mask_ratios=None, max_steps=60, log_every=10, lr=1e-2)
    found = losses(folder)
    assert found[-1] < 0.6 * found[0]


def test_goes_on_bit_for_bit_after_a_kill(whole: Path, tmp_path: Path, forks: Forks) -> None:
    config = write_config(tmp_path / "c.py", outputs=str(tmp_path), ckpt_every=2, max_steps=60)
    fork = forks.start(PROGRAM, str(config))
    fork.wait(until="step 5/")
    fork.send(signal.SIGKILL)
    assert fork.wait() == -signal.SIGKILL
    first = tmp_path / "000-STDiT3"
    assert 2 <= max(saved.step for saved in checkpoints(first)) <= 4
    folder = run(tmp_path, load="latest")
    assert folder == first
    assert losses(folder) == losses(whole)
    mine, theirs = newest(folder), newest(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_a_signal_saves_and_the_run_goes_on(whole: Path, tmp_path: Path, forks: Forks) -> None:
    config = write_config(tmp_path / "c.py", outputs=str(tmp_path), max_steps=60)
    fork = forks.start(PROGRAM, str(config))
    fork.wait(until="step 2/")
    fork.send(signal.SIGTERM)
    assert fork.wait() == 0, fork.printed
    assert "stopped and saved" in fork.printed
    assert losses(run(tmp_path, load="latest")) == losses(whole)


@pytest.mark.parametrize("flags", [(), ("--sp-size", "2")], ids=["data", "sequence"])
def test_two_processes_train_as_one(tmp_path: Path, flags: Sequence[str], forks: Forks) -> None:
    together = 2 if "--sp-size" in flags else 4
    alone = run(tmp_path / "one", accumulation_steps=together, max_steps=4)
    config = write_config(tmp_path / "c.py", outputs=str(tmp_path / "two"), max_steps=4)
    forks.ranks(2, PROGRAM, str(config), "--accumulation-steps", "2", *flags)
    two = tmp_path / "two/000-STDiT3"
    assert losses(two) == pytest.approx(losses(alone), rel=2e-5)
    gathered = export(two, tmp_path / "weights")
    for name, value in export(alone, tmp_path / "alone").items():
        torch.testing.assert_close(gathered[name], value, atol=2e-4, rtol=1e-3)


def test_the_embedded_model_trains_on_two_processes_as_on_one(tmp_path: Path, forks: Forks) -> None:
    committed = PROGRAM.parents[1] / "configs/tiny/train/stdit.py"
    config = tmp_path / "c.py"
    config.write_text(
        f"""_base_ = [{str(committed)!r}]
vae = dict(from_pretrained="tiny")
dataset = dict(clips=[(17, 64, 64, 16), (17, 80, 48, 8), (34, 64, 64, 8), (1, 48, 80, 16)])
bucket_config = dict(
    _delete_=True, **{{"64p": {{1: (1.0, 4), 17: (1.0, 4), 34: (1.0, 4)}}, "80p": {{17: (1.0, 4)}}}}
)
max_steps = 4
dtype = "fp32"  # the rounding of bf16 alone is 3e-4
log_every = 1
validation = None
quiet = True
"""
    )
    alone = forks.start(
        PROGRAM, str(config), "--outputs", str(tmp_path / "one"), "--accumulation-steps", "2"
    )
    assert alone.wait() == 0, alone.printed
    forks.ranks(2, PROGRAM, str(config), "--outputs", str(tmp_path / "two"))
    one, two = (losses(tmp_path / name / "000-STDiT3") for name in ("one", "two"))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=2e-5)


def export(folder: Path, out: Path) -> dict[str, Tensor]:
    """Return the averages of a run's transformer, whole."""
    from opensora.weight_sources import read_weights

    return read_weights(folder, ema=True).parts["transformer"]


def test_another_number_of_processes_goes_on(tmp_path: Path, forks: Forks) -> None:
    run(tmp_path, accumulation_steps=2, max_steps=2)
    config = write_config(tmp_path / "c.py", outputs=str(tmp_path), max_steps=4)
    forks.ranks(2, PROGRAM, str(config), "--load", "latest")
    alone = run(tmp_path / "alone", accumulation_steps=2, max_steps=4)
    assert losses(tmp_path / "000-STDiT3") == pytest.approx(losses(alone), rel=2e-5)


def test_training_is_the_same_with_validation(whole: Path, tmp_path: Path) -> None:
    section = {
        "every": 2,
        "dataset": {"clips": [(17, 64, 64, 4), (1, 64, 64, 4)], "seed": 9},
        "samples": 2,
        "timesteps": 2,
        "prompts": ["a red circle"],
    }
    folder = run(tmp_path, validation=section)
    assert losses(folder) == losses(whole)
    found = [x for x in read_metrics(folder / "metrics.jsonl") if "validation_loss" in x]
    assert [line["step"] for line in found] == [2, 4, 6]
    assert len({line["validation_digest"] for line in found}) == 1
    assert len({line["validation_loss"] for line in found}) == 3
    assert (folder / "loss.svg").is_file()
    assert len(list(folder.glob("clips/*.png"))) == 3


def test_bad_rows_are_set_aside_and_a_batch_without_any_takes_no_step_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"shapes 0", "shapes 1", "shapes 2", "shapes 3", "shapes 4", "shapes 5"}
    load = ShapesDataset.load

    def failing(self: ShapesDataset, index: int, size: Size, rng: Any) -> Sample:
        if f"shapes {index}" in bad:
            raise SampleError("planted")
        return load(self, index, size, rng)

    monkeypatch.setattr(ShapesDataset, "load", failing)
    folder = run(tmp_path, max_steps=16, mask_ratios=None)
    assert len(losses(folder)) == 16
    lines = [json.loads(x) for x in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == bad
    assert all("planted" in json.dumps(line) for line in lines)


def test_a_bad_step_is_skipped_and_many_go_back_to_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Objective.__call__
    bad = {3, 7, 8, 9}

    def poisoned(self: Objective, batch: Any) -> Losses:
        found = call(self, batch)
        factor = math.nan if batch.number in bad else 1.0
        return Losses(found.loss * factor, found.t, found.tokens)

    monkeypatch.setattr(Objective, "__call__", poisoned)
    folder = run(tmp_path, max_steps=12, ckpt_every=2, max_bad_steps=3)
    assert "3 bad steps in a row; back to the last good checkpoint" in capsys.readouterr().out
    told = [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["batches"] for line in told] == [[3], [7], [8], [9]]
    assert all(name.startswith("shapes ") for line in told for name in line["samples"])
    assert all(bool(value.isfinite().all()) for value in newest(folder).values())


def test_hopeless_runs_end_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Objective.__call__

    def poisoned(self: Objective, batch: Any) -> Losses:
        found = call(self, batch)
        factor = math.nan if batch.number > 1 else 1.0
        return Losses(found.loss * factor, found.t, found.tokens)

    monkeypatch.setattr(Objective, "__call__", poisoned)
    with pytest.raises(NonFiniteError, match="--lr"):
        run(tmp_path, max_steps=40, ckpt_every=1, max_bad_steps=2)


def test_lora_trains_itself_alone(tmp_path: Path) -> None:
    fixed = {"type": "t5", "from_pretrained": "tiny"}
    model = {"type": "STDiT3", "from_pretrained": "tiny"}
    folder = run(tmp_path, model=model, text_encoder=fixed, lora={"rank": 2}, max_steps=3)
    names = {name for name in newest(folder) if name.startswith("optimizer.")}
    assert names
    assert all("lora_" in name for name in names)
    pipeline = OpenSoraPipeline.from_pretrained("tiny", device="cpu")
    before = pipeline("a red circle", seed=0, num_inference_steps=2, progress=False).frames[0]
    from opensora.lora import load_lora

    load_lora(pipeline.transformer, folder / "lora")
    after = pipeline("a red circle", seed=0, num_inference_steps=2, progress=False).frames[0]
    assert (before != after).any()


def test_only_temporal_blocks_train(tmp_path: Path) -> None:
    fixed = {"type": "t5", "from_pretrained": "tiny"}
    model = {"type": "STDiT3", "from_pretrained": "tiny", "only_train_temporal": True}
    folder = run(tmp_path, model=model, text_encoder=fixed, max_steps=2)
    old = OpenSoraPipeline.from_pretrained("tiny", device="cpu").transformer.state_dict()
    new = {k[len("model.transformer.") :]: v for k, v in newest(folder).items() if "model." in k}
    changed = {name for name, value in new.items() if not torch.equal(value, old[name].float())}
    assert changed
    assert all(name.startswith("temporal_blocks.") for name in changed)


@pytest.mark.parametrize("grown", [{}, {"grow": {"num_layers": 3, "num_heads": 5}}])
def test_a_named_text_encoder_trains_if_it_is_to(tmp_path: Path, grown: dict[str, Any]) -> None:
    text = {"type": "t5", "from_pretrained": "tiny", "train": True, **grown}
    model = {"type": "STDiT3", "from_pretrained": "tiny"}
    folder = run(tmp_path, model=model, text_encoder=text, max_steps=2, lr=1e-4)
    old = OpenSoraPipeline.from_pretrained("tiny", device="cpu").text_encoder.model.state_dict()
    new = {k: v for k, v in newest(folder).items() if k.startswith("model.text_encoder.")}
    new = {name[len("model.text_encoder.") :]: value for name, value in new.items()}
    assert old.keys() - new.keys() <= {"encoder.embed_tokens.weight"}
    for name in old.keys() & new.keys():
        known = new[name][tuple(slice(0, size) for size in old[name].shape)]
        assert not torch.equal(known, old[name].float()), name
        torch.testing.assert_close(known, old[name].float(), atol=1e-3, rtol=1e-3)
    assert bool(new.keys() - old.keys()) == bool(grown)
    export_weights(folder, tmp_path / "whole", pipeline="tiny", ema=False)
    whole = OpenSoraPipeline.from_pretrained(tmp_path / "whole", device="cpu").text_encoder.model
    for name, value in whole.state_dict().items():
        assert torch.equal(value, new.get(name, new["shared.weight"])), name
    again = run(tmp_path, model=model, text_encoder=text, max_steps=3, lr=1e-4, load="latest")
    assert again == folder


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"grow": {"num_layers": 1, "num_heads": 8}, "train": True}, "only become more"),
        ({"grow": {"num_layers": 3, "num_heads": 8}}, "train=True"),
        ({"grow": 3, "train": True}, "give dict"),
    ],
)
def test_growth_that_cannot_be_is_refused(
    tmp_path: Path, section: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        run(tmp_path, text_encoder={"type": "t5", "from_pretrained": "tiny", **section})


def test_the_end_of_the_data_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = {"every": 4, "samples": 1, "timesteps": 1}
    folder = run(tmp_path, epochs=1, max_steps=99, validation=section)
    steps = len(losses(folder))
    assert f"the data ends after about {steps} of 99 steps" in capsys.readouterr().out
    found = [x["step"] for x in read_metrics(folder / "metrics.jsonl") if "validation_loss" in x]
    assert found[-1] == steps
    run(tmp_path, load="latest", epochs=1, max_steps=steps)
    assert f"all {steps} steps are taken" in capsys.readouterr().out


def test_a_key_of_the_model_goes_over_its_config_json(tmp_path: Path) -> None:
    fixed = {"type": "t5", "from_pretrained": "tiny"}
    model = {"type": "STDiT3", "from_pretrained": "tiny", "class_dropout_prob": 0.5}
    folder = run(tmp_path, model=model, text_encoder=fixed, max_steps=1)
    stored = json.loads((folder / "transformer/config.json").read_text("utf-8"))
    assert stored["class_dropout_prob"] == 0.5
    assert stored["hidden_size"] == 128


def test_a_dry_run_tries_every_bucket_and_saves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, dry_run=True)
    printed = capsys.readouterr().out
    assert "17x64x64" in printed
    assert "1x64x64" in printed
    assert "every bucket fits" in printed
    assert not list(tmp_path.glob("*-STDiT3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket_config": {"64p": {17: (1.0, 99)}}}, "0 steps"),
        ({"load": "latest"}, "holds no run"),
        ({"lora": {"rnak": 4}}, "did you mean rank"),
        ({"optimizer": {"name": "adam"}}, "unknown"),
        ({"validation": {"evry": 4}}, "did you mean every"),
        ({"mask_ratios": {"image_head": 1.5}}, "image_head"),
        ({"model": {**(CONFIG.model or {}), "in_channels": 8}}, "latent channels"),
    ],
)
def test_settings_that_do_not_fit_are_told(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path, **changes)
