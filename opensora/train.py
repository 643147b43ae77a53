"""Train a text-to-video transformer with rectified flow, its text encoder along with it if small.

    python scripts/train.py configs/tiny/train/stdit.py

One device for now. The VAE is frozen and runs once per clip; captions are worded anew at every
step. What is saved is a pipeline folder with the averaged (EMA) weights.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoint import weights_digest
from opensora.config import parse_command_line
from opensora.data.shape_latents import Bucket, ShapeLatents
from opensora.errors import UsageError, WeightsError
from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.models.text_encoder import T5TextEncoder
from opensora.models.vae import VideoAutoencoder
from opensora.optim import Muon
from opensora.pipeline import OpenSoraPipeline
from opensora.program import run_program
from opensora.schedulers.rflow import RFlow
from opensora.training.clip import clip_gradients
from opensora.training.ema import EMA
from opensora.training.run import TrainingRun
from opensora.training.schedule import learning_rate_factor

# Matrices that are tables or face the data: AdamW takes them.
ADAMW_NAMES = (
    "shared.",
    "relative_attention_bias",
    "x_embedder",
    "scale_shift_table",
    "final_layer",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; configuration files and flags use these names.

    Attributes:
        model: Architecture of the transformer, the content of an STDiT3 config.json.
        vae: Folder of the trained VAE.
        text_encoder: `T5TextEncoder.byt5` arguments of an encoder trained along.
        ckpt_path: Pipeline folder whose transformer and text encoder the run starts from; "" starts
            from random weights. A run that is resumed goes on with its own.
        scheduler: Settings of `RFlow`.
        defaults: What the pipeline uses when a request does not say (frames, size, fps, steps,
            guidance), stored with it.
        outputs: Folder of the run; the result goes to its subfolder `pipeline`.
        seed: Seed of weights, clips, captions, timesteps and noise.
        fps: Frame rate that the model is told.
        buckets: (num_frames, height, width, num_clips, batch_size, weight) of every clip size.
        size_share: Share of captions that state the size, which is learned last.
        mixed_steps: How many of the last steps draw from all buckets; before, only the first one.
        steps: Optimizer steps.
        lr, adamw_lr, weight_decay: Step size of matrices (Muon), of all others (AdamW); decay of
            matrices.
        warmup_steps, decay: Steps of warm-up; fraction of the run that decays to zero.
        grad_clip: Largest gradient norm.
        ema_decay: Decay of the averaged weights.
        dtype: "bf16" (autocast) or "fp32".
        compile: Compile every block (first steps take longer).
        log_every, ckpt_every: Steps between log lines and between resumable states.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    vae: str = "outputs/tiny-vae/vae"
    text_encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
    ckpt_path: str = ""
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    outputs: str = "outputs/tiny"
    seed: int = 42
    fps: float = 8.0
    buckets: tuple[tuple[float, ...], ...] = ((17, 64, 64, 16384, 64, 1.0),)
    size_share: float = 0.4
    mixed_steps: int = 0
    steps: int = 4500
    lr: float = 2e-3
    adamw_lr: float = 2e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay: float = 0.3
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    dtype: str = "bf16"
    compile: bool = False
    log_every: int = 50
    ckpt_every: int = 500


def encode_captions(encoder: T5TextEncoder, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Encode captions with gradients, running the encoder on as many tokens as the longest needs.

    Returns:
        Text states [B, 1, L, C], L the encoder's max_length, zero past the longest caption, and
        the mask int64 [B, L].
    """
    ids, mask = encoder.tokenize(captions)
    length = min(ids.shape[1], math.ceil(int(mask.sum(1).max()) / 8) * 8)
    states = encoder(ids[:, :length], mask[:, :length])
    return nn.functional.pad(states, (0, 0, 0, ids.shape[1] - length)), mask


def size_arguments(bucket: Bucket, batch: int, fps: float) -> dict[str, Tensor]:
    """Make the conditions of a batch: fps, height and width, float32 [B] each."""
    rate = 120.0 if bucket.num_frames == 1 else fps
    values = {"fps": rate, "height": float(bucket.height), "width": float(bucket.width)}
    return {name: torch.full((batch,), value) for name, value in values.items()}


def read_buckets(config: TrainConfig) -> list[Bucket]:
    """Turn the configured tuples into buckets; UsageError on one that cannot be trained on."""
    buckets = []
    for entry in config.buckets:
        if len(entry) != 6 or min(entry) <= 0:
            raise UsageError(
                f"buckets: {entry} is not "
                "(num_frames, height, width, num_clips, batch_size, weight)"
            )
        frames, height, width, clips, batch = (int(value) for value in entry[:5])
        buckets.append(Bucket(frames, height, width, clips, batch, float(entry[5])))
    if not buckets:
        raise UsageError("buckets: none given; add one such as (17, 64, 64, 16384, 64, 1.0)")
    return buckets


