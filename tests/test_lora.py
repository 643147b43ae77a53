"""Low-rank updates: they start without effect, train alone, travel in PEFT's files, and merge."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora.errors import UsageError, WeightsError
from opensora.lora import (
    TARGETS,
    LoraBlend,
    LoraLinear,
    add_lora,
    load_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
)
from opensora.lora_files import parse_lora, read_lora
from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.pipeline import OpenSoraPipeline

ROOT = Path(__file__).parents[1]
CONFIG = {
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "caption_channels": 24,
    "model_max_length": 8,
    "class_dropout_prob": 0.0,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(seed: int = 0) -> STDiT3:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = STDiT3(STDiT3Config.from_dict(CONFIG)).eval()
        for weight in model.parameters():
            if not weight.any():  # temporal branches and biases start at zero
                nn.init.normal_(weight, std=0.2)
        return model


def inputs(batch: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(batch, 4, 3, 4, 6, generator=g),
        "timestep": torch.full((batch,), 300.0),
        "y": torch.randn(batch, 1, 8, 24, generator=g),
        "fps": torch.full((batch,), 24.0),
        "height": torch.full((batch,), 32.0),
        "width": torch.full((batch,), 48.0),
    }


def stir(model: nn.Module, seed: int = 2) -> None:
    """Give every B a value, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.weight.copy_(torch.randn(layer.lora_B.weight.shape, generator=g) * 0.1)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(**inputs())


def by_hand(model: STDiT3, file: Path, weight: float = 1.0) -> STDiT3:
    """Add alpha / rank * B A to the weights with nothing but the tensors of a file."""
    tensors = load_file(file)
    config = json.loads((file.parent / "adapter_config.json").read_text())
    for name, value in model.state_dict().items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in tensors:
            a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            value += weight * config["lora_alpha"] / config["r"] * (b.double() @ a.double())
    return model


