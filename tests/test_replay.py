"""Check that replays find what differs, read every case from its own content, and never crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora.models.vae.discriminator import NLayerDiscriminator
from opensora.replay import Result, replay_file
from opensora.replay.kinds import find_kind
from opensora.replay.program import main
from opensora.replay.recording import Case

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(p for p in GOLDEN.iterdir() if p.suffix in (".json", ".safetensors"))
#: Recordings of classes that this release does not have, and lists of parameter names.
OTHERS = {"iddpm_sample_v11_mask", "keys_stdit3", "keys_vae"}


def opened(name: str) -> Case:
    return Case.load(GOLDEN / f"{name}.safetensors")


def saved(
    folder: Path, case: Case, changes: dict[str, Tensor | None] | None = None, **metadata: Any
) -> Path:
    """Write a case with some tensors replaced, added or (None) dropped, under a name of no help."""
    tensors = {**case.tensors, **(changes or {})}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    kept = {k: v for k, v in {**case.metadata, **texts}.items() if v != "null"}
    path = folder / "case.safetensors"
    save_file({k: v.clone() for k, v in tensors.items() if v is not None}, path, kept)
    return path


def rerecorded(
    folder: Path,
    case: Case,
    changes: dict[str, Tensor | None] | None = None,
    dtype: torch.dtype = torch.float32,
    **metadata: Any,
) -> Path:
    """Write a case of changed inputs whose outputs are this library's own."""
    metadata["dtype"] = str(dtype)
    changed = Case.load(saved(folder, case, changes, **metadata))
    with torch.set_grad_enabled(any(name.startswith("grad.") for name in case.tensors)):
        ours = find_kind(changed)[1].run(changed.seen_in(dtype))
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    outputs: dict[str, Tensor | None] = dict.fromkeys(changed.recorded())
    for name, tensor in ours.items():
        floating = tensor.is_floating_point()
        outputs[name] = tensor.detach().to(stored if floating else tensor.dtype).contiguous()
    return saved(folder, changed, outputs)


def written(folder: Path, content: Any) -> Path:
    path = folder / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recorded_case_passes(path: Path) -> None:
    result = replay_file(path)
    assert result.case == path.stem
    assert result.verdict == ("unsupported" if path.stem in OTHERS else "pass"), result.detail


@pytest.mark.parametrize(
    "name", ["stdit3_pad", "vae_temporal_default_ds", "rope", "rflow_sample_30_tt", "causal_conv"]
)
def test_names_and_order_do_not_matter(name: str, tmp_path: Path) -> None:
    before = replay_file(GOLDEN / f"{name}.safetensors")
    case = opened(name)
    turned = Case(
        dict(reversed([*case.metadata.items(), ("name", "something else"), ("set", "x")])),
        dict(reversed(case.tensors.items())),
    )
    after = replay_file(saved(tmp_path, turned))
    assert (after.verdict, after.error, after.detail) == ("pass", before.error, before.detail)


