"""Check the rectified flow against recorded runs of Open-Sora 1.2 and by its properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from opensora.errors import UsageError
from opensora.replay.toy_model import toy_model
from opensora.schedulers import RFlow
from opensora.schedulers.noise import initial_noise, step_noise
from opensora.schedulers.timesteps import timestep_transform

GOLDEN = Path(__file__).parents[1] / "golden"
SAMPLES = ["10", "10_allones_mask", "30_mask", "30_tt"]


def load(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def same(actual: Tensor, expected: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class Recorder:
    """Call the toy model and keep what it was given."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        self.x.append(x)
        self.t.append(t)
        self.kwargs.append(kwargs)
        return toy_model(x, t, **kwargs)


def test_add_noise_matches_recording() -> None:
    _, case = load("rflow_add_noise")
    same(RFlow().add_noise(case["in.x"], case["in.noise"], case["in.t"]), case["out.y"], atol=0)


@pytest.mark.parametrize("name", ["rflow_loss", "rflow_loss_mask"])
def test_loss_matches_recording(name: str) -> None:
    _, case = load(name)
    model = Recorder()
    loss = RFlow().training_losses(
        model,
        case["in.x_start"],
        {"y": case["in.y"]},
        t=case["in.t"],
        noise=case["in.noise"],
        mask=case.get("in.mask"),
    )["loss"]
    same(loss, case["out.loss"], atol=5e-7)
    same(model.x[0], case["out.x_t"], atol=0)


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_matches_recording(name: str) -> None:
    meta, case = load(f"rflow_sample_{name}")
    height, width, frames = (torch.tensor([float(v)]) for v in json.loads(meta["h_w_frames"]))
    model = Recorder()
    z = RFlow.from_dict(json.loads(meta["scheduler"])).sample(
        model,
        case["in.z"],
        y=case["in.y_cond"],
        y_null=case["in.y_null"],
        model_kwargs={"height": height, "width": width},
        num_frames=frames,
        mask=case.get("in.mask"),
        noise=case.get("in.noise"),
    )
    same(z, case["out.z"])
    same(torch.stack([x.chunk(2)[0] for x in model.x]), case["out.traj_model_in"])
    same(torch.stack(model.t), case["out.timesteps"], atol=0)
    assert all(t.dtype == torch.float32 for t in model.t)
    if "in.mask" in case:
        x_mask = torch.stack([kwargs["x_mask"] for kwargs in model.kwargs])
        assert torch.equal(x_mask, case["out.x_mask"])


def test_global_noise_draws_equal_the_recorded_ones() -> None:
    meta, case = load("rflow_sample_30_mask")
    scheduler = RFlow.from_dict(json.loads(meta["scheduler"]))
    size = {"height": 240, "width": 426, "num_frames": 51}
    text = {"y": case["in.y_cond"], "y_null": case["in.y_null"]}

    def run(noise: Any) -> Tensor:
        return scheduler.sample(
            toy_model, case["in.z"], model_kwargs=size, mask=case["in.mask"], noise=noise, **text
        )

    torch.manual_seed(3)
    drawn = [torch.randn_like(case["in.z"]) for _ in range(30)]
    torch.manual_seed(3)
    assert torch.equal(run(None), run(drawn))
    assert torch.equal(run(drawn), run(lambda step, z: drawn[step]))


TIMESTEP_DRAWS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "discrete": {"use_discrete_timesteps": True},
    "logit": {"sample_method": "logit-normal"},
    "logit_loc1_s05": {"sample_method": "logit-normal", "loc": 1.0, "scale": 0.5},
    "logit_tt": {"sample_method": "logit-normal", "use_timestep_transform": True},
    "uniform_tt_scale2": {"use_timestep_transform": True, "transform_scale": 2.0},
}


