"""Check validation on fixed noise: repeatable, comparable, and without effect on training."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from opensora.errors import UsageError
from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.schedulers.rflow import RFlow
from opensora.training.ema import EMA
from opensora.training.sample_clips import sample_clips
from opensora.training.validation import Planned, Prepared, Validation

PLAN = [
    Planned("17x16x16", ("a", "b")),
    Planned("1x16x24", ("a", "c", "d")),
    Planned("17x16x16", ("e",)),
]


def prepare(index: int) -> Prepared:
    """Return latents of the bucket's size, drawn as a VAE draws: from the global generator."""
    planned = PLAN[index]
    count = len(planned.names)
    frames, height, width = (int(n) for n in planned.bucket.split("x"))
    latent = torch.randn(count, 4, 5 if frames > 1 else 1, height // 4, width // 4)
    random.random()
    np.random.random()
    size = {"height": torch.full((count,), height), "width": torch.full((count,), width)}
    y = torch.ones(count, 1, 8, 16)
    kwargs = {"y": y, "mask": torch.ones(count, 8), "fps": torch.full((count,), 24.0), **size}
    return Prepared(latent, kwargs, frames)


class Toy(nn.Module):
    """Mixes channels by the timestep; drops values in training, as texts are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.drop = nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5))

    def forward(self, x, t, y, **kwargs):
        shift = (t / 1000 + y.mean((1, 2, 3)))[:, None, None, None, None]
        return self.drop(self.mix(x.movedim(1, -1)).movedim(-1, 1) + shift)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Toy().train()


def test_a_transformer_in_training_mode_repeats_its_numbers():
    """Captions and branches are dropped in training only."""
    torch.manual_seed(0)
    config = STDiT3Config(
        hidden_size=16, depth=1, num_heads=2, caption_channels=16, model_max_length=8,
        class_dropout_prob=0.5, drop_path=0.5,
    )  # fmt: skip
    model = STDiT3(config).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    validation = Validation(PLAN, prepare, RFlow(), steps=1)
    assert validation(model) == validation(model)
    assert all(module.training for module in model.modules())


def test_the_same_weights_give_the_same_numbers(model):
    results = []
    for seed in range(4):
        torch.manual_seed(seed)
        results.append(Validation(PLAN, prepare, RFlow(), steps=4)(model))
    assert all(result == results[0] for result in results)
    result = results[0]
    assert result.samples == 6
    assert set(result.buckets) == {"17x16x16", "1x16x24"}
    assert list(result.timesteps) == ["125", "375", "625", "875"]
    assert sum(result.timesteps.values()) / 4 == pytest.approx(result.loss)
    assert result.line()["validation_loss"] == result.loss


def test_training_goes_on_as_without_validation(model):
    model.mix.eval()
    modes = [module.training for module in model.modules()]
    validation = Validation(PLAN, prepare, RFlow(), steps=2)

    def draws():
        return torch.rand(3).tolist(), random.random(), float(np.random.random())

    drawn = []
    for validate in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        if validate:
            validation(model, EMA(model, 0.9))
        drawn.append(draws())
    assert drawn[0] == drawn[1]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_better_weights_have_a_smaller_loss():
    class Scaled(nn.Module):
        """Predicts a share of the best velocity for latents of unit variance."""

        share = 0.0

        def forward(self, x, t, **kwargs):
            u = (t / 1000)[:, None, None, None, None]
            return self.share * (1 - 2 * u) * x / ((1 - u) ** 2 + u**2)

    model, losses = Scaled(), []
    for share in torch.linspace(0, 1, 8):
        model.share = float(share)
        losses.append(Validation(PLAN, prepare, RFlow())(model).loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(2.0, rel=0.1)  # variance of the latents and of the noise
    assert losses[-1] < 0.85 * losses[0]


def test_averages_are_validated_on_request(model):
    ema = EMA(model, 0.5)
    validation = Validation(PLAN, prepare, RFlow(), steps=2)
    before = validation(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert validation(model, ema) == before
    assert validation(model).loss != before.loss


def test_numbers_that_cannot_be_compared_have_different_digests(model):
    digests = {
        Validation(PLAN, prepare, RFlow(), steps=2, **changes)(model).digest
        for changes in ({}, {"seed": 1}, {"key": "another vae"})
    }
    digests.add(Validation(PLAN, prepare, RFlow(), steps=3)(model).digest)
    digests.add(Validation(PLAN[:2], prepare, RFlow(), steps=2)(model).digest)
    assert len(digests) == 5


def test_an_unreadable_sample_is_left_out_and_shows_in_the_digest(model):
    def without_d(index):
        batch = prepare(index)
        if "d" not in PLAN[index].names:
            return batch
        kwargs = {key: value[:2] for key, value in batch.kwargs.items()}
        return Prepared(batch.latent[:2], kwargs, batch.num_frames, ("a", "c"))

    whole = Validation(PLAN, prepare, RFlow(), steps=2)(model)
    partial = Validation(PLAN, without_d, RFlow(), steps=2)(model)
    assert partial.samples == 5
    assert partial.digest != whole.digest
    assert partial.buckets["17x16x16"] == whole.buckets["17x16x16"]


def test_replicas_make_equally_many_calls(model):
    tables = []
    for replica in range(2):
        validation = Validation(
            PLAN, prepare, RFlow(), steps=2, replica=replica, replicas=2,
            sum_ranks=lambda own: tables.append(own.clone()) or own,
        )  # fmt: skip
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        handle = model.register_forward_pre_hook(count)
        validation(model)
        handle.remove()
        assert calls == 4  # two batches, two timesteps: the second replica's last is for show
    whole = []
    Validation(
        PLAN, prepare, RFlow(), steps=2, sum_ranks=lambda own: whole.append(own.clone()) or own
    )(model)
    assert torch.equal(tables[0] + tables[1], whole[0])


def test_nothing_to_validate_is_named(model):
    with pytest.raises(UsageError, match="there is no sample"):
        Validation([], prepare, RFlow())
    with pytest.raises(UsageError, match="planned twice"):
        Validation([PLAN[0], PLAN[0]], prepare, RFlow())


def test_clips_have_fixed_seeds_and_leave_the_generators_alone(tmp_path):
    class Made:
        def __init__(self, frames):
            self.frames = frames

    def pipeline(prompt, *, seed, fps, progress, num_frames):
        torch.manual_seed(seed)
        return Made(torch.randint(0, 255, (1, num_frames, 16, 16, 3), dtype=torch.uint8).numpy())

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    prompts = ["a cat", "a dog"]
    first = sample_clips(pipeline, prompts, tmp_path, 100, fps=8, num_frames=3)
    assert torch.equal(torch.rand(2), expected)
    second = sample_clips(pipeline, prompts, tmp_path, 200, fps=8, num_frames=3)
    images = sample_clips(pipeline, prompts, tmp_path, 300, num_frames=1)
    assert [path.relative_to(tmp_path).as_posix() for path in first] == [
        "clips/step-00000100/00.mp4",
        "clips/step-00000100/01.mp4",
    ]
    sizes = [[path.stat().st_size for path in paths] for paths in (first, second)]
    assert sizes[0] == pytest.approx(sizes[1], abs=8)
    assert sizes[0][0] != sizes[0][1]
    assert [path.suffix for path in images] == [".png", ".png"]
    assert (tmp_path / "clips" / "step-00000100.png").exists()
    assert sample_clips(pipeline, prompts, tmp_path / "x", 1, rank=1, num_frames=1) == []
    assert not (tmp_path / "x").exists()
