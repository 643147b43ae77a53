"""Check VAE losses, discriminators and LPIPS against recorded tensors and independent sums."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.errors import UsageError, WeightsError
from opensora.models.vae import VideoAutoencoder, VideoAutoencoderConfig
from opensora.models.vae.discriminator import NLayerDiscriminator, build_discriminator
from opensora.models.vae.losses import (
    adaptive_weight,
    generator_loss,
    kl_loss,
    reconstruction_loss,
)
from opensora.models.vae.lpips import LPIPS

GOLDEN = Path(__file__).parents[1] / "golden"


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


# --- losses ---------------------------------------------------------------------------------


def test_the_adaptive_weight_takes_no_gradient() -> None:
    last = torch.ones(2, 2, requires_grad=True)
    weight = adaptive_weight((3 * last).square().sum(), generator_loss(last, "hinge"), last)
    assert weight.item() == pytest.approx(36 / (0.5 + 1e-4))
    assert not weight.requires_grad


def test_losses_of_a_recorded_model_match_a_plain_sum() -> None:
    tensors, metadata = read("vae_pipeline_cal_loss")
    vae = VideoAutoencoder(
        VideoAutoencoderConfig.from_dict(
            {
                "vae_2d": json.loads(metadata["kl_config"]),
                "vae_temporal": json.loads(metadata["temporal_config"]),
                "shift": 0.0,
                "scale": 1.0,
                "micro_frame_size": None,
                "cal_loss": True,
            }
        )
    )
    vae.load_state_dict({k[3:]: v for k, v in tensors.items() if k.startswith("sd.")})
    for frames in (1, 9):
        x = tensors[f"in.x{frames}"]
        out = vae(x, sample=False)
        latents = vae.reconstruct_latents(x, sample=False)
        for name, value in (("x_rec", out.x_rec), ("z", latents.z), ("x_z", latents.x_z)):
            expected = tensors[f"out.zero.{name}{frames}"]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-5)
        expected = tensors[f"out.zero.x_z_rec{frames}"]
        torch.testing.assert_close(latents.x_z_rec, expected, rtol=1e-5, atol=2e-5)
        error = (x - tensors[f"out.zero.x_rec{frames}"]).abs().sum() / frames
        torch.testing.assert_close(reconstruction_loss(x, out.x_rec), error, rtol=1e-4, atol=0)
        mean, logvar = (tensors[f"out.zero.post_{n}{frames}"] for n in ("mean", "logvar"))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
        torch.testing.assert_close(kl_loss(out.posterior), kl, rtol=1e-4, atol=0)


def test_reconstruction_loss_counts_frames_and_uses_logvar() -> None:
    torch.manual_seed(0)
    x, r = torch.randn(2, 3, 5, 4, 4), torch.randn(2, 3, 5, 4, 4)

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape == (10, 3, 4, 4)
        return torch.arange(10.0)

    loss = reconstruction_loss(x, r, perceptual=perceptual, perceptual_weight=0.1, logvar=0.7)
    total = 0.0
    for frame in range(10):
        b, t = divmod(frame, 5)
        error = (x[b, :, t] - r[b, :, t]).abs() + 0.1 * frame
        total += (error / torch.tensor(0.7).exp() + 0.7).sum()
    torch.testing.assert_close(loss, torch.as_tensor(total) / 10)


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.ones(1, 3, 2, 64, 64, dtype=torch.bfloat16)
    loss = reconstruction_loss(x, torch.zeros_like(x))
    assert loss.dtype == torch.float32
    assert loss == 3 * 64 * 64


# --- discriminators -------------------------------------------------------------------------


def test_discriminator_of_published_size_has_published_names() -> None:
    network = build_discriminator(
        {"type": "NLayerDiscriminator", "input_nc": 3, "n_layers": 3, "use_actnorm": False}
    )
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    assert [name for name, _ in network.named_parameters()][:3] == [
        "main.0.weight",
        "main.0.bias",
        "main.2.weight",
    ]
    assert network.main[-1].weight.shape == (1, 512, 4, 4)


@pytest.mark.parametrize(("dims", "frames"), [(2, 1), (3, 8)])
def test_least_size_is_exact(dims: int, frames: int) -> None:
    network = NLayerDiscriminator(dims, ndf=2, n_layers=2)
    assert network.least_size == (frames, 12)
    assert min(network.judge(torch.zeros(1, 3, frames, 12, 12)).shape) == 1
    with pytest.raises(UsageError, match="too small"):
        network.judge(torch.zeros(1, 3, frames, 12, 11))
    if dims == 3:
        with pytest.raises(UsageError, match="8 frames"):
            network.judge(torch.zeros(1, 3, 7, 12, 12))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "DISCRIMINATOR_3D"}, "NLayerDiscriminator"),
        ({"n_layer": 3}, "did you mean n_layers"),
        ({"n_layers": 0}, "from 1"),
        ({"use_actnorm": True}, "use_actnorm"),
    ],
)
def test_bad_discriminator_is_refused(entry: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_discriminator(entry)


def test_discriminator_weights_load_strictly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NLayerDiscriminator(ndf=2, n_layers=1)
    path = tmp_path / "disc.safetensors"
    save_file({f"discriminator.{k}": v for k, v in network.state_dict().items()}, path)
    entry = {"ndf": 2, "n_layers": 1, "from_pretrained": str(path)}
    loaded = build_discriminator(entry).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in network.state_dict().items())
    with pytest.raises(WeightsError, match="check type, ndf"):
        build_discriminator({**entry, "ndf": 4})


# --- LPIPS ----------------------------------------------------------------------------------

NARROW = ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8))


@pytest.fixture
def narrow() -> LPIPS:
    torch.manual_seed(0)
    network = LPIPS(NARROW)
    for parameter in network.lins:
        torch.nn.init.uniform_(parameter)
    return network.requires_grad_(False)


def test_lpips_matches_a_plain_computation(narrow: LPIPS) -> None:
    x, y = torch.rand(3, 3, 33, 40) * 2 - 1, torch.rand(3, 3, 33, 40) * 2 - 1
    convs = list(narrow.features.values())
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    expected = []
    for a, b in zip(x, y, strict=True):
        a, b = ((image - shift) / scale for image in (a, b))
        total, index = torch.zeros(()), 0
        for level, widths in enumerate(NARROW):
            if level:
                a, b = F.max_pool2d(a, 2, 2), F.max_pool2d(b, 2, 2)
            for _ in widths:
                conv = convs[index]
                a = F.conv2d(a[None], conv.weight, conv.bias, padding=1)[0].relu()
                b = F.conv2d(b[None], conv.weight, conv.bias, padding=1)[0].relu()
                index += 1
            unit_a, unit_b = (f / (f.norm(dim=0, keepdim=True) + 1e-10) for f in (a, b))
            weighted = narrow.lins[level][:, None, None] * (unit_a - unit_b) ** 2
            total = total + weighted.sum(0).mean()
        expected.append(total)
    torch.testing.assert_close(narrow(x, y), torch.stack(expected))


def test_lpips_is_zero_for_equal_images_symmetric_and_has_a_gradient(narrow: LPIPS) -> None:
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16).requires_grad_()
    assert narrow(x, x).abs().max() == 0
    torch.testing.assert_close(narrow(x, y), narrow(y, x))
    distance = narrow(x, y)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    distance.sum().backward()
    assert y.grad is not None
    assert y.grad.abs().max() > 0
    with pytest.raises(UsageError, match="16 or more"):
        narrow(x[..., :15], x[..., :15])


def test_lpips_reads_the_published_layouts(tmp_path: Path) -> None:
    full = LPIPS()
    state = full.state_dict()
    assert next(iter(state)) == "features.0.weight"
    assert "features.28.bias" in state
    vgg = {k: v.half() for k, v in state.items() if k.startswith("features.")}
    lins = {
        f"lin{i}.model.1.weight": torch.rand(1, p.numel(), 1, 1) for i, p in enumerate(full.lins)
    }
    folder = tmp_path / "two"
    folder.mkdir()
    torch.save({**vgg, "classifier.0.weight": torch.zeros(2)}, folder / "vgg16-397923af.pth")
    torch.save(lins, folder / "vgg.pth")
    loaded = LPIPS.from_files(folder)
    torch.testing.assert_close(loaded.lins[3], lins["lin3.model.1.weight"].flatten())
    torch.testing.assert_close(
        loaded.features["28"].weight, vgg["features.28.weight"].float(), rtol=0, atol=0
    )
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(WeightsError, match=r"lin0\.model\.1\.weight"):
        LPIPS.from_files(folder / "vgg16-397923af.pth")
    with pytest.raises(UsageError, match="vgg16-397923af"):
        LPIPS.from_files(tmp_path / "nowhere.pth")