@pytest.mark.parametrize("name", TIMESTEP_DRAWS)
def test_drawn_timesteps_match_recording(name: str) -> None:
    meta, case = load("rflow_t_sampling")
    model = Recorder()
    torch.manual_seed(int(meta["manual_seed"]))
    RFlow(**TIMESTEP_DRAWS[name]).training_losses(
        model,
        torch.zeros(8, 1, 1, 1, 1),
        {
            "y": torch.zeros(8, 1, 1, 1),
            "height": torch.full((8,), 480.0),
            "width": torch.full((8,), 854.0),
            "num_frames": torch.full((8,), 102.0),
        },
    )
    same(model.t[0], case[f"out.{name}"], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timestep_transform_matches_recording(dtype: torch.dtype) -> None:
    meta, case = load("timestep_transform")
    name = str(dtype).removeprefix("torch.")
    for row, size in enumerate(json.loads(meta["rows_h_w_frames"])):
        tensors = [torch.tensor([float(value)], dtype=dtype) for value in size]
        out = timestep_transform(case["in.t"], *tensors, short_clips=False)
        assert torch.equal(out.isnan(), case[f"out.nan_{name}"][row])
        same(out.nan_to_num(nan=-1), case[f"out.{name}"][row], atol=0)
        if size[2] != 16:
            assert torch.equal(out, timestep_transform(case["in.t"], *tensors))
    tensors = [torch.tensor([float(value)]) for value in (480, 854, 51)]
    scaled = timestep_transform(case["in.t"], *tensors, scale=2.0)
    same(scaled, case["out.scale2_480x854x51"], atol=0)


def test_timesteps_fall_from_1000_for_every_length() -> None:
    scheduler = RFlow(num_sampling_steps=7, use_timestep_transform=True)
    middle = []
    for frames in [*range(1, 35), 51, 102]:
        t = scheduler.timesteps(480, 854, frames, batch=2)
        assert t.shape == (7, 2)
        assert torch.isfinite(t).all()
        assert (t.diff(dim=0) < 0).all()
        torch.testing.assert_close(t[0], torch.full((2,), 1000.0))
        middle.append(t[3, 0].item())
    assert middle == sorted(middle), "longer clips must be shifted further toward noise"


def test_toy_model_marks_frames_outside_x_mask() -> None:
    # Last step of a masked IDDPM run: at t = 0 frames of mask 0 are updated once, without noise.
    _, case = load("iddpm_sample_v11_mask")
    x = case["out.traj_model_in"][-1]
    x_mask = case["out.x_mask"][-1]
    y = torch.cat([case["in.y_cond"], case["in.y_null"].expand(2, -1, -1, -1)])
    cond, uncond = toy_model(x, case["out.timesteps"][-1], y, x_mask)[:, :4].chunk(2)
    eps = uncond + 7.0 * (cond - uncond)
    eps[:, 3] = cond[:, 3]
    beta = torch.tensor(1e-4)
    alpha = 1 - beta
    out = beta / (1 - alpha) * ((1 / alpha).sqrt() * x[:2] - (1 / alpha - 1).sqrt() * eps)
    frozen = ~x_mask[:2]
    assert frozen.any()
    same(out.transpose(1, 2)[frozen], case["out.z"].transpose(1, 2)[frozen], atol=1e-6)


@pytest.fixture
def request_3() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "z": initial_noise([3, 4, 5, 4, 6], seed=5),
        "y": torch.randn(3, 1, 3, 5, generator=generator),
        "y_null": torch.randn(1, 1, 3, 5, generator=generator),
    }


def test_all_ones_mask_equals_no_mask(request_3: dict[str, Any]) -> None:
    # 117 x 312 and one frame: the transform rounds its first timestep to 1000.0001.
    scheduler = RFlow(num_sampling_steps=5, use_timestep_transform=True)
    size = {"height": 117, "width": 312, "num_frames": 1}
    assert scheduler.timesteps(**size)[0] > 1000
    plain = scheduler.sample(toy_model, **request_3, model_kwargs=size)
    mask = torch.ones(3, 5)
    masked = scheduler.sample(toy_model, **request_3, model_kwargs=size, mask=mask)
    assert torch.equal(plain, masked)


def test_frames_of_mask_zero_are_kept_and_edits_start_late(request_3: dict[str, Any]) -> None:
    mask = torch.ones(3, 5)
    mask[:, 0], mask[:, 1] = 0.0, 0.4
    seen: list[Tensor] = []
    z = RFlow(num_sampling_steps=10).sample(
        toy_model,
        **request_3,
        mask=mask,
        noise=step_noise(1, batch=3),
        callback=lambda step, steps, t, z: seen.append(z),
    )
    start = request_3["z"]
    assert torch.equal(z[:, :, 0], start[:, :, 0])
    # t falls by 100 a step from 1000: t <= 400 first at step 6.
    assert all(torch.equal(z[:, :, 1], start[:, :, 1]) for z in seen[:6])
    assert not torch.equal(seen[6][:, :, 1], start[:, :, 1])


