"""Check STDiT3 against runs recorded from Open-Sora 1.2, and against its published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from opensora import testing
from opensora.errors import UsageError
from opensora.models.stdit import PRESETS, STDiT3, STDiT3Config, build_stdit
from opensora.models.stdit.block import STDiT3Block
from opensora.models.stdit.reuse import Reuse
from opensora.nn import PatchEmbed3D

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("stdit3_*.safetensors"))
TINY = STDiT3Config(
    hidden_size=16, depth=2, num_heads=2, mlp_ratio=2.0, caption_channels=8, model_max_length=5
)


def relative_error(x: Tensor, y: Tensor) -> float:
    """Return the largest error over the largest value."""
    return ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()


class Golden:
    """Hold one recorded run and the model that it was recorded from."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config = STDiT3Config.from_dict(json.loads(file.metadata()["config"]))
        self.model = STDiT3(config).eval()
        self.model.load_state_dict(self.part("sd."), strict=True)
        self.inputs = self.part("in.")
        self.loss_weight = self.inputs.pop("loss_w", None)
        self.wanted = self.part("out.")

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}


def noisy_model(config: STDiT3Config = TINY) -> STDiT3:
    """Return a model in which no branch is zero."""
    torch.manual_seed(0)
    model = STDiT3(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("norm.weight"):
                parameter.normal_(std=0.3)
    return model


def inputs(batch: int = 2, frames: int = 3, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    given = {
        "x": torch.randn(batch, 4, frames, 4, 6),
        "timestep": torch.linspace(300, 900, batch),
        "y": torch.randn(batch, 1, 5, 8),
        "fps": torch.tensor([8.0]),
        "height": torch.tensor([32.0]),
        "width": torch.tensor([48.0]),
    }
    return given | changes


def as_recorded(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor:
    """Return a submodule's output as the original has it: no positions, no norm of the next."""
    if isinstance(module, PatchEmbed3D):
        return module.forward(inputs[0])
    return output[0] if isinstance(module, STDiT3Block) else output


def test_all_kinds_of_recorded_runs_are_here() -> None:
    kinds = "cfg_mask grad image long nosigma_noqk pad skip_y textmask xmask"
    assert [f"stdit3_{kind}" for kind in kinds.split()] == CASES


@pytest.mark.parametrize("case", CASES)
def test_forward_matches_recorded(case: str) -> None:
    golden = Golden(case)
    found: dict[str, Tensor] = {}
    for name, module in golden.model.named_modules():
        if f"mid.{name}" in golden.wanted:
            module.register_forward_hook(
                lambda m, i, out, n=name: found.update({f"mid.{n}": as_recorded(m, i, out)})
            )
    with torch.no_grad():
        found["x"] = golden.model(**golden.inputs)
    assert found["x"].dtype == torch.float32
    assert found.keys() == golden.wanted.keys() - {"loss"}
    for name, value in found.items():
        assert value.shape == golden.wanted[name].shape
        assert relative_error(value, golden.wanted[name]) < 2e-5, name


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_matches_recorded(recompute: bool) -> None:
    golden = Golden("stdit3_grad")
    model, given, wanted = golden.model, golden.inputs, golden.part("grad.")
    for block in model.blocks():
        block.recompute = recompute
    given["x"].requires_grad_()
    given["y"].requires_grad_()
    loss = (model(**given) * golden.loss_weight).sum()
    assert abs(loss.item() - golden.wanted["loss"].item()) < 2e-5 * abs(golden.wanted["loss"])
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found |= {"@in.x": given["x"].grad, "@in.y": given["y"].grad}
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert grad is not None
        assert relative_error(grad, wanted[name]) < 2e-5, name


def test_backward_with_checkpoints_through_the_interpreted_kernels() -> None:
    testing.run_interpreted(__file__, "test_backward_matches_recorded and True")


def test_bfloat16_costs_no_more_than_its_rounding_steps() -> None:
    """Compare with float32 on the same rounded weights and inputs.

    Against the recorded float32 run, rounded timesteps and sizes (966.7 -> 968) would hide it.
    """
    golden = Golden("stdit3_xmask")
    rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in golden.inputs.items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in rounded.items()}
    with torch.no_grad():
        out = golden.model.bfloat16()(**rounded)
        wanted = golden.model.float()(**wide)
    assert out.dtype == torch.float32
    # 4 blocks of ~10 roundings by at most 2 ** -9, which add up at random
    assert (out - wanted).norm() / wanted.norm() < (4 * 10) ** 0.5 * 2**-9


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_names_shapes_and_counts_equal_the_published(name: str) -> None:
    published = json.loads((GOLDEN / "keys_stdit3.json").read_text())[name]
    shapes = {}
    for key, shape in published["shapes"].items():
        kinds = ("spatial_", "temporal_") if key.startswith("blocks.{i}.") else ("",)
        for kind in kinds:
            for i in range(published["depth"] if kind else 1):
                shapes[kind + key.replace("{i}", str(i))] = shape
    assert len(shapes) == published["n_tensors"] == 973
    with torch.device("meta"):
        model = build_stdit(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == published["params"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == published["trainable"]


def test_frames_start_as_independent_images() -> None:
    """Temporal blocks begin without effect: a video is its frames, one by one."""
    torch.manual_seed(0)
    model = STDiT3(TINY).eval()
    given = inputs()
    with torch.no_grad():
        video = model(**given)
        frames = [model(**{**given, "x": frame}) for frame in given["x"].split(1, dim=2)]
    torch.testing.assert_close(video, torch.cat(frames, dim=2))
    assert video.abs().max() > 0.1


def test_frame_mask_of_only_denoised_frames_changes_nothing() -> None:
    model, given = noisy_model(), inputs()
    with torch.no_grad():
        plain = model(**given)
        same = model(**given, x_mask=torch.ones(2, 3, dtype=torch.bool))
        other = model(**given, x_mask=torch.tensor([[True, True, False], [True] * 3]))
    torch.testing.assert_close(plain, same)
    assert not torch.allclose(plain[0], other[0])
    torch.testing.assert_close(plain[1], other[1])


@pytest.mark.parametrize("grad", [False, True])
def test_hidden_text_changes_nothing(grad: bool) -> None:
    model, given = noisy_model(), inputs()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]])  # not only leading tokens
    changed = given["y"].clone()
    changed[:, 0][mask == 0] = 7.0
    with torch.set_grad_enabled(grad):
        a, b = model(**given, mask=mask), model(**{**given, "y": changed}, mask=mask)
        assert not torch.allclose(a, model(**given))
    torch.testing.assert_close(a, b)


def test_text_mask_of_one_batch_serves_both_halves_of_guidance() -> None:
    model, given = noisy_model(), inputs(batch=4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(**given, mask=mask), model(**given, mask=mask.repeat(2, 1))
        )


def test_a_model_that_is_unfrozen_whole_still_trains() -> None:
    model = STDiT3(TINY).train().requires_grad_(True)
    model(**inputs()).square().mean().backward()
    assert model.rope.freqs.grad is None
    assert model.x_embedder.proj.weight.grad is not None


def test_training_drops_captions() -> None:
    config = STDiT3Config.from_dict(TINY.to_dict() | {"class_dropout_prob": 1.0})
    model, given = noisy_model(config), inputs()
    null = model.y_embedder.y_embedding.expand(2, 1, -1, -1)
    with torch.no_grad():
        wanted = model(**{**given, "y": null})
        forced = model(**given, force_drop_ids=torch.ones(2))
        dropped = model.train()(**given)
    torch.testing.assert_close(forced, wanted)
    torch.testing.assert_close(dropped, wanted)


def test_drop_path_skips_branches_in_training_and_keeps_their_mean() -> None:
    block = noisy_model(STDiT3Config.from_dict(TINY.to_dict() | {"drop_path": 0.5})).spatial_blocks
    assert [b.drop_path for b in block] == [0.0, 0.5]
    torch.manual_seed(0)
    branch = torch.ones(1000, 1, 1)
    assert torch.equal(block[1]._dropped(branch), branch)
    dropped = block[1].train()._dropped(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert 0.9 < dropped.mean() < 1.1


def test_blocks_compile_to_one_graph_each() -> None:
    model, given = noisy_model(), inputs(x_mask=torch.tensor([[False, True, True]] * 2))
    given["mask"] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    wanted = model(**given)
    for block in model.blocks():
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(**given), wanted)


def test_the_whole_model_compiles_to_one_graph() -> None:
    model, given = noisy_model(), inputs(x_mask=torch.tensor([[False, True, True]] * 2))
    given["mask"] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        wanted = model(**given)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**given), wanted)
        with model.reusing(given["timestep"][None]):
            torch.testing.assert_close(compiled(**given), wanted)


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    model, given = noisy_model(), inputs()
    seen = []
    for block in model.blocks():
        block.register_forward_hook(lambda _m, i, out: seen.append((i[0].dtype, out[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = model(**given)
    assert seen == [(torch.float32, torch.float32)] * 4
    with torch.no_grad():
        wanted = model(**given)
    assert (out - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None, "width": None}, r"missing fps, width"),
        ({"x": torch.zeros(2, 3, 3, 4, 6)}, r"latent \[B, 4, T, H, W\], got \[2, 3, 3, 4, 6\]"),
        ({"timestep": torch.zeros(3)}, r"timesteps \[2\], got \[3\]"),
        ({"y": torch.zeros(2, 5, 8)}, r"text \[2, 1, L, 8\], got \[2, 5, 8\]"),
        ({"mask": torch.ones(2, 4)}, r"text mask \[2, 5\].*got \[2, 4\]"),
        ({"x_mask": torch.ones(2, 3)}, r"bool \[2, 3\], got torch.float32 \[2, 3\]"),
        ({"x_mask": torch.ones(2, 2, dtype=torch.bool)}, r"bool \[2, 3\], got torch.bool \[2, 2\]"),
        ({"fps": torch.ones(3)}, r"3 rows cannot be tiled over a batch of 2"),
    ],
)
def test_rejects_bad_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        STDiT3(TINY)(**inputs(**changes))


def test_patches_of_several_frames_work_but_not_with_a_frame_mask() -> None:
    model = noisy_model(STDiT3Config.from_dict(TINY.to_dict() | {"patch_size": [2, 2, 2]}))
    with torch.no_grad():
        assert model(**inputs()).shape == (2, 8, 3, 4, 6)
    with pytest.raises(UsageError, match="a patch spans 2"):
        model(**inputs(x_mask=torch.ones(2, 3, dtype=torch.bool)))


def test_config_drops_execution_keys_and_names_unknown_ones() -> None:
    published = {
        "model_type": "STDiT3",
        "architectures": ["STDiT3"],
        "auto_map": {},
        "torch_dtype": "float32",
        "transformers_version": "4.38.2",
        "_name_or_path": "here",
        "enable_flash_attn": True,
        "enable_layernorm_kernel": True,
        "enable_sequence_parallelism": False,
        "only_train_temporal": False,
        "freeze_y_embedder": True,
        "input_size": [None, None, None],
        "patch_size": [1, 2, 2],
        "hidden_size": 1152,
    }
    assert STDiT3Config.from_dict(published) == STDiT3Config()
    assert STDiT3Config.from_dict(TINY.to_dict()) == TINY
    assert STDiT3Config.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(UsageError, match="unknown key 'hiden_size'; did you mean 'hidden_size'"):
        STDiT3Config.from_dict({"hiden_size": 4})
    with pytest.raises(UsageError, match="hidden_size 10"):
        STDiT3Config(hidden_size=10, num_heads=3)


def test_presets_take_changes_and_unknown_names_are_refused() -> None:
    with torch.device("meta"):
        model = build_stdit({"type": "STDiT3-XL/2", "depth": 1, "enable_flash_attn": True})
    assert model.config == STDiT3Config(depth=1)
    assert build_stdit(TINY).config == TINY
    with pytest.raises(UsageError, match=r"unknown model 'STDiT3-S/2'.*STDiT3-XL/2"):
        build_stdit("STDiT3-S/2")


def test_what_steps_share_is_computed_once_and_changes_nothing() -> None:
    model, given = noisy_model(), inputs(x_mask=torch.tensor([[False, True, True]] * 2))
    given["mask"] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    once = ["y_embedder", "pos_embed", "fps_embedder", "t_block", "t_embedder"]
    once += [f"{kind}_blocks.1.cross_attn.kv_linear" for kind in ("spatial", "temporal")]
    calls = dict.fromkeys(once, 0)
    for name in once:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, _o, n=name: calls.update({n: calls[n] + 1})
        )
    schedule = torch.tensor([[900.0, 900.0], [500.0, 400.0], [100.0, 50.0]])
    steps = [given | {"timestep": t} for t in schedule]
    with torch.no_grad():
        wanted = [model(**step) for step in steps]
        calls = dict.fromkeys(once, 0)
        with model.reusing(schedule):
            found = [model(**step) for step in steps]
    at_zero = {"t_block": 2, "t_embedder": 2, "fps_embedder": 2}
    assert calls == dict.fromkeys(once, 1) | at_zero
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_reuse_notices_other_conditions() -> None:
    model, given = noisy_model(), inputs()
    given["mask"] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    changes: list[dict[str, Any]] = [
        {"timestep": torch.tensor([10.0, 20.0])},
        {"y": torch.randn(2, 1, 5, 8)},
        {"mask": torch.tensor([[1, 0, 0, 0, 0]] * 2)},
        {"fps": torch.tensor([24.0])},
        {"height": torch.tensor([512.0])},
        {"x": torch.randn(2, 4, 5, 4, 8)},
        {"x": torch.randn(2, 4, 5, 8, 4)},
        {"x_mask": torch.tensor([[False, True, True]] * 2)},
    ]
    with torch.no_grad(), model.reusing(torch.tensor([[500.0, 500.0]])):
        for change in [{}, *changes]:
            model(**given)
            found = model(**given | change)
            with model.reusing():
                torch.testing.assert_close(found, model(**given | change), rtol=0, atol=0)
        before = model(**given)
        given["y"].mul_(2)  # the same tensor, written to
        assert not torch.equal(model(**given), before)
    with model.reusing():
        model(**given).sum().backward()  # with gradients nothing is kept
        model(**given).sum().backward()
    assert model.y_embedder.y_proj.fc1.weight.grad is not None


def test_a_timestep_is_found_only_in_its_schedule() -> None:
    schedule = torch.arange(12.0).view(6, 2)
    reuse = Reuse(schedule)
    assert [reuse.locate(t)[0] for t in schedule] == list(range(6))
    window = Reuse(schedule[2:4])
    assert window.locate(schedule[3])[0] == 1
    assert window.locate(schedule[3])[1] is window.schedule
    assert window.locate(schedule[4])[1] is not window.schedule
    for other in (schedule[1].clone(), schedule.flatten()[1:3], schedule[0].double()):
        step, times = reuse.locate(other)
        assert step == 0
        assert times.data_ptr() == other.data_ptr()
        assert times.shape == (1, 2)
