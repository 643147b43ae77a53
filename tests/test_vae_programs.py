"""Run the VAE programs as a user does: the stage configurations in a chain, then inference."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora import train_shapes_vae
from opensora.config_file import load_config_file
from opensora.data.shapes import render, sample_scene
from opensora.export import export
from opensora.inference_vae import KINDS
from opensora.inference_vae import main as reconstruct
from opensora.media import read_metadata, write_clip
from opensora.models.vae import (
    AutoencoderKL,
    AutoencoderKLConfig,
    VAETemporal,
    VAETemporalConfig,
    VideoAutoencoder,
)
from opensora.models.vae.loading import build_vae
from opensora.train_vae import main as train

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs/vae"
# What makes the published architecture tiny; all else is the stage's.
TINY = [
    "--model.vae_2d.block_out_channels=(4, 4, 4, 4)",
    "--model.vae_2d.layers_per_block=1",
    "--model.vae_2d.norm_num_groups=2",
    "--model.vae_temporal.filters=4",
    "--model.vae_temporal.num_res_blocks=1",
    "--model.vae_temporal.num_groups=2",
]
# Discriminators are configured so in Open-Sora's configs/vae/train/video_disc.py.
PUBLISHED = """
num_frames = 5
image_size = (16, 16)
dataset = dict(
    type="VideoTextDataset", data_path=None, num_frames=num_frames, frame_interval=1,
    image_size=image_size,
)
num_workers = 0
dtype = "bf16"
grad_checkpoint = True
plugin = "zero2"
model = dict(
    type="VideoAutoencoderPipeline", freeze_vae_2d=False, from_pretrained=None,
    vae_2d=dict(
        type="VideoAutoencoderKL", local_files_only=True, block_out_channels=(4, 4),
        norm_num_groups=2,
    ),
    vae_temporal=dict(
        type="VAE_Temporal", from_pretrained=None, filters=4, num_res_blocks=1, num_groups=2,
    ),
)
discriminator = dict(
    type="NLayerDiscriminator", from_pretrained=None, input_nc=3, n_layers=1, use_actnorm=False,
)
discriminator_factor = 1
discriminator_start = -1
generator_factor = 0.5
generator_loss_type = "hinge"
discriminator_loss_type = "hinge"
lecam_loss_weight = None
gradient_penalty_loss_weight = None
perceptual_loss_weight = 0.0
kl_loss_weight = 1e-6
mixed_image_ratio = 0.2
use_real_rec_loss = True
use_z_rec_loss = False
use_image_identity_loss = False
seed = 42
outputs = "outputs"
wandb = False
epochs = 1
log_every = 1
ckpt_every = 1000
load = None
batch_size = 1
lr = 1e-5
grad_clip = 1.0
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of moving shapes, one of them twice as a name, and a damaged file."""
    folder = tmp_path_factory.mktemp("clips")
    rng = random.Random(3)
    lines = ["path,text"]
    for name in ("a", "b", "c", "more/a"):
        frames = render(sample_scene(rng), 36, 64, 64)
        write_clip(folder / f"{name}.mp4", np.asarray(frames), 8)
        lines.append(f'{name}.mp4,"a shape, moving"')
    (folder / "damaged.mp4").write_bytes(b"nothing")
    write_clip(folder / "still.png", np.asarray(render(sample_scene(rng), 1, 64, 64)), 8)
    (folder / "meta.csv").write_text("\n".join([*lines, "damaged.mp4,none"]) + "\n")
    (folder / "images.csv").write_text("path,text\nstill.png,a still shape\n")
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_stage_configurations_are_the_published_settings() -> None:
    stages = [load_config_file(CONFIGS / f"train/stage{n}.py") for n in (1, 2, 3)]
    assert [stage["model"]["freeze_vae_2d"] for stage in stages] == [True, False, False]
    assert [stage["use_z_rec_loss"] for stage in stages] == [True, True, False]
    assert [stage["use_real_rec_loss"] for stage in stages] == [False, False, True]
    assert [stage["use_image_identity_loss"] for stage in stages] == [True, False, False]
    assert [stage["dataset"]["num_frames"] for stage in stages] == [17, 17, 33]
    assert stages[2]["mixed_strategy"] == "mixed_video_random"
    for stage in stages:
        assert stage["dataset"]["image_size"] == [256, 256] or stage["image_size"] == (256, 256)
        assert (stage["lr"], stage["grad_clip"], stage["kl_loss_weight"]) == (1e-5, 1.0, 1e-6)


def test_stages_follow_each_other_from_the_command_line(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--num-frames", "5", "--image-size", "16", "16", "--epochs", "1", "--num-workers", "0"]
    data = ["--data-path", str(table / "meta.csv"), "--dtype", "fp32"]
    outputs = [tmp_path / f"vae_stage{n}" for n in (1, 2, 3)]
    for number, folder in enumerate(outputs, 1):
        words = [str(CONFIGS / f"train/stage{number}.py"), *data, *small]
        words += ["--outputs", str(folder)]
        if number == 1:
            words += TINY
        else:
            words += [f"--model.from_pretrained={outputs[number - 2]}"]
        if number == 3:
            assert train(words) == 2
            assert "vgg16-397923af.pth" in capsys.readouterr().err
            words += ["--perceptual-loss-weight", "0"]
        assert train(words) == 0, capsys.readouterr().err
        (run,) = (path for path in folder.iterdir() if path.is_dir())
        assert run.name == "000-OpenSoraVAE_V1_2"
        assert len(rows(run)) == 4
        assert "damaged" not in (run / "config.json").read_text()
    last = VideoAutoencoder.from_pretrained(run / "vae")
    assert last.config.shift == (-0.10, 0.34, 0.27, 0.98)
    assert not last.config.cal_loss
    # The checkpoint alone gives the same VAE.
    export(run, tmp_path / "exported")
    stored = VideoAutoencoder.from_pretrained(tmp_path / "exported")
    assert stored.config == last.config
    for name, value in last.state_dict().items():
        assert torch.equal(stored.state_dict()[name], value)


@pytest.mark.usefixtures("one_thread")
def test_killed_run_goes_on_to_the_same_weights(table: Path, tmp_path: Path) -> None:
    words = [str(CONFIGS / "train/stage1.py"), "--data-path", str(table / "meta.csv"), *TINY]
    words += ["--num-frames", "5", "--image-size", "16", "16", "--num-workers", "1"]
    words += [
        "--epochs",
        "2",
        "--ckpt-every",
        "2",
        "--no-grad-checkpoint",
        "--ema-decay",
        "0.9",
        "--device",
        "cpu",
    ]
    words += ["--discriminator.n_layers=1", "--discriminator.ndf=4", "--use-real-rec-loss"]
    words += ["--perceptual-loss-weight", "0", "--lecam-loss-weight", "0.1", "--dtype", "fp32"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    program = [sys.executable, str(ROOT / "scripts/train_vae.py"), *words, "--outputs", str(cut)]
    # One thread everywhere: sums in another order would not be the same bit for bit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not list(cut.glob("000-*/epoch*-global_step4")) and running.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not (cut / "000-OpenSoraVAE_V1_2/vae").exists()
    assert train([*words, "--outputs", str(cut), "--load", "latest"]) == 0
    assert train([*words, "--outputs", str(whole)]) == 0
    (one,), (other,) = cut.iterdir(), whole.iterdir()
    for name in ("vae/model.safetensors", "discriminator.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert [row["loss"] for row in rows(one)] == [row["loss"] for row in rows(other)]


def test_parts_load_from_their_own_folders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spatial = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(4, 8), norm_num_groups=2))
    temporal = VAETemporal(VAETemporalConfig(filters=4, num_res_blocks=1, num_groups=2))
    spatial.save_pretrained(tmp_path / "vae")
    temporal.save_pretrained(tmp_path / "temporal")
    entry = {
        "type": "VideoAutoencoderPipeline",
        "vae_2d": {"from_pretrained": str(tmp_path), "subfolder": "vae", "micro_batch_size": 2},
        "vae_temporal": {
            **temporal.config.to_dict(),
            "from_pretrained": str(tmp_path / "temporal"),
        },
    }
    vae, origin = build_vae(entry)
    assert str(tmp_path / "temporal") in origin
    for name, value in spatial.state_dict().items():
        assert torch.equal(vae.spatial_vae.module.state_dict()[name], value)
    for name, value in temporal.state_dict().items():
        assert torch.equal(vae.temporal_vae.state_dict()[name], value)


def test_published_discriminator_configuration_runs(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "video_disc.py"
    config.write_text(PUBLISHED)
    words = [str(config), "--data-path", str(table / "meta.csv"), "--outputs", str(tmp_path / "o")]
    assert train(words) == 0
    said = capsys.readouterr()
    assert "plugin = 'zero2'" in said.out or "zero2" not in said.err
    (run,) = (tmp_path / "o").iterdir()
    assert all("disc" in row and row["adaptive"] > 0 for row in rows(run))
    # A stage that was not finished is named, not guessed at.
    (run / "vae/config.json").unlink()
    words = [
        str(config),
        "--data-path",
        str(table / "meta.csv"),
        "--ckpt-path",
        str(tmp_path / "o"),
    ]
    assert train(words) == 3
    assert "opensora export" in capsys.readouterr().err


def test_shapes_configuration_goes_to_its_own_training(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[train_shapes_vae.TrainVAEConfig] = []
    monkeypatch.setattr(train_shapes_vae, "train_vae", configs.append)
    assert train([str(ROOT / "configs/tiny/train/vae.py"), "--stages", "1", "2", "3", "4"]) == 0
    assert configs[0].stages == (1, 2, 3, 4)
    assert configs[0].window == 32


def read_clip(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        return np.asarray(Image.open(path))[None]
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_inference_writes_what_it_measures(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(CONFIGS / "inference/video.py"), "--model.from_pretrained=tiny"]
    words += ["--image-size", "64", "64", "--data-path", str(table / "meta.csv"), "--dtype", "fp32"]
    words += ["--save-dir", str(tmp_path), "--no-sample"]
    assert reconstruct(words) == 0
    assert "latents: mean" in capsys.readouterr().out
    names = {path.name for path in tmp_path.glob("*.mp4")}
    stems = ("a-2", "b", "c", "a-5")
    assert names == {f"{s}_{k}.mp4" for s in stems for k in KINDS}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"] == 4
    assert list(summary["failed"]) == ["meta.csv:6 damaged.mp4"]
    assert summary["psnr"] > 28
    measured = rows(tmp_path)
    for row, stem in zip(measured, stems, strict=True):
        ori, rec, spatial = (read_clip(tmp_path / f"{stem}_{k}.mp4") for k in KINDS)
        assert ori.shape == rec.shape == spatial.shape == (17, 64, 64, 3)
        for made, value in ((rec, row["psnr"]), (spatial, row["psnr_spatial"])):
            error = ((ori.astype(float) - made) ** 2).mean()
            # Files hold colour at half the resolution, which hides a part of the errors.
            assert value - 1 < 10 * np.log10(255**2 / error) < value + 4
        assert read_metadata(tmp_path / f"{stem}_rec.mp4")["psnr"] == row["psnr"]
    assert summary["psnr"] == pytest.approx(sum(r["psnr"] for r in measured) / 4)
    vae = build_vae({}, source="tiny")[0]
    assert len(summary["latent_mean"]) == vae.latent_channels


def test_inference_takes_images(table: Path, tmp_path: Path) -> None:
    words = [str(CONFIGS / "inference/image.py"), "--ckpt-path", "tiny", "--dtype", "fp32"]
    words += ["--image-size", "64", "64", "--data-path", str(table / "images.csv")]
    assert reconstruct([*words, "--save-dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {f"still_{kind}.png" for kind in KINDS}
    (row,) = rows(tmp_path)
    ori, rec = (read_clip(tmp_path / f"still_{kind}.png").astype(float) for kind in KINDS[:2])
    assert 10 * np.log10(255**2 / ((ori - rec) ** 2).mean()) == pytest.approx(row["psnr"], abs=0.1)
    assert (read_clip(table / "still.png") == ori).all()


def test_similarity_is_torchmetrics(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    words = ["--ckpt-path", "tiny", "--num-frames", "5", "--image-size", "64", "64"]
    words += ["--data-path", str(table / "meta.csv"), "--num-samples", "1", "--no-save-clips"]
    assert reconstruct([*words, "--save-dir", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*.mp4"))
    (row,) = rows(tmp_path)
    assert 0.8 < row["ssim"] <= 1


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--data-path", "nowhere.csv"], 2, "does not exist"),
        ([], 2, "--data-path"),
        (["--dataset.type=VariableVideoTextDataset", "--data-path", "x.csv"], 2, "one size"),
        (["--num-sample", "3"], 2, "num"),
    ],
)
def test_inference_refuses_with_a_reason(
    words: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ["--ckpt-path", "tiny", "--num-frames", "5", "--image-size", "64", "64"]
    assert reconstruct([*base, *words, "--save-dir", str(tmp_path / "o")]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "o").exists()