def test_clip_does_not_depend_on_its_batch(request_3: dict[str, Any]) -> None:
    mask = torch.full((3, 5), 0.7)
    scheduler = RFlow(num_sampling_steps=4)
    together = scheduler.sample(
        toy_model, **request_3, mask=mask, noise=step_noise(5, first_index=0, batch=3)
    )
    alone = scheduler.sample(
        toy_model,
        initial_noise([1, 4, 5, 4, 6], seed=5, first_index=2),
        y=request_3["y"][2:],
        y_null=request_3["y_null"],
        mask=mask[2:],
        noise=step_noise(5, first_index=2, batch=1),
    )
    torch.testing.assert_close(alone, together[2:], rtol=0, atol=1e-6)


def test_guidance_one_skips_the_unconditional_half(request_3: dict[str, Any]) -> None:
    scheduler = RFlow(num_sampling_steps=3)
    model = Recorder()
    z, y = request_3["z"], request_3["y"]
    single = scheduler.sample(model, z, y=y, guidance_scale=1.0)
    assert model.x[0].shape[0] == 3
    double = scheduler.sample(toy_model, **request_3, guidance_scale=1.0 + 1e-9)
    torch.testing.assert_close(single, double, rtol=0, atol=1e-5)


def test_callers_values_stay_unchanged(request_3: dict[str, Any]) -> None:
    kwargs = {"height": torch.tensor([240.0]), "width": torch.tensor([426.0]), "num_frames": 51}
    before = dict(kwargs)
    mask = torch.rand(3, 5)
    copies = [request_3["z"].clone(), request_3["y"].clone(), mask.clone()]
    scheduler = RFlow(num_sampling_steps=3, use_timestep_transform=True)
    scheduler.sample(toy_model, **request_3, model_kwargs=kwargs, mask=mask)
    inputs = {"y": request_3["y"], **kwargs}
    scheduler.training_losses(toy_model, request_3["z"], inputs, mask=mask > 0.5)
    assert kwargs == before
    assert list(inputs) == ["y", *kwargs]
    for copy, value in zip(copies, (request_3["z"], request_3["y"], mask), strict=True):
        assert torch.equal(copy, value)


def test_callback_sees_every_step(request_3: dict[str, Any]) -> None:
    calls: list[tuple[int, int, float]] = []
    z = RFlow(num_sampling_steps=4).sample(
        toy_model,
        **request_3,
        callback=lambda step, steps, t, z: calls.append((step, steps, t[0].item())),
    )
    assert calls == [(0, 4, 1000.0), (1, 4, 750.0), (2, 4, 500.0), (3, 4, 250.0)]
    assert z.dtype == torch.float32


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_callback_may_change_the_latent(
    request_3: dict[str, Any], guidance: float, inference: bool
) -> None:
    model = Recorder()

    def halve(step: int, steps: int, t: Tensor, z: Tensor) -> None:
        if step == 1:
            z *= 0.5
            halved.append(z.clone())

    halved: list[Tensor] = []
    with torch.inference_mode(inference):
        RFlow(num_sampling_steps=4).sample(
            model, **request_3, guidance_scale=guidance, callback=halve
        )
    assert all(torch.equal(half, halved[0]) for half in model.x[2].split(3))
    assert not torch.equal(model.x[3][:3], halved[0])


def test_mask_of_one_row_serves_every_sample(request_3: dict[str, Any]) -> None:
    mask = torch.tensor([[0.0, 0.3, 0.6, 1.0, 1.0]])
    scheduler = RFlow(num_sampling_steps=6)

    def run(mask: Tensor) -> Tensor:
        return scheduler.sample(
            toy_model, **request_3, mask=mask, noise=step_noise(1, batch=3), guidance_scale=3.0
        )

    assert torch.equal(run(mask), run(mask.expand(3, 5)))


def test_low_precision_latent_is_sampled_in_float32(request_3: dict[str, Any]) -> None:
    request_3["z"] = request_3["z"].bfloat16()
    z = RFlow(num_sampling_steps=4).sample(toy_model, **request_3)
    request_3["z"] = request_3["z"].float()
    full = RFlow(num_sampling_steps=4).sample(toy_model, **request_3)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, full, rtol=0, atol=0.05)


