"""Check that weights of training runs, ours and upstream's, are exported and started from."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora.__main__ import main
from opensora.distributed.checkpoint import Checkpointer, Progress
from opensora.errors import UsageError, WeightsError
from opensora.export import export
from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.pipeline import OpenSoraPipeline
from opensora.training.ema import EMA
from opensora.weight_loading import load_weights

TINY = STDiT3Config(
    hidden_size=16, depth=2, num_heads=2, mlp_ratio=1.5, caption_channels=8, model_max_length=5
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def model() -> STDiT3:
    torch.manual_seed(0)
    return STDiT3(TINY).eval()


def other(config: STDiT3Config = TINY) -> STDiT3:
    torch.manual_seed(1)
    return STDiT3(config)


def moved(state: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: value + by for name, value in state.items()}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def save_run(folder: Path, modules: dict[str, nn.Module], step: int = 3) -> EMA:
    """Save a checkpoint whose averages are 1 above the weights."""
    ema = EMA(modules, 0.9)
    for value in ema.state.values():
        value += 1
    optimizer = torch.optim.AdamW([p for m in modules.values() for p in m.parameters()])
    with Checkpointer(folder) as saver:
        saver.save(Progress(global_step=step), modules, optimizer, ema)
    return ema


@pytest.fixture
def ours(model: STDiT3, tmp_path: Path) -> Path:
    save_run(tmp_path / "run", {"transformer": model})
    return tmp_path / "run"


def test_export_of_our_checkpoint_loads_for_inference(
    model: STDiT3, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(ours / "epoch0-global_step3"), str(tmp_path / "out")]) == 0
    assert "averaged weights of step 3" in capsys.readouterr().out
    loaded = STDiT3.from_pretrained(tmp_path / "out")
    assert loaded.config == TINY
    assert_state(loaded, moved(model.state_dict(), 1))
    assert main(["export", str(ours), str(tmp_path / "out"), "--no-ema", "--dtype", "bf16"]) == 0
    plain = STDiT3.from_pretrained(tmp_path / "out")
    assert_state(plain, {k: v.bfloat16() for k, v in model.state_dict().items()})


def test_averages_of_a_bfloat16_model_are_exported_as_bfloat16(
    model: STDiT3, tmp_path: Path
) -> None:
    save_run(tmp_path / "run", {"transformer": model.bfloat16()})
    export(tmp_path / "run", tmp_path / "out")
    assert STDiT3.from_pretrained(tmp_path / "out").t_block[1].weight.dtype == torch.bfloat16


def test_export_without_averages(model: STDiT3, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as saver:
        saver.save(Progress(), {"m": model}, torch.optim.AdamW(model.parameters()))
    assert not export(tmp_path / "run", tmp_path / "out").averaged
    assert_state(STDiT3.from_pretrained(tmp_path / "out"), model.state_dict())
    with pytest.raises(WeightsError, match="no averaged weights"):
        export(tmp_path / "run", tmp_path / "out", ema=True)


def test_what_only_training_needs_is_not_exported(model: STDiT3, tmp_path: Path) -> None:
    save_run(tmp_path / "run", {"transformer": model, "critic": nn.Linear(2, 2)})
    export(tmp_path / "run", tmp_path / "out", ema=False)
    assert_state(STDiT3.from_pretrained(tmp_path / "out"), model.state_dict())
    with pytest.raises(WeightsError, match=r"cannot export critic \(unknown\)"):
        export(tmp_path / "run", tmp_path / "c", part="critic")


def test_training_checkpoint_given_to_inference_says_to_export(ours: Path) -> None:
    with pytest.raises(WeightsError, match=r"opensora export .*epoch0-global_step3 OUT"):
        STDiT3.from_pretrained(ours / "epoch0-global_step3")


def test_run_of_several_parts_becomes_a_pipeline(pipeline_folder: Path, tmp_path: Path) -> None:
    pipe = OpenSoraPipeline.from_pretrained(str(pipeline_folder), dtype=torch.float32)
    modules = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder.model}
    save_run(tmp_path / "run", modules)
    with pytest.raises(UsageError, match="--pipeline"):
        export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out", pipeline=str(pipeline_folder))
    made = OpenSoraPipeline.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    assert_state(made.transformer, moved(pipe.transformer.state_dict(), 1))
    assert_state(made.vae, pipe.vae.state_dict())
    encoder = pipe.text_encoder.model.state_dict()
    assert_state(made.text_encoder.model, moved(encoder, 1))
    assert made.defaults == pipe.defaults

    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "m"), "--part", "transformer"]) == 0
    )
    assert_state(STDiT3.from_pretrained(tmp_path / "m"), made.transformer.state_dict())
    with pytest.raises(UsageError, match="has no part 'vae'; it has transformer, text_encoder"):
        export(tmp_path / "run", tmp_path / "n", part="vae")

    started = load_weights(pipe.transformer, tmp_path / "run", ema=True)
    assert started.averaged
    assert len(started.loaded) == len(pipe.transformer.state_dict())
    with pytest.raises(WeightsError, match="holds transformer, text_encoder; there is no 'vae'"):
        load_weights(pipe.vae, tmp_path / "run", part="vae")


def upstream(folder: Path, state: dict[str, Tensor], form: str) -> Path:
    """Write the layout of upstream's trainer: two shards with an index, averages, the rest."""
    (folder / "model").mkdir(parents=True)
    names = list(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        if form == "bin":
            file = f"pytorch_model-{number:05d}.bin"
            torch.save(OrderedDict((n, state[n]) for n in half), folder / "model" / file)
        else:
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({n: state[n].contiguous() for n in half}, folder / "model" / file)
        weight_map |= dict.fromkeys(half, file)
    index = "pytorch_model.bin.index.json" if form == "bin" else "model.safetensors.index.json"
    size = sum(value.nbytes for value in state.values())
    (folder / "model" / index).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    averages = {k: v + 1 for k, v in state.items() if "pos_embed" not in k and k != "rope.freqs"}
    torch.save(averages, folder / "ema.pt")
    states = {"epoch": 1, "step": 20, "global_step": 120, "batch_size": 2}
    (folder / "running_states.json").write_text(json.dumps(states))
    torch.save({"last_epoch": 120}, folder / "lr_scheduler")
    torch.save({"epoch": 1}, folder / "sampler")
    (folder / "optimizer").mkdir()
    torch.save({"state": {}}, folder / "optimizer/pytorch_optim-00001.bin")
    return folder


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("has_index", [True, False])
def test_upstream_checkpoint_is_exported_and_started_from(
    model: STDiT3, tmp_path: Path, form: str, has_index: bool
) -> None:
    state = model.state_dict()
    folder = upstream(tmp_path / "epoch1-global_step120", state, form)
    if not has_index:
        next((folder / "model").glob("*.index.json")).unlink()
    read = export(folder, tmp_path / "out")
    assert (read.step, read.averaged) == (120, True)
    expected = {k: v if k == "rope.freqs" else v + 1 for k, v in state.items()}
    loaded = STDiT3.from_pretrained(tmp_path / "out")
    assert_state(loaded, expected)
    assert loaded.config.depth == TINY.depth

    fresh = other()
    report = load_weights(fresh, folder)
    assert (report.step, report.averaged, report.missing) == (120, False, ())
    assert_state(fresh, state)
    load_weights(fresh, folder, ema=True)
    assert_state(fresh, expected)
    assert_state(STDiT3.from_pretrained(folder), state)


def test_incomplete_shards_are_refused(model: STDiT3, tmp_path: Path) -> None:
    folder = upstream(tmp_path / "run", model.state_dict(), "safetensors")
    (folder / "model/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="lacks 1 of 2 shards"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("place", ["ema.pt", "model/pytorch_model-00002.bin"])
def test_malicious_pickles_are_refused(
    model: STDiT3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = upstream(tmp_path / "run", model.state_dict(), "bin")
    for unread in ("lr_scheduler", "sampler", "optimizer/pytorch_optim-00001.bin"):
        (folder / unread).write_bytes(pickle.dumps(Bomb()))
    export(folder, tmp_path / "out")
    torch.save({"weight": Bomb()}, folder / place)
    fresh = other()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    for act in (
        lambda: export(folder, tmp_path / "out"),
        lambda: load_weights(fresh, folder, ema=True),
    ):
        with pytest.raises(WeightsError, match="can run code"):
            act()
    assert_state(fresh, before)
    assert not (tmp_path / "exploded").exists()


def write_pth(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": state}, path)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder", "ours"])
def test_training_starts_from_every_kind_of_source(
    model: STDiT3, ours: Path, tmp_path: Path, kind: str
) -> None:
    state = model.state_dict()
    source = tmp_path / f"weights.{kind}"
    if kind == "pth":
        write_pth(source, state)
    elif kind == "safetensors":
        save_file(state, source)
    elif kind == "folder":
        model.save_pretrained(source)
    else:
        source = ours
    fresh = other().train()
    report = load_weights(fresh, source)
    assert_state(fresh, state)
    assert fresh.training
    assert set(report.loaded) == set(state)
    assert report.missing == report.unexpected == report.wrong_shape == report.adapted == ()
    assert report.step == (3 if kind == "ours" else None)


def test_model_keeps_its_dtype(model: STDiT3, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    fresh = other().bfloat16()
    load_weights(fresh, tmp_path)
    assert_state(fresh, {k: v.bfloat16() for k, v in model.state_dict().items()})


def pixart(model: STDiT3, tokens: int) -> dict[str, Tensor]:
    """Make an image model's weights from those of a video model."""
    state = {
        name.replace("spatial_blocks.", "blocks."): value
        for name, value in model.state_dict().items()
        if not name.startswith(("temporal_blocks.", "fps_embedder.", "rope."))
    }
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    state["y_embedder.y_embedding"] = torch.arange(tokens * 8.0).view(tokens, 8)
    return state | {"pos_embed": torch.zeros(1, 4, 16), "pos_embed_temporal": torch.zeros(1, 2, 16)}


@pytest.mark.parametrize("tokens", [3, 5, 9])
def test_image_model_is_adapted(
    model: STDiT3, tmp_path: Path, tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    given = pixart(model, tokens)
    torch.save(given, tmp_path / "pixart.pth")
    fresh = other()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(WeightsError, match=r"these are of PixArt.*missing \(.*strict=False"):
        load_weights(fresh, tmp_path / "pixart.pth")
    assert_state(fresh, before)
    with caplog.at_level(logging.WARNING, "opensora"):
        report = load_weights(fresh, tmp_path / "pixart.pth", strict=False)
    assert "temporal_blocks.0" in caplog.text + str(report.missing)
    assert report.unexpected == report.wrong_shape == ()
    assert {name.split(".")[0] for name in report.missing} == {
        "temporal_blocks",
        "fps_embedder",
        "rope",
    }
    found = fresh.state_dict()
    for name in report.missing:
        assert torch.equal(found[name], before[name])
    name = "spatial_blocks.1.attn.qkv.weight"
    assert torch.equal(found[name], model.state_dict()[name])
    patches = "x_embedder.proj.weight"
    assert torch.equal(found[patches], model.state_dict()[patches])
    null = found["y_embedder.y_embedding"]
    assert torch.equal(null[: min(tokens, 5)], given["y_embedder.y_embedding"][:5])
    assert all(torch.equal(row, null[tokens - 1]) for row in null[tokens:])
    assert len(report.adapted) == (4 if tokens == 5 else 5)


def test_only_leading_blocks_are_renamed(model: STDiT3, tmp_path: Path) -> None:
    state = {f"m.{k}" if k.startswith("t_block") else k: v for k, v in model.state_dict().items()}
    state["m.blocks.0.x"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    report = load_weights(other(), tmp_path / "w.pth", strict=False)
    assert "m.blocks.0.x" in report.unexpected


def test_what_does_not_fit_is_listed(model: STDiT3, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    state["final_layer.linear.bias"] = torch.zeros(3)
    state["extra"] = torch.zeros(1)
    del state["t_block.1.bias"]
    torch.save(state, tmp_path / "w.pth")
    fresh = other()
    with pytest.raises(WeightsError) as raised:
        load_weights(fresh, tmp_path / "w.pth")
    for part in ("1 missing (t_block.1.bias)", "1 unexpected (extra)", "is [3], expected [32]"):
        assert part in str(raised.value)
    report = load_weights(fresh, tmp_path / "w.pth", strict=False)
    assert report.missing == ("t_block.1.bias",)
    assert report.unexpected == ("extra",)
    assert report.wrong_shape == ("final_layer.linear.bias",)


def test_nothing_fitting_is_an_error_even_without_strict(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="do not fit"):
        load_weights(other(), tmp_path / "w.pth", strict=False)


def test_damaged_shard_is_named(ours: Path, tmp_path: Path) -> None:
    shard = ours / "epoch0-global_step3/00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[8:40] = b"?" * 32
    shard.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is damaged: 00000\.safetensors"):
        export(ours, tmp_path / "out")


def test_values_that_are_no_numbers_are_refused(model: STDiT3, ours: Path, tmp_path: Path) -> None:
    shard = ours / "epoch0-global_step3/00000.safetensors"
    tensors = load_file(shard)
    tensors["model.transformer.t_block.1.bias"][3] = float("nan")
    save_file(tensors, shard)
    index = json.loads((shard.parent / "index.json").read_text())
    del index["crc32"]  # as if it had been trained so
    (shard.parent / "index.json").write_text(json.dumps(index))
    fresh = other()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    for act in (lambda: load_weights(fresh, ours), lambda: export(ours, tmp_path / "o", ema=False)):
        with pytest.raises(WeightsError, match=r"t_block\.1\.bias holds 1 NaN"):
            act()
    assert_state(fresh, before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments are required: CHECKPOINT, OUT"),
        (["a"], "arguments are required: OUT"),
        (["a", "b", "--emma"], "unrecognized arguments: --emma"),
        (["no-such-folder", "b"], "file not found: no-such-folder"),
    ],
)
def test_wrong_command_lines_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *words]) in (2, 3)
    assert message in capsys.readouterr().err


def test_help_shows_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "opensora export CHECKPOINT OUT" in shown
    assert "--no-ema" in shown
