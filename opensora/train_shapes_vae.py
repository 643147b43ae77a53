"""Train a video VAE on clips of moving shapes, its 2D part first.

    python scripts/train_vae.py configs/tiny/train/vae.py

Four stages follow each other: single frames through the 2D part; 2D latents through the temporal
part; both together on small windows around the moving shape, where all the detail is; both together
on whole frames. Starting with the third leaves the loss at the variance of the data for hundreds of
steps. The loss per value is |e| + e^2 plus `kl_loss_weight` times the mean KL; e is the error of
the pixels, in the second stage that of the 2D latents over their spread. At the end the per-channel
mean and spread of the latents are measured and stored as the model's `shift` and `scale`, so that
latents come out with mean 0 and variance 1.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.checkpoint import save_model
from opensora.config import parse_command_line
from opensora.data.shapes import CLIP_FRAMES, combinations, render, sample_scene, track
from opensora.models.vae import VideoAutoencoder, VideoAutoencoderConfig
from opensora.models.vae.video import SPATIAL_SCALE
from opensora.optim import Muon
from opensora.training.clip import clip_gradients
from opensora.training.ema import EMA
from opensora.training.run import TrainingRun
from opensora.training.schedule import learning_rate_factor


@dataclasses.dataclass(frozen=True)
class TrainVAEConfig:
    """Settings of a VAE training run; configuration files and flags use these names.

    Attributes:
        model: Architecture, the content of a VAE's config.json.
        outputs: Folder of the run; the trained VAE goes to its subfolder `vae`.
        seed: Seed of weights, clips and noise.
        num_frames, image_size: Size of the clips, frames and (height, width).
        window: Side of the square windows of all stages but the last, pixels.
        stages: Steps of the four stages: frames, latents, windows, whole frames.
        batch_sizes: Clips (frames in the first stage) a step of each stage.
        lr, adamw_lr: Step size of matrices (Muon) and of all other parameters (AdamW).
        warmup_steps, decay: Steps of warm-up; fraction of the run that decays to zero.
        kl_loss_weight: Weight of the KL term.
        grad_clip: Largest gradient norm.
        ema_decay: Decay of the averaged weights, which are what is saved.
        dtype: "bf16" (autocast) or "fp32".
        log_every, ckpt_every: Steps between log lines and between resumable states.
        num_statistics: Clips that scale and shift are measured on.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    outputs: str = "outputs/tiny-vae"
    seed: int = 42
    num_frames: int = CLIP_FRAMES
    image_size: tuple[int, int] = (64, 64)
    window: int = 32
    stages: tuple[int, int, int, int] = (1500, 1200, 600, 150)
    batch_sizes: tuple[int, int, int, int] = (32, 8, 6, 2)
    lr: float = 2e-3
    adamw_lr: float = 2e-3
    warmup_steps: int = 20
    decay: float = 0.25
    kl_loss_weight: float = 2e-4
    grad_clip: float = 1.0
    ema_decay: float = 0.99
    dtype: str = "bf16"
    log_every: int = 50
    ckpt_every: int = 500
    num_statistics: int = 512


STAGES = ("frames", "latents", "windows", "whole")


def stage_of(config: TrainVAEConfig, step: int) -> int:
    """Return the index of the stage that a step belongs to."""
    for index, count in enumerate(config.stages[:-1]):
        if step < count:
            return index
        step -= count
    return len(config.stages) - 1


def draw_batch(config: TrainVAEConfig, step: int) -> Tensor:
    """Draw the clips of one step: float32 [B, 3, T, H, W] in [-1, 1]; T is 1 in the first stage.

    Steps are seeded by their number, so a resumed run sees the clips it would have seen.
    """
    rng = random.Random(config.seed * 1_000_003 + step)
    stage = stage_of(config, step)
    height, width = config.image_size
    clips = []
    for _ in range(config.batch_sizes[stage]):
        scene, moment = sample_scene(rng), rng.randrange(config.num_frames)
        window = None
        if STAGES[stage] != "whole":
            x, y = track(scene, config.num_frames, height, width)[moment].tolist()
            side = config.window
            top = min(max(0, round(y - side / 2 + rng.uniform(-10, 10))), height - side)
            left = min(max(0, round(x - side / 2 + rng.uniform(-10, 10))), width - side)
            window = (top, left, side, side)
        only = [moment] if STAGES[stage] == "frames" else None
        clips.append(render(scene, config.num_frames, height, width, window, only))
    return to_model(torch.stack(clips))