def test_straight_flow_is_sampled_exactly() -> None:
    # If the model knows the true velocity of one data point, Euler steps land on that point.
    data = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    noise = initial_noise(data.shape, seed=2)
    for steps in (1, 3, 25):
        z = RFlow(num_sampling_steps=steps).sample(
            lambda x, t, y: data - noise, noise, y=torch.zeros(2, 1, 1, 1), guidance_scale=1.0
        )
        torch.testing.assert_close(z, data, rtol=0, atol=1e-5)


def test_discrete_timesteps_are_whole_numbers() -> None:
    t = RFlow(num_sampling_steps=7, use_discrete_timesteps=True).timesteps()
    assert torch.equal(t[:, 0], torch.tensor([1000.0, 857.0, 714.0, 571.0, 429.0, 286.0, 143.0]))


def test_loss_of_a_sample_without_active_frames_is_zero() -> None:
    x = torch.randn(2, 4, 3, 2, 2)
    mask = torch.tensor([[False] * 3, [True] * 3])
    loss = RFlow().training_losses(toy_model, x, {"y": torch.zeros(2, 1, 1, 1)}, mask=mask)["loss"]
    assert loss[0] == 0
    assert loss[1] > 0


def test_generator_makes_the_loss_reproducible() -> None:
    x, y = torch.randn(2, 4, 3, 2, 2), torch.zeros(2, 1, 1, 1)

    def loss(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return RFlow().training_losses(toy_model, x, {"y": y}, generator=generator)["loss"]

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))


def test_per_sample_noise_is_independent_of_the_batch() -> None:
    shape = [3, 4, 2, 2, 2]
    together = initial_noise(shape, seed=7)
    for index in range(3):
        assert torch.equal(initial_noise([1, *shape[1:]], 7, index)[0], together[index])
    assert torch.equal(initial_noise(shape, seed=[9, 7, 8])[1], together[0])


def test_step_noise_depends_on_seed_and_step_alone() -> None:
    z = torch.zeros(2, 4, 2, 2, 2)
    draw = step_noise(7, batch=2)
    late = draw(5, z)
    draw(4, z)
    assert torch.equal(draw(5, z), late)
    assert torch.equal(step_noise(7, 1, batch=1)(5, z[:1])[0], late[1])
    assert not torch.equal(draw(6, z), late)
    assert not torch.equal(late[0], late[1])


def test_upstream_noise_is_one_draw_after_the_seed() -> None:
    torch.manual_seed(1024)
    expected = torch.randn(2, 4, 2, 3, 3, dtype=torch.bfloat16)
    actual = initial_noise([2, 4, 2, 3, 3], 1024, mode="upstream", dtype=torch.bfloat16)
    assert torch.equal(actual, expected)


def test_config_round_trip(tmp_path: Path) -> None:
    scheduler = RFlow(num_sampling_steps=25, cfg_scale=3.0, sample_method="logit-normal", loc=0.8)
    assert RFlow.from_dict(scheduler.to_dict()) == scheduler
    scheduler.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler" / "scheduler_config.json").is_file()
    assert RFlow.from_pretrained(tmp_path) == scheduler


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_sampling_step": 3}, "num_sampling_steps"),
        ({"type": "iddpm"}, "rflow"),
        ({"num_sampling_steps": 0}, ">= 1"),
        ({"num_sampling_steps": 2.5}, "whole number"),
        ({"cfg_scale": float("nan")}, "finite"),
        ({"scale": 0.0}, "greater than 0"),
        ({"use_timestep_transform": "yes"}, "true or false"),
        ({"sample_method": "normal"}, "logit-normal"),
    ],
)
def test_wrong_settings_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RFlow.from_dict(config)


def test_wrong_calls_are_named(tmp_path: Path, request_3: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="height"):
        RFlow(use_timestep_transform=True).timesteps()
    with pytest.raises(UsageError, match="y_null"):
        RFlow().sample(toy_model, request_3["z"], y=request_3["y"])
    with pytest.raises(UsageError, match="scheduler_config"):
        RFlow.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="seeds"):
        initial_noise([2, 1, 1, 1, 1], [1, 2, 3])
    with pytest.raises(UsageError, match="per-sample"):
        initial_noise([2, 1, 1, 1, 1], 1, mode="global")
    with pytest.raises(UsageError, match="one seed"):
        initial_noise([2, 1, 1, 1, 1], [1, 2], mode="upstream")
