"""Hold a video VAE, its discriminator and their optimizers, and take training steps with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from opensora.data.batch import Batch
from opensora.distributed.collectives import all_reduce
from opensora.models.vae.discriminator import NLayerDiscriminator, build_discriminator
from opensora.models.vae.loading import build_vae
from opensora.models.vae.lpips import LPIPS
from opensora.train_vae_config import TrainVAEConfig
from opensora.training.clip import GradientClip
from opensora.training.ema import EMA
from opensora.training.gradients import average_gradients
from opensora.training.optimizers import build_optimizer
from opensora.training.schedule import Schedule
from opensora.training.vae_objective import REPORTED, VAEObjective, prepare, shorten

VAE, JUDGE, LECAM = "vae", "_discriminator", "_lecam"


class VAELearner:
    """Build what a configuration describes; all processes build the same.

    Args:
        config: settings.
        device: where everything goes.

    Attributes:
        origin: where the VAE's weights come from, in words.
        modules: what is saved. Names with an underscore are of use to training alone and are not
            exported.
        optimizers: by the names of `modules`.
        ema: averages of the VAE's trained weights, if asked for.

    Raises:
        UsageError: settings that do not fit each other.
        WeightsError: weights are missing, damaged or of another model.
    """

    def __init__(self, config: TrainVAEConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.vae, self.origin = build_vae(config.model, source=config.ckpt_path)
        # `cal_loss` is upstream's word for training; what is saved shall normalise its latents.
        self.vae.config = dataclasses.replace(self.vae.config, cal_loss=False)
        self.vae.to(device).train()
        prepare(self.vae, config)
        self.modules: dict[str, nn.Module] = {VAE: self.vae}
        self.judge: NLayerDiscriminator | None = None
        if config.discriminator is not None:
            self.judge = build_discriminator(config.discriminator).to(device).train()
            frames, height, width = config.clip()
            self.judge.require(torch.empty(1, 3, frames, height, width, device="meta"))
        perceptual = None
        if config.needs_perceptual:
            perceptual = LPIPS.from_files(config.lpips_path or ()).to(device)
        self.objective = VAEObjective(config, self.vae, self.judge, perceptual)
        if self.judge is not None:
            self.modules |= {JUDGE: self.judge, LECAM: self.objective.lecam}
        self.optimizers: dict[str, Optimizer] = {
            name: build_optimizer(
                [(n, p) for n, p in module.named_parameters() if p.requires_grad],
                lr=config.lr,
                eps=config.adam_eps,
                weight_decay=config.weight_decay,
            )
            for name, module in self.modules.items()
            if name != LECAM
        }
        self.ema: EMA | None = None
        if config.ema_decay is not None:
            self.ema = EMA({VAE: self.vae}, config.ema_decay, trained_only=True)
        self._schedule = Schedule(warmup=config.warmup_steps or 0)
        self._clip = GradientClip(config.grad_clip)

    def backward(self, batches: Sequence[Batch], step: int) -> list[dict[str, float]]:
        """Compute the gradients of batches, summed; returns what each reports."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        told = []
        for batch in batches:
            if batch.video is None:
                continue  # no row of it could be read; the quarantine file says why
            # All that is random in a batch comes from the seed and the batch's number.
            torch.manual_seed(self.config.seed * 1_000_003 + batch.number)
            video = shorten(batch.video.to(self.device), self.config, batch.number)
            told.append(self.objective.backward(video, step))
        return told

    def average(self, told: Sequence[dict[str, float]]) -> tuple[dict[str, float], list[float]]:
        """Average gradients over the batches of all processes, and clip them.

        Args:
            told: what `backward` returned.

        Returns:
            (means of what all batches reported, norms of the gradients before clipping, the VAE's
            first).
        """
        sums = torch.zeros(2, len(REPORTED), dtype=torch.float64)
        for values in told:
            for index, name in enumerate(REPORTED):
                if name in values:
                    sums[:, index] += torch.tensor([values[name], 1.0], dtype=torch.float64)
        totals, counts = all_reduce(sums, "losses").tolist()
        rows = zip(REPORTED, totals, counts, strict=True)
        means = {name: total / count for name, total, count in rows if count}
        norms = []
        for name, optimizer in self.optimizers.items():
            # A discriminator sees no batch before its start, nor clips that are too short for it.
            reported = REPORTED.index("disc" if name == JUDGE else "loss")
            average_gradients(optimizer, int(counts[reported]))
            clipped = self._clip(p for group in optimizer.param_groups for p in group["params"])
            norms.append(clipped.before)
        return means, norms

    def update(self, means: dict[str, float], step: int) -> float:
        """Move weights and averages; returns the learning rate."""
        rate = 0.0
        for optimizer in self.optimizers.values():
            rate = self._schedule.set(optimizer, step)
            optimizer.step()
        if "logit_real" in means:
            self.objective.lecam.update(means["logit_real"], means["logit_fake"])
        if self.ema is not None:
            self.ema.update()
        return rate