def to_model(clips: Tensor) -> Tensor:
    """Turn uint8 [B, T, H, W, 3] into float32 [B, 3, T, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def start_certain(vae: VideoAutoencoder, logvar: float = -8.0) -> None:
    """Let both posteriors start narrow: at variance 1 the noise drowns the signal for good."""
    for name in ("spatial_vae.module.quant_conv.bias", "temporal_vae.quant_conv.conv.bias"):
        bias = vae.get_parameter(name)
        bias[bias.numel() // 2 :] = logvar


def errors(vae: VideoAutoencoder, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """Encode and decode a batch as far as its stage goes, sampling the posteriors.

    Args:
        vae: The model.
        x: [B, 3, T, H, W] in [-1, 1], T at most the VAE's micro_frame_size.
        stage: Index into STAGES.

    Returns:
        (error of every value, mean KL a latent value of the posteriors passed, scalar).
    """
    with torch.set_grad_enabled(STAGES[stage] != "latents"):
        spatial = vae.spatial_encode(x)
        frames = spatial.sample()
    kl = spatial.kl().sum() / spatial.mean.numel()
    if STAGES[stage] == "frames":
        return vae.spatial_decode(frames).float() - x, kl
    posterior = vae.temporal_vae.encode(frames * SPATIAL_SCALE)
    decoded = vae.temporal_vae.decode(posterior.sample(), num_frames=x.shape[2]) / SPATIAL_SCALE
    kl = kl + posterior.kl().sum() / posterior.mean.numel()
    if STAGES[stage] == "latents":
        spread = frames.float().std((0, 2, 3, 4), keepdim=True)
        return (decoded.float() - frames.float()) / spread, kl
    return vae.spatial_decode(decoded).float() - x, kl


@torch.no_grad()
def measure_latents(
    vae: VideoAutoencoder, config: TrainVAEConfig
) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation of every latent channel, before scale and shift."""
    rng = random.Random(config.seed + 1)
    values = []
    for _ in range(-(-config.num_statistics // 8)):
        clips = [render(sample_scene(rng), config.num_frames, *config.image_size) for _ in range(8)]
        z = vae.encode(to_model(torch.stack(clips)), sample=False)
        values.append(z * vae.scale + vae.shift)
    latents = torch.cat(values).transpose(0, 1).flatten(1)
    return latents.mean(1).tolist(), latents.std(1).tolist()


@torch.no_grad()
def measure_psnr(vae: VideoAutoencoder, config: TrainVAEConfig, num: int = 48) -> float:
    """Compute the mean PSNR in dB of whole clips of every kind after encoding and decoding."""
    rng = random.Random(config.seed + 2)
    triples = combinations("all")
    total = 0.0
    for index in range(num):
        scene = sample_scene(rng, triples[index * 5 % len(triples)])
        x = to_model(render(scene, config.num_frames, *config.image_size)[None])
        r = vae.decode(vae.encode(x, sample=False), num_frames=config.num_frames).clamp(-1, 1)
        total += float(10 * torch.log10(4 / F.mse_loss(r.float(), x)))
    return total / num


def train_vae(config: TrainVAEConfig) -> Path:
    """Run the training that `config` describes, resuming what its output folder holds.

    Returns:
        The folder of the trained VAE (`config.json`, `model.safetensors`).

    Raises:
        UsageError: Settings that do not fit, or an output folder that cannot be written.
        NonFiniteError: The loss became NaN or infinite.
    """
    torch.manual_seed(config.seed)
    vae = VideoAutoencoder(VideoAutoencoderConfig.from_dict(config.model))
    vae.micro_batch_size = None  # all frames of a step at once
    start_certain(vae)
    steps = sum(config.stages)
    run = TrainingRun(Path(config.outputs), dataclasses.asdict(config), steps, config.log_every)
    optimizer = Muon(
        vae.named_parameters(),
        config.lr,
        config.adamw_lr,
        adamw_names=("encoder.conv_in.", "decoder.conv_out."),
    )
    modules: dict[str, torch.nn.Module] = {"vae": vae}
    ema = EMA(modules, config.ema_decay)
    first = run.resume(modules, optimizer, ema)
    print(
        f"training {sum(p.numel() for p in vae.parameters()):,} parameters from step {first}",
        flush=True,
    )
    run.start()
    for step in range(first, steps):
        factor = learning_rate_factor(step, steps, config.warmup_steps, config.decay)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        x = draw_batch(config, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bf16"):
            error, kl = errors(vae, x, stage_of(config, step))
        squared = error.square().mean()
        loss = error.abs().mean() + squared + config.kl_loss_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradients(vae.parameters(), config.grad_clip)
        run.log(step, {"loss": loss.item(), "mse": squared.item(), "kl": kl.item(), "norm": norm})
        optimizer.step()
        ema.update()
        if (step + 1) % config.ckpt_every == 0:
            run.save(step + 1, modules, optimizer, ema)
            ema.swap()
            psnr = measure_psnr(vae.eval(), config)
            ema.swap()
            vae.train()
            run.record(step + 1, {"psnr": psnr})
            print(f"step {step + 1}: reconstructions of whole clips {psnr:.2f} dB", flush=True)
    ema.swap()
    vae.eval()
    mean, spread = measure_latents(vae, config)
    trained = dataclasses.replace(vae.config, shift=tuple(mean), scale=tuple(spread))
    result = VideoAutoencoder(trained)
    weights = vae.state_dict()
    weights.update({k: v for k, v in result.state_dict().items() if k in ("scale", "shift")})
    result.load_state_dict(weights)
    folder = run.folder / "vae"
    save_model(result.to(torch.bfloat16), folder)
    print(f"saved {folder}: reconstructions {measure_psnr(result.float(), config):.2f} dB")
    return folder


def run(argv: Sequence[str], program: str) -> int:
    """Read a configuration file and flags, then train; returns the exit status."""
    config, sources = parse_command_line(
        TrainVAEConfig,
        argv,
        program,
        description="Train a video VAE on clips of moving shapes.",
    )
    print(sources.table(config), flush=True)
    train_vae(config)
    return 0