def start_from(folder: str, model: STDiT3, encoder: T5TextEncoder) -> None:
    """Copy the weights of a pipeline folder; WeightsError if they are of another architecture."""
    stored = {
        "transformer": STDiT3.from_pretrained(folder, subfolder="transformer").state_dict(),
        "text_encoder": T5TextEncoder.from_pretrained(folder).model.state_dict(),
    }
    for name, module in (("transformer", model), ("text_encoder", encoder.model)):
        try:
            module.load_state_dict(stored[name])
        except RuntimeError as error:
            raise WeightsError(
                f"ckpt_path: the {name} of {folder} is not what the configuration describes: "
                f"{str(error).splitlines()[1].strip()}"
            ) from error


def train(config: TrainConfig) -> Path:
    """Run the training that `config` describes, resuming what its output folder holds.

    Returns:
        The pipeline folder.

    Raises:
        UsageError: Settings that do not fit, or an output folder that cannot be written.
        WeightsError: The VAE cannot be read.
        NonFiniteError: The loss became NaN or infinite.
    """
    buckets = read_buckets(config)
    torch.manual_seed(config.seed)
    vae = VideoAutoencoder.from_pretrained(config.vae, dtype=torch.float32).eval()
    model = STDiT3(STDiT3Config.from_dict(config.model)).train()
    encoder = T5TextEncoder.byt5(**config.text_encoder)
    if config.ckpt_path:
        start_from(config.ckpt_path, model, encoder)
    scheduler = RFlow.from_dict(config.scheduler)
    run = TrainingRun(
        Path(config.outputs), dataclasses.asdict(config), config.steps, config.log_every
    )

    vae.micro_batch_size = None
    digest = weights_digest(config.vae)
    data = [
        ShapeLatents(b, vae, Path(config.outputs), config.seed, digest, config.size_share)
        for b in buckets
    ]
    vae.micro_batch_size = vae.config.micro_batch_size
    modules: dict[str, nn.Module] = {"transformer": model, "text_encoder": encoder.model}
    named = [(f"{n}.{k}", p) for n, m in modules.items() for k, p in m.named_parameters()]
    optimizer = Muon(
        named, config.lr, config.adamw_lr, weight_decay=config.weight_decay, adamw_names=ADAMW_NAMES
    )
    ema = EMA(modules, config.ema_decay)
    first = run.resume(modules, optimizer, ema)
    if config.compile:
        for block in (*model.spatial_blocks, *model.temporal_blocks):
            block.compile()

    sizes = [[b.num_frames, b.height, b.width] for b in buckets]

    def save_pipeline(folder: Path) -> None:
        with _averaged(ema, modules):
            pipeline = OpenSoraPipeline(
                model, vae, encoder, scheduler, defaults={**config.defaults, "trained_sizes": sizes}
            )
            pipeline.save_pretrained(folder, dtype=torch.bfloat16)

    print(f"training {sum(p.numel() for _, p in named):,} parameters from step {first}", flush=True)
    run.start()
    for step in range(first, config.steps):
        factor = learning_rate_factor(step, config.steps, config.warmup_steps, config.decay)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        rng = random.Random(config.seed * 1_000_003 + step)
        mixed = step >= config.steps - config.mixed_steps
        chosen = rng.choices(data, [b.weight for b in buckets])[0] if mixed else data[0]
        z, captions = chosen.batch(rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bf16"):
            y, mask = encode_captions(encoder, captions)
            conditions = size_arguments(chosen.bucket, len(z), config.fps)
            losses = scheduler.training_losses(
                model, z, {"y": y, "mask": mask, **conditions}, num_frames=chosen.bucket.num_frames
            )
        loss = losses["loss"].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradients((p for _, p in named), config.grad_clip)
        run.log(step, {"loss": loss.item(), "grad_norm": norm})
        optimizer.step()
        ema.update()
        if (step + 1) % config.ckpt_every == 0:
            run.save(step + 1, modules, optimizer, ema)
            save_pipeline(run.folder / "pipeline")
    save_pipeline(run.folder / "pipeline")
    print(f"saved {run.folder / 'pipeline'}")
    return run.folder / "pipeline"


@contextmanager
def _averaged(ema: EMA, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Run with the averaged weights, in evaluation mode, then change back."""
    ema.swap()
    for module in modules.values():
        module.eval()
    try:
        yield
    finally:
        ema.swap()
        for module in modules.values():
            module.train()


def main(argv: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Read a configuration file and flags, then train; returns the exit status."""

    def run() -> int:
        config, sources = parse_command_line(
            TrainConfig,
            sys.argv[1:] if argv is None else argv,
            program,
            description="Train a text-to-video transformer.",
        )
        print(sources.table(config), flush=True)
        train(config)
        return 0

    return run_program(run)
