"""Check the VAEs against recorded tensors, published parameter names and diffusers' 2D VAE."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.errors import UsageError, WeightsError
from opensora.models.vae import (
    OPENSORA_VAE_V1_2,
    AutoencoderKL,
    AutoencoderKLConfig,
    CausalConv3d,
    Posterior,
    VAETemporal,
    VAETemporalConfig,
    VideoAutoencoder,
    VideoAutoencoderConfig,
)
from opensora.models.vae.temporal import interleave_frames

GOLDEN = Path(__file__).parents[1] / "golden"
# float32 rounding through ~60 convolutions of unit-variance activations
CLOSE = {"rtol": 1e-5, "atol": 2e-5}

TINY_SPATIAL = AutoencoderKLConfig(
    block_out_channels=(4, 4, 8, 8), latent_channels=6, norm_num_groups=2
)
TINY_TEMPORAL = VAETemporalConfig(
    in_out_channels=6, filters=4, num_res_blocks=1, channel_multipliers=(1, 1, 2, 2), num_groups=2
)
TINY = VideoAutoencoderConfig(TINY_SPATIAL, TINY_TEMPORAL, shift=0.1, scale=2.0)


class Golden:
    """Give the tensors and the decoded metadata of one recorded case."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata()

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def read(self, key: str) -> Any:
        """Return a metadata entry."""
        value = json.loads(self.metadata[key])
        return tuple(value) if isinstance(value, list) else value

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the state dict under a prefix."""
        start = f"sd.{prefix}"
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}

    def noise(self, frames: int) -> list[Tensor]:
        """Return the recorded noise in call order."""
        keys = [
            f"in.noise_{kind}{frames}.{i}" for kind in ("spatial", "temporal") for i in range(99)
        ]
        return [self.tensors[key] for key in keys if key in self.tensors]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build_pipeline(name: str) -> tuple[VideoAutoencoder, Golden]:
    golden = Golden(name)
    config = VideoAutoencoderConfig(
        AutoencoderKLConfig.from_dict(golden.read("kl_config")),
        VAETemporalConfig.from_dict(golden.read("temporal_config")),
        shift=golden.read("shift"),
        scale=golden.read("scale"),
        micro_frame_size=golden.read("micro_frame_size"),
        micro_batch_size=golden.read("micro_batch_size"),
        cal_loss=golden.read("cal_loss"),
    )
    vae = VideoAutoencoder(config)
    vae.load_state_dict(golden.weights())
    return vae, golden


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter so that no branch is near zero or near the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            spread = p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            p.copy_(torch.randn(p.shape, generator=generator) * spread + (p.ndim == 1))


# --- recorded tensors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kernel", "strides", "dilation"),
    [
        ("s2", 3, (2, 1, 1), 1),
        ("s1", 3, (1, 1, 1), 1),
        ("k1", 1, (1, 1, 1), 1),
        ("dil", (5, 3, 3), (1, 1, 1), 2),
    ],
)
def test_causal_conv_matches_recorded(
    name: str, kernel: Any, strides: tuple[int, int, int], dilation: int
) -> None:
    golden = Golden("causal_conv")
    weights = golden.weights(f"{name}.")
    out_channels, in_channels = weights["conv.weight"].shape[:2]
    conv = CausalConv3d(in_channels, out_channels, kernel, strides=strides, dilation=dilation)
    conv.load_state_dict(weights)
    pads = dict(zip(("s2", "s1", "k1", "dil"), golden.read("time_pads"), strict=True))
    assert conv.time_pad == pads[name]
    torch.testing.assert_close(conv(golden["in.x"]), golden[f"out.{name}"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vae_temporal", "vae_temporal_default_ds"])
def test_temporal_vae_matches_recorded(name: str) -> None:
    golden = Golden(name)
    vae = VAETemporal(VAETemporalConfig.from_dict(golden.read("config")))
    vae.load_state_dict(golden.weights())
    for frames in golden.read("frames"):
        posterior = vae.encode(golden[f"in.x{frames}"])
        torch.testing.assert_close(posterior.mean, golden[f"out.mean{frames}"], **CLOSE)
        torch.testing.assert_close(posterior.logvar, golden[f"out.logvar{frames}"], **CLOSE)
        torch.testing.assert_close(posterior.kl(), golden[f"out.kl{frames}"], **CLOSE)
        rec = vae.decode(posterior.mean, frames)
        torch.testing.assert_close(rec, golden[f"out.rec{frames}"], **CLOSE)
    for frames, size in golden.read("latent_size").items():
        assert vae.latent_frames(int(frames)) == size[0]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "noise"])
def test_pipeline_matches_recorded(mode: str) -> None:
    vae, golden = build_pipeline("vae_pipeline")
    for frames in golden.read("frames"):
        x, sample = golden[f"in.x{frames}"], mode == "noise"
        noise = golden.noise(frames) if sample else None
        z = vae.encode(x, sample=sample, noise=noise)
        torch.testing.assert_close(z, golden[f"out.{mode}.z{frames}"], **CLOSE)
        rec = vae.decode(z, frames)
        torch.testing.assert_close(rec, golden[f"out.{mode}.rec{frames}"], **CLOSE)
        if not sample:
            x_z = vae(x, sample=False).x_z
            torch.testing.assert_close(x_z, golden[f"out.zero.x_z{frames}"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "noise"])
def test_pipeline_for_losses_matches_recorded(mode: str) -> None:
    vae, golden = build_pipeline("vae_pipeline_cal_loss")
    for frames in golden.read("frames"):
        x, sample = golden[f"in.x{frames}"], mode == "noise"
        got = vae(x, sample=sample, noise=golden.noise(frames) if sample else None)
        tensors = got._asdict() | {
            "post_mean": got.posterior.mean,
            "post_logvar": got.posterior.logvar,
        }
        del tensors["posterior"]
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, golden[f"out.{mode}.{name}{frames}"], **CLOSE)
        z = vae.encode(x, sample=sample, noise=golden.noise(frames) if sample else None)
        torch.testing.assert_close(z, got.z)  # cal_loss: latents stay raw
        torch.testing.assert_close(vae.decode(z, frames), got.x_rec)


def test_latent_size_matches_recorded_table() -> None:
    table = json.loads((GOLDEN / "latent_size_table.json").read_text())
    with torch.device("meta"):
        models = {
            f"micro{'_none' if size is None else size}": VideoAutoencoder(
                VideoAutoencoderConfig(micro_frame_size=size)
            )
            for size in (17, None)
        }
    for frames, row in table["by_frames_240x426"].items():
        length = None if frames == "None" else int(frames)
        for name, size in row.items():
            assert models[name].get_latent_size((length, 240, 426)) == tuple(size)
    for name, size in table["by_hw_51f"].items():
        height, width = map(int, name.split("x"))
        assert models["micro17"].get_latent_size((51, height, width)) == tuple(size)


# --- published checkpoints ------------------------------------------------------------------


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        vae = VideoAutoencoder(OPENSORA_VAE_V1_2)
    published = json.loads((GOLDEN / "keys_vae.json").read_text())
    assert {k: list(v.shape) for k, v in vae.state_dict().items()} == published
    assert sum(p.numel() for p in vae.parameters()) == 393341007


PUBLISHED_CONFIG = {
    "architectures": ["VideoAutoencoderPipeline"],
    "model_type": "VideoAutoencoderPipeline",
    "cal_loss": False,
    "freeze_vae_2d": False,
    "from_pretrained": None,
    "micro_frame_size": 17,
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98],
    "torch_dtype": "float32",
    "transformers_version": "4.36.2",
    "vae_2d": {
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "local_files_only": True,
        "micro_batch_size": 4,
        "subfolder": "vae",
        "type": "VideoAutoencoderKL",
    },
    "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
}


def test_published_config_is_the_preset() -> None:
    assert VideoAutoencoderConfig.from_dict(PUBLISHED_CONFIG) == OPENSORA_VAE_V1_2


def test_release_name_starts_from_the_preset() -> None:
    config = VideoAutoencoderConfig.from_dict(
        {"type": "OpenSoraVAE_V1_2", "micro_frame_size": 17, "micro_batch_size": 2}
    )
    assert config.micro_batch_size == 2
    assert config.scale == OPENSORA_VAE_V1_2.scale


@pytest.mark.parametrize("config", [OPENSORA_VAE_V1_2, TINY])
def test_config_survives_json(config: VideoAutoencoderConfig) -> None:
    assert VideoAutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**PUBLISHED_CONFIG, "micro_frame_sise": 17}, "did you mean 'micro_frame_size'"),
        ({**PUBLISHED_CONFIG, "vae_2d": {"from_pretrained": "a/b"}}, "'a/b' is unknown"),
        ({**PUBLISHED_CONFIG, "vae_temporal": {"type": "Other"}}, "type 'Other' is not supported"),
        ({"vae_2d": PUBLISHED_CONFIG["vae_2d"]}, "'vae_temporal' is missing"),
        ({**PUBLISHED_CONFIG, "shift": [0.1, 0.2]}, "shift has 2 values"),
        ({"type": "OpenSoraVAE_V9"}, "OpenSoraVAE_V9"),
    ],
)
def test_wrong_config_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VideoAutoencoderConfig.from_dict(data)


def test_diffusers_config_is_read() -> None:
    data = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.18.0",
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "force_upcast": True,
        "latents_mean": None,
    }
    assert AutoencoderKLConfig.from_dict(data).block_out_channels == (4, 8)
    data["down_block_types"] = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    with pytest.raises(UsageError, match="AttnDownEncoderBlock2D"):
        AutoencoderKLConfig.from_dict(data)


# --- the 2D VAE against diffusers -----------------------------------------------------------

KL_CASES = {
    "one_level": ({"block_out_channels": (8,), "norm_num_groups": 4}, (5, 7)),
    "two_levels": ({"block_out_channels": (6, 12), "norm_num_groups": 3}, (9, 14)),
    "four_levels_odd": (
        {"block_out_channels": (4, 8, 8, 12), "norm_num_groups": 2, "layers_per_block": 2},
        (27, 41),
    ),
    "no_attention_no_quant": (
        {
            "block_out_channels": (4, 8, 4),
            "norm_num_groups": 2,
            "mid_block_add_attention": False,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "latent_channels": 5,
        },
        (16, 8),
    ),
}


@functools.cache
def diffusers_autoencoder() -> Any:
    """Import diffusers' class where it cannot mistake the folder `kernels` for PyPI's package."""
    with pytest.MonkeyPatch.context() as patch:
        root = Path(__file__).parents[2]
        patch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != root])
        from diffusers.models.autoencoders import autoencoder_kl
    return autoencoder_kl.AutoencoderKL


def build_pair(case: str) -> tuple[AutoencoderKL, Any, Tensor]:
    """Return our model, diffusers' model with equal random weights, and images."""
    fields, size = KL_CASES[case]
    ours = AutoencoderKL(AutoencoderKLConfig.from_dict(fields))
    theirs = diffusers_autoencoder()(**ours.config.to_dict())
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("case", KL_CASES)
def test_autoencoder_kl_matches_diffusers(case: str) -> None:
    ours, theirs, x = build_pair(case)
    expected = theirs.encode(x).latent_dist
    got = ours.encode(x)
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.logvar, expected.logvar, rtol=1e-4, atol=1e-4)
    z = torch.randn(got.mean.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_autoencoder_kl_gradients_match_diffusers() -> None:
    ours, theirs, x = (m.double() for m in build_pair("four_levels_odd"))
    x = x[:1, :, :17, :18]
    z = ours.encode(x)
    (ours.decode(z.mean).square().mean() + z.logvar.mean()).backward()
    z = theirs.encode(x).latent_dist
    (theirs.decode(z.mean).sample.square().mean() + z.logvar.mean()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


@torch.no_grad()
def test_old_attention_names_load() -> None:
    ours, _, x = build_pair("two_levels")
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in ours.state_dict().items():
        for new_name, old_name in renamed.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = value
    assert sum("proj_attn" in key for key in old) == 4
    fresh = AutoencoderKL(ours.config)
    fresh.load_state_dict(old, strict=True)
    torch.testing.assert_close(fresh.encode(x).mean, ours.encode(x).mean, rtol=0, atol=0)


@torch.no_grad()
def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    vae = VideoAutoencoder(TINY)
    for model in (vae, vae.spatial_vae.module, vae.temporal_vae):
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.config == model.config
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


@torch.no_grad()
def test_old_attention_names_load_from_a_folder(tmp_path: Path) -> None:
    ours, _, x = build_pair("two_levels")
    ours.save_pretrained(tmp_path)
    old = {
        k.replace("to_q", "query").replace("to_out.0", "proj_attn"): v.contiguous()
        for k, v in ours.state_dict().items()
    }
    save_file(old, tmp_path / "model.safetensors")
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.encode(x).mean, ours.encode(x).mean, rtol=0, atol=0)


def test_published_config_is_inferred_from_shapes() -> None:
    published = json.loads((GOLDEN / "keys_vae.json").read_text())
    shapes = {name: tuple(shape) for name, shape in published.items()}
    assert VideoAutoencoder.infer_config(shapes) == OPENSORA_VAE_V1_2
    shapes["temporal_vae.encoder.conv_in.conv.weight"] = (32, 4, 3, 3, 3)
    with pytest.raises(WeightsError, match=r"config\.json"):
        VideoAutoencoder.infer_config(shapes)


# --- properties -----------------------------------------------------------------------------


def test_interleaved_frames_are_channel_major() -> None:
    x = torch.arange(2 * 3 * 2).view(1, 6, 2, 1, 1)
    y = interleave_frames(x)
    for c in range(3):
        for t in range(2):
            for s in range(2):
                assert y[0, c, 2 * t + s] == x[0, 2 * c + s, t]


@torch.no_grad()
def test_causal_conv_ignores_later_frames() -> None:
    conv = CausalConv3d(6, 4, 3)
    x = torch.randn(1, 6, 6, 4, 4)
    before = conv(x)
    x[:, :, 4:] += 1
    after = conv(x)
    torch.testing.assert_close(after[:, :, :4], before[:, :, :4], rtol=0, atol=0)
    assert not torch.allclose(after[:, :, 4:], before[:, :, 4:])


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_no_more_than_a_micro_batch_and_a_chunk_at_once(batch: int) -> None:
    vae = VideoAutoencoder(TINY)
    randomise(vae)
    sizes: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for name, seen in sizes.items():
        module = getattr(vae.spatial_vae.module, name)
        module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
    chunks: list[int] = []
    vae.temporal_vae.decoder.register_forward_pre_hook(lambda _, a: chunks.append(a[0].shape[2]))
    done: list[tuple[int, int]] = []
    x = torch.randn(batch, 3, 18, 16, 16)
    z = vae.encode(x, sample=False)
    y = vae.decode(z, 18, progress=lambda i, n: done.append((i, n)))
    total = 18 * batch
    for seen in sizes.values():
        assert max(seen) == 4
        assert sum(seen) == total
    assert chunks == [5, 1]
    assert done[-1] == (total, total)
    assert len(done) == len(sizes["decoder"])
    vae.micro_batch_size = None
    torch.testing.assert_close(vae.encode(x, sample=False), z)
    torch.testing.assert_close(vae.decode(z, 18), y)


def test_gradients_do_not_depend_on_micro_batches() -> None:
    vae = VideoAutoencoder(TINY).double()
    randomise(vae)
    x = torch.randn(2, 3, 5, 8, 8, dtype=torch.float64)
    grads = []
    for size in (3, None):
        vae.micro_batch_size = size
        vae.zero_grad()
        result = vae(x, sample=False)
        (result.x_rec.square().mean() + result.posterior.kl().mean()).backward()
        grads.append({k: p.grad.clone() for k, p in vae.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(list(vae.parameters()))
    torch.testing.assert_close(grads[0], grads[1])


@torch.no_grad()
def test_decode_inverts_shift_and_scale() -> None:
    vae = VideoAutoencoder(TINY)
    randomise(vae)
    x = torch.randn(1, 3, 5, 8, 8)
    raw = vae(x, sample=False)
    z = vae.encode(x, sample=False)
    torch.testing.assert_close(z, (raw.z - 0.1) / 2.0)
    torch.testing.assert_close(vae.decode(z, 5), raw.x_rec)


@torch.no_grad()
def test_generator_makes_samples_repeatable() -> None:
    vae = VideoAutoencoder(TINY)
    randomise(vae)
    x = torch.randn(1, 3, 5, 8, 8)
    a, b, c = (vae.encode(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


@torch.no_grad()
def test_bfloat16_channels_last_stays_close() -> None:
    vae = VideoAutoencoder(TINY)
    randomise(vae)
    x = torch.randn(1, 3, 5, 16, 16).clamp(-1, 1)
    z = vae.encode(x, sample=False)
    vae.bfloat16()
    vae.spatial_vae.to(memory_format=torch.channels_last)
    vae.temporal_vae.to(memory_format=torch.channels_last_3d)
    z16 = vae.encode(x, sample=False)
    assert z16.dtype == torch.bfloat16
    assert (z16.float() - z).norm() < 0.05 * z.norm()
    assert vae.decode(z16, 5).isfinite().all()


def test_posterior_formulas() -> None:
    moments = torch.randn(2, 8, 3, 4, dtype=torch.float64) * 20
    posterior = Posterior.from_moments(moments)
    mean, logvar = moments[:, :4], moments[:, 4:].clamp(-30, 20)
    assert logvar.max() == 20
    assert logvar.min() == -30
    noise = torch.randn_like(mean)
    torch.testing.assert_close(posterior.sample(noise=noise), mean + (logvar / 2).exp() * noise)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), kl.double().sum((1, 2, 3)), rtol=1e-6, atol=1e-6)
    assert posterior.mode() is posterior.mean


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda v: v.encode(torch.zeros(3, 5, 8, 8)),
            r"\[B, 3, T >= 1, H, W\], got \(3, 5, 8, 8\)",
        ),
        (lambda v: v.encode(torch.zeros(1, 4, 5, 8, 8)), r"got \(1, 4, 5, 8, 8\)"),
        (lambda v: v.encode(torch.zeros(1, 3, 0, 8, 8)), r"got \(1, 3, 0, 8, 8\)"),
        (lambda v: v.encode(torch.zeros(1, 3, 1, 7, 8)), r"at least 8 pixels, got \(7, 8\)"),
        (lambda v: v.encode(torch.zeros(1, 3, 1, 8, 8), noise=[]), "noise ran out"),
        (lambda v: v.decode(torch.zeros(1, 4, 5, 1, 1), 18), r"\[B, 4, 6, h, w\], got \(1, 4, 5"),
        (lambda v: v.decode(torch.zeros(1, 6, 5, 1, 1), 17), r"\[B, 4, 5, h, w\], got \(1, 6, 5"),
        (lambda v: v.decode(torch.zeros(1, 4, 0, 1, 1), 0), "num_frames >= 1, got 0"),
        (lambda v: v.decode(torch.zeros(1, 4, 0, 1, 1), -3), "num_frames >= 1, got -3"),
        (lambda v: v.temporal_vae.decode(torch.zeros(1, 4, 2, 1, 1), 9), "3 latent frames, got 2"),
        (lambda v: v.temporal_vae.encode(torch.zeros(1, 4, 2, 1, 1)), r"got \(1, 4, 2, 1, 1\)"),
        (lambda v: v.spatial_decode(torch.zeros(1, 4, 2, 1, 1)), r"\[B, 6, h, w\], got \(2, 4"),
    ],
)
def test_wrong_shapes_name_expected_and_got(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message), torch.no_grad():
        call(VideoAutoencoder(TINY))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AutoencoderKLConfig(block_out_channels=(6,), norm_num_groups=4),
            "does not divide",
        ),
        (lambda: AutoencoderKLConfig(act_fn="gelu"), "act_fn 'gelu'"),
        (lambda: AutoencoderKLConfig(up_block_types=("UpDecoderBlock2D",) * 2), "has 2 entries"),
        (lambda: VAETemporalConfig(temporal_downsample=(True,)), "expected 3"),
        (lambda: VAETemporalConfig(filters=24), "does not divide"),
        (lambda: VideoAutoencoderConfig(TINY_SPATIAL), "must equal spatial latent_channels 6"),
        (lambda: VideoAutoencoderConfig(micro_frame_size=0), "micro_frame_size must be at least 1"),
    ],
)
def test_models_that_cannot_be_built_are_named(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
