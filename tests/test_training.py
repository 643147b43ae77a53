"""Check the training programs on models of a few thousand weights: learn, resume, refuse."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from opensora.config_file import load_config_file
from opensora.errors import NonFiniteError, UsageError, WeightsError
from opensora.optim import Muon
from opensora.train import main as train_main
from opensora.train_config import TrainConfig
from opensora.train_shapes_vae import STAGES, TrainVAEConfig, draw_batch, stage_of, train_vae
from opensora.training.data import dataset_of, sampler_of
from opensora.training.ema import EMA
from opensora.training.run import TrainingRun
from opensora.training.schedule import learning_rate_factor

VAE_MODEL = {
    "vae_2d": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
    },
    "vae_temporal": {
        "filters": 4,
        "num_res_blocks": 1,
        "channel_multipliers": [1, 1, 1, 2],
        "num_groups": 2,
    },
    "shift": [0.0] * 4,
    "scale": [1.0] * 4,
}
VAE = TrainVAEConfig(
    model=VAE_MODEL,
    image_size=(16, 16),
    num_frames=5,
    window=8,
    stages=(2, 2, 2, 2),
    batch_sizes=(2, 2, 2, 1),
    log_every=2,
    ckpt_every=4,
    num_statistics=8,
    dtype="fp32",
)


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return train_vae(dataclasses.replace(VAE, outputs=str(folder)))


def test_stages_follow_each_other():
    assert [STAGES[stage_of(VAE, step)] for step in range(8)] == [
        s for s in STAGES for _ in range(2)
    ]
    shapes = [tuple(draw_batch(VAE, step).shape[2:]) for step in (0, 2, 4, 6)]
    assert shapes == [(1, 8, 8), (5, 8, 8), (5, 8, 8), (5, 16, 16)]


def test_vae_training_leaves_a_normalised_loadable_model(trained_vae):
    from opensora.models.vae import VideoAutoencoder

    vae = VideoAutoencoder.from_pretrained(trained_vae, dtype=torch.float32)
    assert all(value > 0 for value in vae.config.scale)
    z = vae.encode(draw_batch(VAE, 6), sample=False)
    assert z.shape == (1, 4, 2, 2, 2)
    assert torch.isfinite(z).all()
    lines = [
        json.loads(line) for line in (trained_vae.parent / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]


def test_vae_training_resumes_to_the_same_weights(trained_vae, tmp_path):
    cut = dataclasses.replace(VAE, outputs=str(tmp_path))
    stop = RuntimeError("stop")

    def log(self, step, values):
        if step == 5:
            raise stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "log", log)
        with pytest.raises(RuntimeError, match="stop"):
            train_vae(cut)
    resumed = train_vae(cut)
    for name in ("model.safetensors", "config.json"):
        assert (resumed / name).read_bytes() == (trained_vae / name).read_bytes()


def test_resuming_takes_the_learning_rate_of_the_configuration(tmp_path):
    modules = {"m": torch.nn.Linear(2, 2)}
    ema = EMA(modules, 0.9)
    run = TrainingRun(tmp_path, {}, 10, 1)
    run.save(4, modules, Muon(modules["m"].named_parameters(), 1e-3, 1e-3), ema)
    changed = Muon(modules["m"].named_parameters(), 5e-3, 4e-3)
    assert run.resume(modules, changed, ema) == 4
    assert [group["initial_lr"] for group in changed.param_groups] == [5e-3, 4e-3]


def test_a_damaged_state_is_named(trained_vae, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(WeightsError, match="cannot resume from"):
        train_vae(dataclasses.replace(VAE, outputs=str(tmp_path)))


def test_a_state_of_another_model_is_named(trained_vae, tmp_path):
    run = TrainingRun(tmp_path, {}, 1, 1)
    other = {"vae": torch.nn.Linear(2, 2)}
    run.save(1, other, Muon(other["vae"].named_parameters()), EMA(other, 0.9))
    with pytest.raises(WeightsError, match="cannot resume from"):
        train_vae(dataclasses.replace(VAE, outputs=str(tmp_path)))


def test_a_non_finite_loss_stops_the_run(tmp_path):
    run = TrainingRun(tmp_path, {}, 10, 1)
    with pytest.raises(NonFiniteError, match="loss is nan at step 3"):
        run.log(3, {"loss": float("nan")})


def test_outputs_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the output folder"):
        TrainingRun(tmp_path / "file" / "run", {}, 1, 1)


def test_unknown_setting_is_a_usage_error(capsys):
    assert train_main(["--stepps", "3"]) == 2
    assert "steps" in capsys.readouterr().err


def test_committed_configs_are_accepted():
    vae = TrainVAEConfig(**load_config_file("configs/tiny/train/vae.py"))
    assert sum(vae.stages) > 1000
    transformer = TrainConfig(**load_config_file("configs/tiny/train/stdit.py"))
    dataset = dataset_of(transformer)
    sizes = set(dataset.sizes)
    planned = {batch.size for batch in sampler_of(transformer, dataset, 1).epoch(0)}
    assert planned == sizes
    assert {size.frames for size in sizes} == {1, 17, 34}


def test_learning_rate_warms_up_and_decays_to_zero():
    factors = [learning_rate_factor(step, 100, 4, 0.5) for step in range(101)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[10] == 1.0
    assert factors[75] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_ema_swap_gives_tied_weights_back():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    ema = EMA({"m": torch.nn.Sequential(first, second)}, 0.5)
    with torch.no_grad():
        first.weight.add_(1.0)
    start = first.weight.detach().clone()
    ema.swap()
    ema.swap()
    assert torch.equal(first.weight, start)


def test_ema_swap_is_its_own_inverse():
    module = torch.nn.Linear(3, 3)
    ema = EMA({"m": module}, 0.5)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update()
    ema.swap()
    assert torch.allclose(module.weight, start + (1 - 2 / 11))
    ema.swap()
    assert torch.allclose(module.weight, start + 1.0)