def nudge(tensor: Tensor, relative: float) -> Tensor:
    """Move the first value by a share of the largest one."""
    moved = tensor.clone()
    moved.view(-1)[0] += relative * tensor.abs().max()
    return moved


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("stdit3_image", "out.x"),
        ("stdit3_grad", "grad.t_embedder.mlp.0.bias"),
        ("stdit3_grad", "grad.@in.y"),
        ("stdit3_grad", "out.loss"),
        ("stdit3_xmask", "out.mid.t_block"),
        ("vae_temporal_default_ds", "out.kl17"),
        ("rflow_sample_10", "out.traj_model_in"),
        ("t2i_final_xmask", "out.y"),
        ("pos_embed_2d", "out.pe0"),
        ("timestep_transform", "out.bfloat16"),
        ("ema", "out.w"),
        ("nlayer_disc2d", "out.running_mean_after"),
        ("vae_losses", "out.adv_hinge"),
        ("vae_losses", "out.lecam_ema_real"),
        ("transforms", "out.ucf24_2"),
    ],
)
def test_small_error_in_any_output_fails(name: str, tensor: str, tmp_path: Path) -> None:
    case = opened(name)
    for relative, verdict in ((5e-6, "pass"), (4e-5, "fail"), (float("nan"), "fail")):
        result = replay_file(saved(tmp_path, case, {tensor: nudge(case.tensors[tensor], relative)}))
        assert result.verdict == verdict
    assert tensor in result.detail


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("stdit3_cfg_mask", "sd.temporal_blocks.0.attn.q_norm.weight"),
        ("stdit3_skip_y", "in.width"),
        ("vae_pipeline_cal_loss", "sd.temporal_vae.decoder.norm1.bias"),
        ("vae_pipeline_cal_loss", "in.noise_spatial9.0"),
        ("attn_qknorm_rope_legacy", "sd.k_norm.weight"),
        ("caption_embedder", "sd.y_embedding"),
        ("rflow_loss_mask", "in.noise"),
        ("ema", "in.model.w"),
        ("nlayer_disc3d", "sd.main.6.running_var"),
        ("vae_losses", "in.last_layer"),
        ("transforms", "in.clip2"),
    ],
)
def test_other_weight_or_input_fails(name: str, tensor: str, tmp_path: Path) -> None:
    case = opened(name)
    changed = case.tensors[tensor] * 1.01
    result = replay_file(saved(tmp_path, case, {tensor: changed}))
    assert result.verdict == "fail"
    assert result.error is not None
    assert result.tolerance is not None
    assert result.error > result.tolerance


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("stdit3_nosigma_noqk", {"config": {"input_sq_size": 512}}),
        ("rflow_sample_10", {"scheduler": {"cfg_scale": 4.1}}),
        ("vae_temporal_default_ds", {"latent_size": {"17": [4, 4, 4]}}),
        ("causal_conv", {"time_pads": [1, 2, 0, 4]}),
        ("rmsnorm", {"config": {"eps": 0.1}}),
        ("ema", {"decay": 0.98}),
        ("vae_losses", {"logvar_init": 0.1}),
        ("vae_losses", {"generator_factor": 0.4}),
    ],
)
def test_other_metadata_fails(name: str, metadata: dict[str, Any], tmp_path: Path) -> None:
    case = opened(name)
    merged = {
        key: {**case.config(key), **value} if isinstance(value, dict) else value
        for key, value in metadata.items()
    }
    assert replay_file(saved(tmp_path, case, **merged)).verdict == "fail"


@pytest.mark.parametrize(
    ("name", "changes", "metadata", "detail"),
    [
        ("stdit3_pad", {"out.mid.t_norm": torch.zeros(2)}, {}, "not compared: out.mid.t_norm"),
        ("rope", {"out.y_other": torch.zeros(2)}, {}, "not compared: out.y_other"),
        ("rflow_loss", {"in.weights": torch.ones(3)}, {}, "nothing used: weights"),
        ("stdit3_pad", {"out.x": None}, {}, "no out. or grad."),
        ("stdit3_pad", {"out.x": torch.zeros(2, 8)}, {}, "recorded [2, 8], ours [2, 8, 3, 7, 9]"),
        ("stdit3_pad", {"in.fps": None}, {}, "in.fps is missing"),
        ("stdit3_pad", {"sd.final_layer.linear.bias": None}, {}, "Error(s) in loading"),
        ("stdit3_pad", {"sd.extra": torch.zeros(1)}, {}, "Error(s) in loading"),
        ("stdit3_grad", {"in.loss_w": None}, {}, "gradients without in.loss_w"),
        ("stdit3_pad", {}, {"dtype": "torch.int3"}, "unknown dtype"),
        ("stdit3_pad", {}, {"config": "{"}, "not an object"),
        ("stdit3_pad", {}, {"config": {"hidden_size": 10, "num_heads": 3}}, "UsageError"),
        ("cross_attn_ragged", {}, {"kwargs": {"mask": [2, 3, 5]}}, "UsageError"),
        ("cross_attn_ragged", {}, {"kwargs": {"causal": True}}, "takes no causal"),
        ("rflow_t_sampling", {"out.cosine": torch.zeros(2)}, {}, "from 'cosine'"),
        ("vae_temporal", {"in.x1": None}, {}, "not compared"),
        ("ema", {}, {"decay": "null"}, "say the number decay"),
        ("ema", {"in.ema.w": torch.zeros(2)}, {}, "names and shapes"),
        ("nlayer_disc2d", {}, {"config": {"ndf": 4, "n_layers": 2}}, "Error(s) in loading"),
        ("vae_losses", {"out.disc_wasserstein": torch.zeros(())}, {}, "not compared"),
        ("vae_losses", {}, {"note": "no numbers"}, "say the number ema real"),
        ("transforms", {}, {"sizes_h_w_th_tw": [[48, 81, 32, 56]]}, "has not the size"),
    ],
)
def test_what_cannot_be_compared_fails_in_one_line(
    name: str, changes: Any, metadata: Any, detail: str, tmp_path: Path
) -> None:
    result = replay_file(saved(tmp_path, opened(name), changes, **metadata))
    assert result.verdict == "fail"
    assert detail in result.detail
    assert "\n" not in result.detail


