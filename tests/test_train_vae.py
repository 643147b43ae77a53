"""Check VAE training on tables of generated clips, at tiny width: losses, freezing, resuming."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.data.batch import Entry, Sample, SampleError, Size
from opensora.errors import NonFiniteError, UsageError, WeightsError
from opensora.models.vae import VideoAutoencoder
from opensora.models.vae.discriminator import build_discriminator
from opensora.models.vae.loading import build_vae
from opensora.models.vae.losses import generator_loss, reconstruction_loss
from opensora.models.vae.lpips import LPIPS
from opensora.train_vae import train_vae
from opensora.train_vae_config import TrainVAEConfig
from opensora.training.vae_objective import REPORTED, VAEObjective, prepare, shorten

MODEL: dict[str, Any] = {
    "type": "VideoAutoencoderPipeline",
    "freeze_vae_2d": True,
    "cal_loss": True,
    "vae_2d": {
        "block_out_channels": (4, 4, 4, 4),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
    },
    "vae_temporal": {
        "filters": 4,
        "num_res_blocks": 1,
        "channel_multipliers": (1, 1, 1, 2),
        "num_groups": 2,
    },
}
STAGE1 = TrainVAEConfig(
    model=MODEL,
    num_frames=5,
    image_size=(16, 16),
    batch_size=2,
    num_workers=0,
    dtype="fp32",
    use_z_rec_loss=True,
    use_image_identity_loss=True,
    mixed_strategy="mixed_video_image",
    mixed_image_ratio=0.2,
    lr=3e-3,
    epochs=3,
    grad_clip=1.0,
)
STAGE3 = dataclasses.replace(
    STAGE1,
    model={**MODEL, "freeze_vae_2d": False},
    use_z_rec_loss=False,
    use_image_identity_loss=False,
    use_real_rec_loss=True,
    perceptual_loss_weight=0.0,
    mixed_strategy="mixed_video_random",
)
GAN = {"type": "NLayerDiscriminator", "ndf": 4, "n_layers": 1}
ADVERSARIAL = dataclasses.replace(
    STAGE3, discriminator=GAN, lecam_loss_weight=0.1, mixed_strategy=None
)


class Waves:
    """Clips of a wave that moves; every row has its own direction and speed."""

    def __init__(self, rows: int = 16, broken: Sequence[int] = (), spoilt: Sequence[int] = ()):
        self.rows, self.broken, self.spoilt = rows, broken, spoilt

    def entries(self) -> list[Entry]:
        return [Entry(f"clip {row}", 40, 16, 16, 24.0) for row in range(self.rows)]

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        if index in self.broken:
            raise SampleError("cut off")
        own = random.Random(index)
        t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij")
        phase = own.uniform(-0.5, 0.5) * x + own.uniform(-0.5, 0.5) * y + own.uniform(0, 1) * t
        video = torch.stack([torch.sin(phase + c + rng.random()) for c in range(3)])
        return Sample(video=video * (float("nan") if index in self.spoilt else 1.0), text="wave")


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder.parent / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results(folder: Path) -> list[dict[str, float]]:
    """Return the metrics without what depends on the clock."""
    keys = ("step", "grad_norm", *REPORTED)
    return [{k: row[k] for k in keys if k in row} for row in metrics(folder)]


def train(config: TrainVAEConfig, outputs: Path, clips: Any = None, **changes: Any) -> Path:
    config = dataclasses.replace(config, outputs=str(outputs), **changes)
    return train_vae(config, clips or Waves())


def weights(folder: Path) -> dict[str, Tensor]:
    return VideoAutoencoder.from_pretrained(folder).state_dict()


# --- stages ---------------------------------------------------------------------------------


def test_first_stage_learns_latents_and_leaves_the_2d_vae_alone(tmp_path: Path) -> None:
    torch.manual_seed(STAGE1.seed)
    start = build_vae(MODEL)[0].state_dict()
    folder = train(STAGE1, tmp_path)
    rows = metrics(folder)
    assert len(rows) == 24
    first, last = (sum(r["z_nll"] for r in part) for part in (rows[:6], rows[-6:]))
    assert last < 0.8 * first
    assert {row["frames"] for row in rows} == {1.0, 5.0}
    assert all(("identity" in row) == (row["frames"] == 1) for row in rows)
    assert not any("nll" in row or "kl" in row for row in rows)
    end = weights(folder)
    for name, value in end.items():
        if name.startswith("spatial_vae."):
            assert torch.equal(value, start[name]), name
    moved = [n for n in end if not torch.equal(end[n], start[n])]
    assert any("temporal_vae.encoder" in n for n in moved)
    assert any("temporal_vae.decoder" in n for n in moved)


def test_second_stage_goes_on_from_the_folder_of_the_first(tmp_path: Path) -> None:
    first = train(STAGE1, tmp_path / "vae_stage1", epochs=1)
    model = {
        "type": "OpenSoraVAE_V1_2",
        "freeze_vae_2d": False,
        "from_pretrained": str(tmp_path / "vae_stage1"),
        "cal_loss": True,
    }
    second = train(STAGE1, tmp_path / "two", model=model, epochs=1, weight_decay=0.1)
    start, end = weights(first), weights(second)
    changed = {name for name in end if not torch.equal(end[name], start[name])}
    assert any(name.startswith("spatial_vae.module.encoder") for name in changed)
    # No loss reaches the 2D decoder: neither gradients nor decay may move it.
    assert not any(name.startswith("spatial_vae.module.decoder") for name in changed)
    assert not VideoAutoencoder.from_pretrained(second).config.cal_loss


def test_third_stage_learns_pixels_on_random_lengths(tmp_path: Path) -> None:
    folder = train(STAGE3, tmp_path, epochs=5, num_workers=2, lr=1e-2)
    rows = metrics(folder)
    first, last = (sum(r["psnr"] for r in part) / 16 for part in (rows[:16], rows[-16:]))
    assert last > first + 0.1
    assert {row["frames"] for row in rows} == {1.0, 2.0, 3.0, 4.0, 5.0}
    for row in rows:
        assert row["loss"] == pytest.approx(row["nll"] + row["kl"], rel=1e-5)


def test_discriminator_learns_beside_the_vae(tmp_path: Path) -> None:
    folder = train(ADVERSARIAL, tmp_path, discriminator_start=3, epochs=1)
    rows = metrics(folder)
    assert ["disc" in row for row in rows] == [False] * 3 + [True] * 5
    assert rows[3]["adaptive"] > 0
    assert rows[-1]["disc"] < rows[3]["disc"]
    trained = {"discriminator": {**GAN, "from_pretrained": str(folder.parent)}}
    path = str(folder.parent / "discriminator.safetensors")
    trained["discriminator"]["from_pretrained"] = path
    again = train(ADVERSARIAL, tmp_path, epochs=1, **trained)
    assert metrics(again)[0]["disc"] < rows[3]["disc"]


def test_bfloat16_and_recomputed_blocks_train_alike(tmp_path: Path) -> None:
    few = Waves(8)
    plain = metrics(train(STAGE3, tmp_path / "a", few, epochs=1))
    again = metrics(train(STAGE3, tmp_path / "b", few, epochs=1, grad_checkpoint=True))
    assert [r["loss"] for r in again] == [r["loss"] for r in plain]
    assert [r["grad_norm"] for r in again] == pytest.approx(
        [r["grad_norm"] for r in plain], rel=1e-5
    )
    half = metrics(train(STAGE3, tmp_path / "c", few, epochs=1, dtype="bf16"))
    assert [r["loss"] for r in half] == pytest.approx([r["loss"] for r in plain], rel=0.05)


# --- rules ----------------------------------------------------------------------------------


def test_mixed_strategies_depend_on_seed_and_batch_number_alone() -> None:
    video = torch.zeros(1, 3, 9, 8, 8)
    lengths = [shorten(video, STAGE3, n).shape[2] for n in range(400)]
    assert set(lengths) == set(range(1, 10))
    assert lengths == [shorten(video, STAGE3, n).shape[2] for n in range(400)]
    other = dataclasses.replace(STAGE3, seed=7)
    assert lengths != [shorten(video, other, n).shape[2] for n in range(400)]
    images = sum(shorten(video, STAGE1, n).shape[2] == 1 for n in range(2000))
    assert 340 < images < 460
    alone = dataclasses.replace(STAGE1, mixed_strategy=None)
    assert shorten(video, alone, 0) is video


def test_adaptive_weight_equals_the_ratio_of_gradient_norms() -> None:
    config = dataclasses.replace(ADVERSARIAL, kl_loss_weight=0.0, grad_checkpoint=True)
    torch.manual_seed(0)
    vae = build_vae(config.model)[0]
    prepare(vae, config)
    judge = build_discriminator(GAN).train()
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    torch.manual_seed(1)
    told = VAEObjective(config, vae, judge).backward(video, 0)
    torch.manual_seed(1)
    made = vae(video).x_rec
    last = vae.temporal_vae.decoder.conv_out.conv.weight
    nll = reconstruction_loss(video, made)
    judge.load_state_dict(judge.state_dict())
    hinge = generator_loss(judge.judge(made), "hinge")
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, hinge)]
    assert told["adaptive"] == pytest.approx(0.5 * float(norms[0] / (norms[1] + 1e-4)), rel=1e-4)
    assert told["adversarial"] == pytest.approx(told["adaptive"] * hinge.item(), rel=1e-4)
    assert told["loss"] == pytest.approx(told["nll"] + told["adversarial"], rel=1e-5)


def test_decoder_loss_leaves_no_gradient_in_the_discriminator() -> None:
    config = dataclasses.replace(ADVERSARIAL, discriminator_factor=0.0, lecam_loss_weight=None)
    vae = build_vae(config.model)[0]
    prepare(vae, config)
    judge = build_discriminator(GAN)
    VAEObjective(config, vae, judge).backward(torch.rand(1, 3, 5, 16, 16), 0)
    assert all(p.grad is None or not p.grad.any() for p in judge.parameters())
    assert all(p.requires_grad for p in judge.parameters())


def test_accumulated_batches_equal_their_mean(tmp_path: Path) -> None:
    rows = metrics(train(STAGE3, tmp_path / "a", epochs=1, accumulation_steps=2, lr=0.0))
    alone = metrics(train(STAGE3, tmp_path / "b", epochs=1, lr=0.0))
    pairs = [(alone[2 * i]["loss"] + alone[2 * i + 1]["loss"]) / 2 for i in range(4)]
    assert [row["loss"] for row in rows] == pytest.approx(pairs, rel=1e-6)


def test_perceptual_distance_enters_the_loss() -> None:
    config = dataclasses.replace(STAGE3, perceptual_loss_weight=0.1)
    vae = build_vae(config.model)[0]
    prepare(vae, config)
    network = LPIPS([(4,), (4,)])
    for weight in network.lins:
        torch.nn.init.ones_(weight)
    video = torch.rand(2, 3, 2, 16, 16)
    told = []
    for perceptual in (None, network):
        torch.manual_seed(0)
        told.append(VAEObjective(config, vae, None, perceptual).backward(video, 0))
    torch.manual_seed(0)
    made = vae(video).x_rec.transpose(1, 2).flatten(0, 1)
    distance = network(video.transpose(1, 2).flatten(0, 1), made)
    # The distance of a frame is added to each of its values.
    expected = told[0]["nll"] + 0.1 * distance.mean().item() * 3 * 16 * 16
    assert told[1]["nll"] == pytest.approx(expected, rel=1e-5)


# --- resuming and failures ------------------------------------------------------------------


@pytest.mark.parametrize("config", [STAGE1, ADVERSARIAL], ids=["latents", "adversarial"])
def test_resumed_run_is_exact(tmp_path: Path, config: TrainVAEConfig) -> None:
    config = dataclasses.replace(config, epochs=1, ckpt_every=2, ema_decay=0.9)
    whole = train(config, tmp_path / "whole")

    class StoppedError(Exception):
        pass

    class Stopping(Waves):
        count = 0

        def load(self, index: int, size: Size, rng: random.Random) -> Sample:
            self.count += 1
            if self.count > 10:
                raise StoppedError
            return super().load(index, size, rng)

    with pytest.raises(StoppedError):
        train(config, tmp_path / "cut", Stopping())
    cut = train(config, tmp_path / "cut", load="latest")
    for name in ("vae/model.safetensors", "vae/config.json", "discriminator.safetensors"):
        if (whole.parent / name).exists():
            assert (cut.parent / name).read_bytes() == (whole.parent / name).read_bytes(), name
    assert results(cut) == results(whole)
    assert len(results(cut)) == 8


def test_rows_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    folder = train(STAGE1, tmp_path, Waves(8, broken=[1, 2, 5]), epochs=2, batch_size=1)
    assert len(metrics(folder)) == 16
    assert "cut off" in (folder.parent / "quarantine.jsonl").read_text()


def test_clips_with_nan_are_skipped_and_named(tmp_path: Path) -> None:
    folder = train(STAGE3, tmp_path, Waves(8, spoilt=[3]), epochs=1, batch_size=1)
    assert len(metrics(folder)) == 7
    (line,) = (folder.parent / "bad_steps.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == ["clip 3"]
    assert all(value.isfinite().all() for value in weights(folder).values())


def test_nan_without_a_checkpoint_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="no checkpoint"):
        train(STAGE3, tmp_path, Waves(8, spoilt=range(8)), epochs=1, batch_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"type": "VariableVideoTextDataset"}}, "VideoTextDataset"),
        ({"use_z_rec_loss": False}, "no reconstruction loss"),
        ({"use_real_rec_loss": True}, "vgg16-397923af"),
        (
            {"lecam_loss_weight": 0.1, "discriminator_loss_type": "vanilla"},
            "goes with discriminator_loss_type 'hinge'",
        ),
        ({"num_frames": None}, "--num-frames"),
        ({"image_size": None}, "--image-size"),
        ({"batch_size": 17}, "smaller --batch-size"),
        (
            {"discriminator": {**GAN, "n_layers": 3}, "perceptual_loss_weight": 0.0},
            "use fewer n_layers",
        ),
        (
            {"model": {**MODEL, "vae_temporal": {**MODEL["vae_temporal"], "embed_dim": 6}}},
            "6 channels",
        ),
        ({"model": {**MODEL, "freeze_vae2d": True}}, "did you mean"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(STAGE1, tmp_path, **changes)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_missing_2d_vae_says_what_to_type(tmp_path: Path) -> None:
    model = {**MODEL, "vae_2d": {**MODEL["vae_2d"], "from_pretrained": str(tmp_path / "none")}}
    with pytest.raises(WeightsError, match=r"--model\.vae_2d\.from_pretrained"):
        train(STAGE1, tmp_path, model=model)