def test_begins_without_effect_and_trains_alone() -> None:
    model = build()
    before, state = output(model), {k: v.clone() for k, v in model.state_dict().items()}
    names = add_lora(model, rank=3, alpha=6)
    assert len(names) == 2 * len(TARGETS)
    assert all(name.endswith(TARGETS) for name in names)
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():  # the same layers in the same order: then it is bit for bit
        plain = build()(**inputs())
        assert torch.equal(model(**inputs()), plain)
    stir(model)
    model(**inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert (parameter.grad is not None) == (".lora_" in name), name
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    torch.rand(1)
    add_lora(again := build(), rank=3)  # whatever was drawn before, as on another rank
    begun = again.state_dict()["temporal_blocks.0.mlp.fc2.lora_A.weight"]
    assert 0.5 / 128**0.5 < begun.abs().max() <= 1 / 128**0.5
    add_lora(once_more := build(), rank=3)
    assert torch.equal(begun, once_more.state_dict()["temporal_blocks.0.mlp.fc2.lora_A.weight"])
    assert after.keys() - state.keys() == {f"{n}.lora_{h}.weight" for n in names for h in "AB"}


def test_layer_and_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(6, 5).double(), rank=2, scaling=1.5)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)

    def formula(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ (layer.weight + 1.5 * b @ a).T + layer.bias

    a, b = layer.lora_A.weight, layer.lora_B.weight
    torch.testing.assert_close(layer(x), formula(x, a, b))
    gelu = nn.functional.gelu(formula(x, a, b), approximate="tanh")
    torch.testing.assert_close(layer(x, gelu=True), gelu)
    upstream = torch.randn(4, 5, dtype=torch.double)
    ours = torch.autograd.grad(layer(x), (x, a, b), upstream)
    theirs = torch.autograd.grad(formula(x, a, b), (x, a, b), upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_acts_in_training_alone() -> None:
    model = build()
    add_lora(model, rank=2, dropout=0.5)
    stir(model)
    assert torch.equal(output(model), output(model))
    model.train()
    assert not torch.equal(output(model), output(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_output_and_can_be_undone(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    add_lora(model, rank=4, alpha=2)
    stir(model)
    apart, weights = output(model), {k: v.clone() for k, v in model.state_dict().items()}
    merge_lora(model)
    merge_lora(model)  # a second time changes nothing
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(output(model), apart, rtol=tolerance, atol=tolerance)
    name = "spatial_blocks.0.attn.qkv.weight"
    assert not torch.equal(model.state_dict()[name], weights[name])
    merged = output(model)
    unmerge_lora(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(output(model), apart)
    merge_lora(model)
    remove_lora(model)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert model.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(output(model), merged)


def test_files_have_peft_names_and_come_back(tmp_path: Path) -> None:
    model = build()
    names = add_lora(model, rank=3, alpha=12, targets=["attn.qkv", "mlp.fc1"])
    stir(model)
    save_lora(model, tmp_path / "style", metadata={"trigger": "in clay"})
    file = tmp_path / "style/adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["trigger"] == "in clay"
        assert set(opened.keys()) == {
            f"base_model.model.{name}.lora_{half}.weight" for name in names for half in "AB"
        }
        assert opened.get_slice(
            "base_model.model.spatial_blocks.0.mlp.fc1.lora_A.weight"
        ).get_shape() == [3, 32]
    config = json.loads((tmp_path / "style/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 12)
    assert config["target_modules"] == names
    again = build()
    assert load_lora(again, tmp_path / "style") == names
    assert torch.equal(output(again), output(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{half}.weight" for name in names for half in "AB"
    }
    torch.testing.assert_close(output(by_hand(build(), file)), output(model), rtol=1e-4, atol=1e-4)
    save_lora(model, tmp_path / "alone.safetensors")  # the header says alpha where no file does
    assert [p.name for p in tmp_path.glob("*.json")] == []
    alone = build()
    load_lora(alone, tmp_path / "alone.safetensors")
    assert torch.equal(output(alone), output(model))


def test_names_of_other_programs_are_read(tmp_path: Path) -> None:
    model = build()
    add_lora(model, rank=4, alpha=2, targets="temporal_blocks.*(q_linear|fc2)")
    stir(model)
    kohya, diffusers, old = {}, {}, {}
    for name, layer in lora_layers(model):
        a, b = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
        flat = "lora_unet_" + name.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        kohya[f"{flat}.alpha"] = torch.tensor(2.0)
        diffusers |= {
            f"transformer.{name}.lora_A.weight": a,
            f"transformer.{name}.lora_B.weight": b,
        }
        scaled = b * 0.5  # no word about alpha: alpha = rank
        old |= {f"{name}.lora.down.weight": a, f"{name}.lora.up.weight": scaled}
    header = {
        "lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(diffusers, tmp_path / "diffusers.safetensors", header)
    save_file(old, tmp_path / "old.safetensors")
    for name in ("kohya", "diffusers", "old"):
        other = build()
        LoraBlend(other).add(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(output(other), output(model), rtol=1e-4, atol=1e-4)


def test_several_are_summed_with_weights_and_taken_off(tmp_path: Path) -> None:
    for seed in (1, 2):
        model = build()
        add_lora(model, rank=seed + 1, alpha=4, targets=TARGETS[seed:])
        stir(model, seed)
        save_lora(model, tmp_path / str(seed))
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in "12")
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blend = LoraBlend(model)
    blend.add(first, 0.7)
    blend.add(second, -0.4)
    expected = by_hand(by_hand(build(), first, 0.7), second, -0.4)
    torch.testing.assert_close(output(model), output(expected), rtol=1e-4, atol=1e-4)
    other = build()
    turned = LoraBlend(other)
    turned.add(second, -0.4)
    turned.add(first, 0.7)
    torch.testing.assert_close(output(other), output(model), rtol=1e-5, atol=1e-5)
    blend.clear()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_of_another_model_are_refused_with_a_list(tmp_path: Path) -> None:
    wide = STDiT3(STDiT3Config.from_dict(CONFIG | {"hidden_size": 64, "depth": 2}))
    add_lora(wide, rank=2, targets=["mlp.fc1"])
    save_lora(wide, tmp_path / "wide")
    with pytest.raises(WeightsError) as refusal:
        LoraBlend(build()).add(tmp_path / "wide")
    assert "spatial_blocks.1.mlp.fc1, temporal_blocks.1.mlp.fc1" in str(refusal.value)
    assert "spatial_blocks.0.mlp.fc1 is [256, 64], the model's [128, 32]" in str(refusal.value)
    good = {
        "base_model.model.spatial_blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 32),
        "base_model.model.spatial_blocks.0.attn.qkv.lora_B.weight": torch.ones(96, 2),
    }
    a, b = good
    bad: dict[str, dict[str, Tensor]] = {
        "only one of its two": {a: good[a]},
        "expected \\[rank, in\\]": {**good, b: torch.ones(96, 3)},
        "NaN or infinity": {**good, b: torch.full((96, 2), math.nan)},
        "no LoRA matrices": {**good, a.replace("lora_A.weight", "bias"): torch.ones(96)},
    }
    for message, tensors in bad.items():
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(WeightsError, match=message):
            read_lora(tmp_path / "bad.safetensors")
    for change in ({"use_dora": True}, {"peft_type": "LOHA"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(change))
        save_file(good, tmp_path / "bad.safetensors")
        with pytest.raises(WeightsError, match="not plain LoRA"):
            read_lora(tmp_path / "bad.safetensors")


def test_wrong_settings_are_refused() -> None:
    model = build()
    for arguments, message in (
        ({"rank": 0}, "rank must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"targets": ["attn.qvk"]}, "'attn.qvk'; its linears are"),
        ({"targets": "nothing.*"}, "no linear has a name"),
        ({"targets": "("}, "no regular expression"),
        ({"targets": []}, "empty list"),
    ):
        with pytest.raises(UsageError, match=message):
            add_lora(model, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no updates"):
        merge_lora(model)
    add_lora(model, targets="all-linear")
    with pytest.raises(UsageError, match="has updates already"):
        add_lora(model)


def test_compiled_and_recomputed_blocks_give_the_same_gradients() -> None:
    def gradients(change: Any) -> list[Tensor]:
        model = build().train()
        add_lora(model, rank=2, targets=["attn.qkv", "mlp.fc1"])
        stir(model)
        change(model)
        model(**inputs()).square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    def compile_block(model: STDiT3) -> None:
        torch.compiler.reset()
        model.blocks()[1].compile(backend="aot_eager", fullgraph=True)

    def recompute(model: STDiT3) -> None:
        model.checkpoint_blocks = True

    plain = gradients(lambda model: None)
    assert len(plain) == 8
    for change in (compile_block, recompute):
        for one, other in zip(plain, gradients(change), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def train_sharded(rank: int, folder: Path) -> None:
    """Compare a sharded step with a whole one; one of two processes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        mesh = init_device_mesh("cpu", (2,))
        plain = build().train()
        add_lora(plain, rank=2)
        stir(plain)
        plain(**inputs()).square().mean().backward()
        whole = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
        sharded = build().train()
        add_lora(sharded, rank=2)
        for block in sharded.blocks():  # what the model reads of a block stays with the root
            for part in (block.attn, block.cross_attn, block.mlp):
                fully_shard(part, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        save_lora(plain, folder / "plain")
        dist.barrier()
        load_lora(sharded, folder / "plain")
        sharded(**inputs()).square().mean().backward()
        for name, parameter in sharded.named_parameters():
            assert isinstance(parameter, DTensor)
            if parameter.requires_grad:
                grad = parameter.grad.full_tensor()
                torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-6)
        save_lora(sharded, folder / "sharded")
        with pytest.raises(UsageError, match="sharded"):
            merge_lora(sharded)
        dist.barrier()
    finally:
        dist.destroy_process_group()


RANK_ONE = """
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_lora
test_lora.train_sharded(1, Path(sys.argv[2]))
"""


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_shards_train_and_save_as_one_process_does(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", RANK_ONE, str(Path(__file__).parent), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        train_sharded(0, tmp_path)
        said = other.communicate(timeout=60)[1]
    finally:
        other.kill()
    assert other.returncode == 0, said
    one = load_file(tmp_path / "plain/adapter_model.safetensors")
    two = load_file(tmp_path / "sharded/adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_pipeline_and_program_take_them(
    pipe: OpenSoraPipeline, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opensora.checkpoint import weights_digest
    from opensora.media import read_metadata
    from opensora.sample import main

    call: dict[str, Any] = {"seed": 3, "output_type": "latent", "progress": False}
    before = pipe("a ball", **call).frames
    model = pipe.transformer
    add_lora(model, rank=2, alpha=8)
    stir(model)
    save_lora(model, tmp_path / "style")
    remove_lora(model)
    pipe.load_lora_weights(tmp_path / "style", 0.5)
    file = tmp_path / "style/adapter_model.safetensors"
    assert pipe.sources["lora 1"] == str(file)
    changed = pipe("a ball", **call).frames
    assert (changed - before).abs().max() > 1e-2
    pipe.unload_lora_weights()
    assert pipe.sources == {}
    assert torch.equal(pipe("a ball", **call).frames, before)

    monkeypatch.chdir(tmp_path)
    common = ["--ckpt-path", str(pipeline_folder), "--prompt", "a ball", "--num-frames", "1", "-q"]
    for name, more in (("0", []), ("1", ["--lora", "style:0.5"]), ("2", ["--lora", "style:0.0"])):
        assert main([*common, *more, "-o", name]) == 0
    clips = [Path(n, "sample_0000.png").read_bytes() for n in "012"]
    recipe = read_metadata("1/sample_0000.png")
    assert recipe["weights"]["lora 1"]["digest"] == weights_digest(file)
    assert recipe["settings"]["lora"] == ["style:0.5"]
    pixels = [read_pixels(n) for n in "012"]
    assert clips[0] != clips[1]
    assert (pixels[0] == pixels[2]).all()
    assert (pixels[0] != pixels[1]).any()
    assert main([*common, "--lora", "nowhere:0.5", "-o", "3"]) == 2


def read_pixels(folder: str) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(Path(folder, "sample_0000.png")))


def test_weights_after_a_colon(tmp_path: Path) -> None:
    for name in ("a", "b:2"):
        (tmp_path / name).mkdir()
    assert parse_lora(f"{tmp_path}/a") == (tmp_path / "a", 1.0)
    assert parse_lora(f"{tmp_path}/a:-0.25") == (tmp_path / "a", -0.25)
    assert parse_lora(f"{tmp_path}/b:2") == (tmp_path / "b:2", 1.0)
    assert parse_lora(f"{tmp_path}/b:2:0.5") == (tmp_path / "b:2", 0.5)
    with pytest.raises(UsageError, match="finite"):
        parse_lora(f"{tmp_path}/a:nan")


def test_peft_reads_and_writes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the checkout among the paths, our kernels/ would hide the package of that name.
    outside = [path for path in sys.path if Path(path).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", outside)
    peft = importlib.import_module("peft")
    model = build()
    names = add_lora(model, rank=3, alpha=12)
    stir(model)
    save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    merged = theirs.merge_and_unload().state_dict()
    merge_lora(model)
    for name in names:
        torch.testing.assert_close(
            merged[f"{name}.weight"], model.state_dict()[f"{name}.weight"], rtol=1e-5, atol=1e-6
        )
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn.qkv", "mlp.fc2"])
    made = peft.get_peft_model(build(), config)
    for name, value in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    made.save_pretrained(tmp_path / "theirs")
    ours = build()
    assert len(load_lora(ours, tmp_path / "theirs")) == 4
    expected = made.base_model.model
    for name, layer in lora_layers(ours):
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), expected.get_submodule(name)(x))