@pytest.mark.parametrize(
    ("name", "metadata", "detail"),
    [
        ("stdit3_pad", {"cls": "opensora.models.stdit.stdit9.STDiT9"}, "no class STDiT9"),
        ("attn_qknorm_rope_legacy", {"cls": "blocks.KVCompressAttention"}, "KVCompressAttention"),
        ("rflow_sample_10", {"scheduler": {"type": "iddpm"}}, "no scheduler iddpm"),
        ("rflow_sample_10", {"scheduler": "null"}, "outputs: timesteps, traj_model_in, x_mask, z"),
        ("rflow_sample_30_tt", {"h_w_frames": [480, 854, 16]}, "2 to 16 frames"),
        ("nlayer_disc2d", {"config": {"use_actnorm": True}}, "use_actnorm"),
    ],
)
def test_unknown_class_or_kind_is_unsupported(
    name: str, metadata: Any, detail: str, tmp_path: Path
) -> None:
    result = replay_file(saved(tmp_path, opened(name), **metadata))
    assert (result.verdict, result.error) == ("unsupported", None)
    assert detail in result.detail


def test_damaged_files_fail_in_one_line(tmp_path: Path) -> None:
    whole = (GOLDEN / "rope.safetensors").read_bytes()
    for content in (b"", whole[:1000], whole[:-1], b"{" + whole):
        path = tmp_path / "rope.safetensors"
        path.write_bytes(content)
        result = replay_file(path)
        assert (result.verdict, "\n" in result.detail) == ("fail", False)
    for text in ("", "[1,", '{"a": ' * 100000):
        assert replay_file(written(tmp_path, text)).verdict == "fail"


# --- cases of other shapes, flags and precisions ----------------------------------------------

SMALL = {"hidden_size": 32, "num_heads": 4, "caption_channels": 6, "model_max_length": 5}


def other_stdit3(**config: Any) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Return weights and inputs of another STDiT3 with all its masks, and its config."""
    from opensora.models.stdit import STDiT3, STDiT3Config

    config = {**SMALL, "depth": 1, "mlp_ratio": 1.5, **config}
    torch.manual_seed(3)
    model = STDiT3(STDiT3Config.from_dict(config))
    changes: dict[str, Tensor | None] = {
        f"sd.{k}": v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()
    }
    changes["in.x"] = torch.randn(3, 4, 4, 5, 7)
    changes["in.timestep"] = torch.tensor([0.0, 413.7, 1000.0])
    changes["in.y"] = torch.randn(3, 1, 5, 6)
    changes["in.mask"] = torch.tensor([[1, 1, 0, 0, 1]])
    changes["in.fps"] = torch.tensor([24.0])
    changes["in.height"], changes["in.width"] = torch.tensor([480.0]), torch.tensor([854.0])
    return changes, config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        {"qk_norm": False, "num_heads": 2},
        {"patch_size": [2, 2, 2], "pred_sigma": False},
    ],
)
def test_stdit3_of_other_shapes_and_precisions(
    config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    changes, full = other_stdit3(**config)
    bare = Case({"cls": "x.STDiT3", "mode": "eval"}, {"out.x": torch.zeros(1)})
    full |= {"enable_flash_attn": True, "space_scale": 0.5}  # mean nothing to the original
    path = rerecorded(tmp_path, bare, changes, dtype, config=full)
    result = replay_file(path)
    assert result.verdict == "pass", result.detail
    assert "without effect: enable_flash_attn, space_scale" in result.detail
    case = Case.load(path)
    wrong = nudge(case.tensors["out.x"], 0.1)
    assert replay_file(saved(tmp_path, case, {"out.x": wrong})).verdict == "fail"


def test_gradients_of_another_model_in_bfloat16(tmp_path: Path) -> None:
    changes, full = other_stdit3(depth=2)
    changes["in.x_mask"] = torch.tensor([[True, False, True, True]] * 3)
    changes["in.loss_w"] = torch.randn(3, 8, 4, 5, 7)
    changes |= {"grad.@in.x": torch.zeros(1), "grad.rope": torch.zeros(1)}
    bare = Case({"cls": "STDiT3"}, {"out.x": torch.zeros(1)})
    path = rerecorded(tmp_path, bare, changes, torch.bfloat16, config=full)
    result = replay_file(path)
    assert result.verdict == "pass", result.detail
    assert len(Case.load(path).names("grad.")) > 80


@pytest.mark.parametrize("name", ["rmsnorm", "t2i_modulate_ln", "rope"])
def test_low_precision_is_judged_by_the_recordings_own_error(name: str, tmp_path: Path) -> None:
    case, tensor = opened(name), "out.y_bf16"
    tolerance = replay_file(GOLDEN / f"{name}.safetensors").tolerance
    assert tolerance is not None
    assert tolerance > 1e-2
    exact = case.tensors[tensor]
    for relative, verdict in ((0.004, "pass"), (0.1, "fail"), (float("nan"), "fail")):
        changed: dict[str, Tensor | None] = {tensor: nudge(exact, relative)}
        result = replay_file(saved(tmp_path, case, changed))
        assert result.verdict == verdict
    assert "out.y_bf16" in result.detail
    # float32 outputs would notice another input at once; without them bfloat16 must
    changed = {n: None for n in case.recorded() if n != tensor}
    changed |= {f"in.{n}": None for n in case.names("in.") if n == "long"}
    assert replay_file(saved(tmp_path, case, changed)).verdict == "pass"
    given = "in.q" if name == "rope" else "in.x"
    changed[given] = case.tensors[given].roll(1, -1)
    assert replay_file(saved(tmp_path, case, changed)).verdict == "fail"


@pytest.mark.parametrize(("cal_loss", "dtype"), [(False, torch.bfloat16), (True, torch.float64)])
def test_video_vae_of_other_lengths_batches_and_precisions(
    cal_loss: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = opened("vae_pipeline_cal_loss")
    x, noise = torch.randn(2, 3, 6, 16, 8), {}
    for i in range(4):
        noise[f"in.noise_spatial6.{i}"] = torch.randn(3, 4, 2, 1)
    for i, frames in enumerate((1, 1)):
        noise[f"in.noise_temporal6.{i}"] = torch.randn(2, 4, frames, 2, 1)
    dropped: dict[str, Tensor | None] = {
        name: None for name in case.tensors if name.startswith(("in.", "out."))
    }
    names = ("zero.x_rec", "noise.x_rec") if cal_loss else ("zero.rec", "noise.rec")
    outputs = {f"out.{name}6": torch.zeros(1) for name in names}
    changes = {**dropped, "in.x6": x, **noise, **outputs}
    path = rerecorded(
        tmp_path,
        case,
        changes,
        dtype,
        cal_loss=cal_loss,
        micro_frame_size=3,
        micro_batch_size=3,
        latent_size={"6": [2, 2, 1], "17": [6, 2, 1]},
    )
    result = replay_file(path)
    assert result.verdict == "pass", result.detail
    if dtype == torch.float64:
        assert result.tolerance == 1e-9
    if cal_loss:  # the original keeps the posterior of the last chunk alone
        mean = Case.load(path).tensors["out.zero.post_mean6"]
        result = replay_file(
            saved(tmp_path, Case.load(path), {"out.zero.post_mean6": mean[:, :, 1:]})
        )
        assert "last chunk" in result.detail
        assert result.verdict == "pass"


@pytest.mark.parametrize(
    "scheduler",
    [
        {"type": "rflow", "num_sampling_steps": 3, "cfg_scale": 1.0},
        {"type": "rflow", "num_sampling_steps": 7, "use_discrete_timesteps": True},
        {"type": "rflow", "num_sampling_steps": 4, "use_timestep_transform": True},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_samples_of_other_settings(scheduler: dict[str, Any], masked: bool, tmp_path: Path) -> None:
    steps = scheduler["num_sampling_steps"]
    changes: dict[str, Tensor | None] = {"in.z": torch.randn(3, 4, 2, 3, 5)}
    changes["in.y_cond"] = torch.randn(3, 1, 2, 6)
    changes["in.y_null"] = torch.randn(1, 1, 2, 6)
    if masked:
        changes["in.mask"] = torch.tensor([[0.0, 0.5], [1.0, 1.0], [0.8, 0.1]])
        changes["in.noise"] = torch.randn(steps, 3, 4, 2, 3, 5)
    case = opened("rflow_sample_30_tt")
    size = [720, 1280, 1]
    path = rerecorded(tmp_path, case, changes, scheduler=scheduler, h_w_frames=size, traj_steps=[1])
    assert replay_file(path).verdict == "pass"
    assert Case.load(path).tensors["out.timesteps"].shape == (steps, 6)
    assert Case.load(path).tensors["out.traj_model_in"].shape == (1, 3, 4, 2, 3, 5)


def test_layers_of_other_shapes_and_calls(tmp_path: Path) -> None:
    conv: dict[str, Tensor | None] = {
        name: None for name in opened("causal_conv").tensors if name.startswith(("sd.", "out."))
    }
    conv |= {"in.x": torch.randn(2, 2, 7, 5, 4), "out.a": torch.zeros(1), "out.b": torch.zeros(1)}
    conv |= {"sd.a.conv.weight": torch.randn(3, 2, 3, 1, 3), "sd.b.conv.bias": torch.randn(1)}
    conv["sd.b.conv.weight"] = torch.randn(1, 2, 2, 3, 3)
    note = "b: kernel (2,3,3), dilation 3 in time; a: strides (2, 1, 1), no bias"
    cases = [
        (opened("causal_conv"), conv, {"note": note, "time_pads": [3, 1]}, 2),
        (
            opened("pos_embed_2d"),
            {},
            {"config": {"dim": 8}, "calls": [{"h": 3, "w": 1, "scale": 0.3, "base_size": 2}] * 3},
            3,
        ),
        (
            opened("size_embedder"),
            {"in.s2": torch.tensor([[3.0, 1, 2]]), "out.y_bs4": torch.zeros(5, 144)},
            {},
            3,
        ),
        (opened("rope"), {"in.long": None, "in.other": torch.randn(1, 3, 72)}, {}, 3),
        (opened("attn_qknorm_rope_legacy"), {"in.x": torch.randn(1, 20, 144)}, {}, 1),
        (opened("t2i_final_xmask"), {"in.x_mask": torch.rand(3, 3) < 0.5}, {}, 1),
        (
            opened("cross_attn_ragged"),
            {"in.mask": torch.tensor([9, 0, 0])},
            {"args": ["x", "cond", "mask"], "kwargs": {}},
            1,
        ),
    ]
    for case, changes, metadata, count in cases:
        for name in case.tensors:
            if name.endswith("_bf16") or name in ("out.y_bs2", "out.pe4", "out.pe3"):
                changes[name] = None
        if "in.s2" in changes:
            changes["out.y_bs2"] = torch.zeros(1, 144)
        result = replay_file(rerecorded(tmp_path, case, changes, **metadata))
        assert result.verdict == "pass", result.detail
        assert f": {count} tensor" in result.detail


@pytest.mark.parametrize(("dims", "n_layers"), [(2, 1), (3, 3)])
def test_discriminators_of_other_sizes(dims: int, n_layers: int, tmp_path: Path) -> None:
    config = {"input_nc": 2, "ndf": 3, "n_layers": n_layers}
    network = NLayerDiscriminator(dims, **config)
    frames = [] if dims == 2 else [11]
    changes: dict[str, Tensor | None] = {f"sd.{k}": v for k, v in network.state_dict().items()}
    changes["in.x"] = torch.randn(3, 2, *frames, 25, 31)
    changes |= {"out.running_var_after": torch.zeros(1), "out.train": torch.zeros(1)}
    bare = Case({}, {"out.eval": torch.zeros(1)})
    path = rerecorded(tmp_path, bare, changes, config=config)
    assert replay_file(path).detail == "discriminator: 5 tensors"
    assert replay_file(path).verdict == "pass"


def test_averages_of_other_modules(tmp_path: Path) -> None:
    names = {"a.weight": 0.9, "a.b.weight": 0.9, "a.pos_embed": 1, "frozen_c.d": 1, "a.buffer": 1}
    tensors = {}
    for name, decay in names.items():
        average, weight = torch.randn(4), torch.randn(4)
        tensors |= {f"in.ema.{name}": average, f"in.model.{name}": weight}
        tensors[f"out.{name}"] = decay * average + (1 - decay) * weight
    result = replay_file(saved(tmp_path, Case({}, tensors), decay=0.9))
    assert result.verdict == "pass", result.detail


def test_losses_of_other_numbers(tmp_path: Path) -> None:
    case = opened("vae_losses")
    real, fake = torch.randn(2, 3), torch.randn(2, 3)
    changes: dict[str, Tensor | None] = dict.fromkeys(case.tensors)
    changes |= {"in.real_logits": real, "in.fake_logits": fake}
    over, under = (real.mean() - 0.4).relu(), (-1.5 - fake.mean()).relu()
    changes["out.lecam_hinge"] = 0.3 * (over**2 + under**2)
    changes["out.lecam_vanilla"] = torch.zeros(())
    changes["out.disc_hinge"] = ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
    changes["out.lecam_ema_fake"] = torch.tensor(0.1 * -2.0)
    note = "ema real -1.5, ema fake .4, weight .3. LeCamEMA decay .9 with updates (1, -2)"
    result = replay_file(saved(tmp_path, case, changes, note=note))
    assert result.verdict == "pass", result.detail


def test_transforms_of_other_sizes(tmp_path: Path) -> None:
    changes: dict[str, Tensor | None] = dict.fromkeys(opened("transforms").tensors)
    changes["in.clip7"] = torch.arange(16.0).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    changes["in.img0"] = torch.full((6, 9, 3), 200, dtype=torch.uint8)
    halved = torch.tensor([[2.5, 4.5], [10.5, 12.5]]).expand(2, 3, 2, 2)  # means of 2 x 2 pixels
    changes |= {"out.resize_crop7": halved, "out.ucf2_7": halved}
    changes["out.pil_center2_0"] = torch.full((2, 2, 3), 200, dtype=torch.uint8)
    changes["out.pil_resize_crop0"] = torch.full((5, 4, 3), 200, dtype=torch.uint8)
    result = replay_file(saved(tmp_path, opened("transforms"), changes))
    assert result.verdict == "pass", result.detail
    assert "4 tensors" in result.detail
    changes["out.pil_resize_crop0"] = torch.full((5, 4, 3), 201, dtype=torch.uint8)
    result = replay_file(saved(tmp_path, opened("transforms"), changes))
    assert result.verdict == "fail"


# --- tables -----------------------------------------------------------------------------------


def decided(bucket: list[Any] | None, **changes: Any) -> dict[str, Any]:
    config = {"144p": {"17": [1.0, 3], "1": [[1.0, 1.0], 8]}, "256": {"17": [0.0, None]}}
    rows = [[40, 200, 200, 2, 5, bucket], [1, 100, 100, 1, 0, None]]
    places = {"256": {"17": 0}, "144p": {"17": 1, "1": 2}}
    content = {"config": config, "order": ["256", "144p"], "bucket_index": places, "rows": rows}
    return {**content, **changes}


def sized(chance: float, batch_size: int) -> list[dict[str, Any]]:
    return [{"id": ["240p", 51, "0.56"], "thw": [51, 240, 426], "prob": chance, "bs": batch_size}]


def ordered(batch: list[str], number: int = 2) -> list[dict[str, Any]]:
    """Two replicas, unshuffled; the third batch, of rows 1 and 5, has no other beside it."""
    table = [[1, 144, 256, 0], [1, 256, 144, 1], [1, 144, 256, 2], [1, 144, 256, 3]]
    table += [[1, 150, 256, 4], [1, 256, 144, 5]]
    config = {"144p": {"1": [1.0, 2]}}
    return [
        {
            "table": table,
            "config": config,
            "num_replicas": 2,
            "shuffle": False,
            "seed": 3,
            "batches": {"1": [batch]},
            "state_dict_step1": {"seed": 3, "epoch": 0, "last_micro_batch_access_index": number},
        }
    ]


def masked(share: float, **changes: Any) -> dict[str, Any]:
    return {"ratios": {"image_head": 1.0}, "T": 4, "n": 9, "seed": 1, "mean_unmasked": 0.75} | {
        "per_frame": [share - 0.25, 1.0, 1.0, 1.0],
        **changes,
    }


def short(masks: list[list[int]]) -> dict[str, Any]:
    out = {"ratios": {"image_head_tail": 1.0}, "T": 2, "n": 3, "seed": 1, "first20": masks}
    return {"T": 2, "k": "image_head_tail", "out": out}


def cropped(frames: list[int]) -> list[dict[str, Any]]:
    return [{"total": 9, "num_frames": 3, "frame_interval": 2, "seed": 0, "frames": frames}]


def clipped(mean: float, **changes: Any) -> dict[str, Any]:
    first = {"grad_norm": 0.5, "returned": 0.5, "ema": 1.0, "ema_var": 0.0, "threshold": 1.0}
    second = {"grad_norm": 0.9, "returned": 0.9, "ema": mean, "extreme": 0, "clip_coef": 1.0}
    return {"decay": 0.97, "rows": [first, {**second, **changes}]}


@pytest.mark.parametrize(
    ("content", "verdict", "detail"),
    [
        ({"2s": 51, "7": 7, "x": {"__error__": "ValueError", "msg": ""}}, "pass", "3 entries"),
        ({"2s": 51, "0": 0}, "pass", "lengths below 1 refused: 1"),
        ({"2s": 52}, "fail", "frames '2s': recorded 52, ours 51"),
        ({"2s": {"__error__": "ValueError", "msg": ""}}, "fail", "recorded ValueError, ours 51"),
        ({"ratio_map": {"3:8": "0.39"}}, "fail", "1 of them differ"),
        ({"ratio_map": {"5:9": "0.56"}}, "fail", "ours raised KeyError"),
        ({"num_pixels": {"144p": 36864}, "areas": {}}, "fail", "not compared: section 'areas'"),
        ({"by_frames_64x80": {"18": {"micro4": [5, 8, 10]}}}, "pass", "1 entries"),
        ({"by_frames_64x80": {"18": {"micro4": [6, 8, 10]}}}, "fail", "18 frames, micro4"),
        ([{"s": "A b", "once": "a b", "twice": "a b", "thrice": ""}], "fail", "column 'thrice'"),
        ({"loop": [{"p": "a", "i": 0, "out": ["b"]}]}, "fail", "recorded ['b'], ours ['a']"),
        ({"json": [{"p": 'a{"mask_strategy": 0}', "out": [["a"], [""], [0]]}]}, "pass", "refused"),
        ({"split": []}, "fail", "no entries"),
        ([{"kw": {"sample_idx": 3}, "out": "dir/sample_0004"}], "fail", "sample_0003"),
        (
            [{"kw": {"prompt": "../x", "prompt_as_path": True}, "out": "dir/../x"}],
            "pass",
            "unsafe names made safe: 1",
        ),
        (
            [{"kw": {"prompt": "../x", "prompt_as_path": True}, "out": "dir/../y"}],
            "fail",
            "1 of them differ",
        ),
        (
            [{"kw": {"sample_name": "a/b", "sample_idx": 0}, "out": "dir/a/b_0000"}],
            "pass",
            "refused",
        ),
        ([{"warmup_steps": 3, "base_lr": 1.0, "lrs": [0.25, 0.6]}], "fail", "step 1"),
        ({"num_bucket": 3}, "unsupported", "num_bucket"),
        (decided(["144p", 17, "1.00"]), "pass", "buckets: 4 entries"),
        (decided(["144p", 17, "0.56"]), "fail", "clip [40, 200, 200, 2, 5]: recorded"),
        (decided(None), "fail", "1 of them differ"),
        (decided(None, order=["256"]), "fail", "order: recorded"),
        (decided(None, places=[]), "fail", "column 'places'"),
        (decided(None, columns=["H", "T"]), "fail", "columns: expected T, H"),
        (decided(None, config={"144": {}}), "fail", "did you mean 144p"),
        ([{"id": ["240p", 51, "0.56"], "thw": [51, 240, 427]}], "fail", "ours Size"),
        (sized(0.6, 4), "pass", "a configuration that is not here: 1"),
        (sized(0.6, 4) + 2 * sized(0.5, 20), "fail", "ours [0.5, 20]"),
        (ordered(["3-1-144-256", "4-1-144-256"]), "pass", "2 entries"),
        (ordered(["4-1-144-256", "3-1-144-256"]), "fail", "replica 1: recorded"),
        (ordered(["3-1-144-256"], number=3), "fail", "2 of them differ"),
        ([{**ordered([])[0], "table": [[1, 144, 256, 1]]}], "fail", "not numbered"),
        ({"cases": [masked(0.25)]}, "pass", "2 entries"),
        ({"cases": [masked(0.5)]}, "fail", "per_frame"),
        ({"cases": [masked(0.25, last20=[])]}, "fail", "column 'last20'"),
        ({"cases": [masked(0.25)], "others": []}, "fail", "section 'others'"),
        ({"cases": [masked(0.25, seed="x")]}, "fail", "manual_seed"),
        ({"small_T": [short([[0, 0]] * 3)]}, "pass", "keep one to make: 1"),
        ({"small_T": [short([[1, 0]] * 3)]}, "fail", "first20"),
        ({"cases": [masked(0.25)], "errors": [{"r": {"image_head": 0.1}, "out": {}}]}, "fail", ""),
        (cropped([1, 3, 6]), "pass", "frames of a clip: 1 entries"),
        (cropped([1, 3, 5]), "fail", "3 of 9 frames, seed 0"),
        (clipped(0.997), "pass", "8 entries"),
        (clipped(0.9969), "fail", "step 1 ema"),
        (clipped(0.997, extreme=1), "fail", "step 1 extreme"),
        (clipped(0.997, limit=1.0), "fail", "column 'limit'"),
        ([[0, 0]], "unsupported", "no such kind of table"),
        (7, "unsupported", "no such kind of table"),
    ],
)
def test_tables(content: Any, verdict: str, detail: str, tmp_path: Path) -> None:
    result = replay_file(written(tmp_path, content))
    assert result.verdict == verdict, result.detail
    assert detail in result.detail


# --- the program ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("rope.safetensors", "save_path.json", "keys_vae.json"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    (tmp_path / "README.md").write_text("no case")
    return tmp_path


def test_program_prints_cases_counts_and_json(folder: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "replay_golden.py"
    run = subprocess.run(
        [sys.executable, script, folder, "--json"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-2] == "pass 2, fail 0, unsupported 1"
    report = json.loads(lines[-1])
    assert [report[key] for key in ("pass", "fail", "unsupported")] == [2, 0, 1]
    assert [Result(**case).case for case in report["cases"]] == ["keys_vae", "rope", "save_path"]
    assert all(case["error"] <= case["tolerance"] for case in report["cases"][1:])


def test_program_fails_if_a_case_does(folder: Path, capsys: Any) -> None:
    (folder / "bad.safetensors").write_bytes(b"\xff" * 30)
    assert main([str(folder), "--json"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["fail"], last["cases"][0]["error"]) == (1, None)
    assert main([str(folder), "--only", "[rs]*"]) == 0
    assert "pass 2, fail 0, unsupported 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda folder: [str(folder), "--only", "nothing*"], "none of the 3 cases"),
        (lambda folder: [str(folder / "missing")], "is not a folder"),
        (lambda folder: [str(folder), "--onyl", "x"], "--onyl"),
        (lambda folder: [], "folder"),
    ],
)
def test_wrong_usage_exits_2(
    arguments: Callable[[Path], list[str]], message: str, folder: Path, capsys: Any
) -> None:
    assert main(arguments(folder)) == 2
    assert message in capsys.readouterr().err


def test_folder_without_cases_is_wrong_usage(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no case" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["stdit3_xmask", "stdit3_grad", "attn_qknorm_rope*"])
def test_interpreted_kernels_pass_too(pattern: str) -> None:
    script = Path(__file__).parents[1] / "scripts/replay_golden.py"
    run = subprocess.run(
        [sys.executable, script, GOLDEN, "--json", "--only", pattern],
        # Required: where a reference would serve in place of a kernel, the case fails.
        env={**os.environ, "TRITON_INTERPRET": "1", "OPENSORA_KERNELS": "require"},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = json.loads(run.stdout.splitlines()[-1])
    assert (run.returncode, counts["fail"]) == (0, 0), run.stdout + run.stderr
    assert counts["pass"] == len([p for p in FILES if fnmatch(p.stem, pattern)]) > 0
