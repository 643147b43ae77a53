"""Compute the training loss of a batch: a function of the weights, the seed and the batch alone.

Timesteps, noise, given frames, dropped captions and the posteriors' samples are drawn after the
generators were set from the seed and the batch's number. So losses do not depend on how many
processes there are, on what was drawn before, or on whether the run was interrupted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora.data.batch import Batch
from opensora.schedulers.rflow import RFlow
from opensora.train_config import TrainConfig
from opensora.training.models import Models, precision

#: Given frames of a batch: (batch, latent frames, generator) -> bool [B, t], True where the model
#: learns; None: everywhere.
Masks = Callable[[int, int, random.Random], Tensor | None]


@dataclass
class Losses:
    """Hold the losses of a batch.

    Attributes:
        loss: float32 [B], of every sample; with gradients.
        t: float32 [B], its timestep.
        tokens: patches of all samples together.
    """

    loss: Tensor
    t: Tensor
    tokens: int


def batch_seed(seed: int, number: int) -> int:
    """Return the seed of all that is random in a training step."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def conditions_of(config: TrainConfig, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return what the model is told of a batch's clips: name -> float32 [B]."""
    given = {name: value.to(device) for name, value in batch.conditions.items()}
    if config.caption_fps is not None and batch.size.frames > 1:
        given["fps"] = torch.full_like(given["fps"], config.caption_fps)
    return given


class Objective:
    """Compute the losses of batches.

    Args:
        config: of the run.
        models: of the run.
        scheduler: makes timesteps, noise and loss.
        device: where the models are.
        masks: chooses given frames; None gives none.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: Models,
        scheduler: RFlow,
        device: torch.device,
        masks: Masks | None = None,
    ) -> None:
        self.config, self.models, self.scheduler = config, models, scheduler
        self.device, self.masks = device, masks

    def __call__(self, batch: Batch) -> Losses:
        """Return the losses of a batch; all generators are set by it."""
        torch.manual_seed(batch_seed(self.config.seed, batch.number))
        z = self.models.latent(batch, self.device)
        given = conditions_of(self.config, batch, self.device)
        with precision(self.config, self.device):
            y, mask = self.models.text(batch, self.device)
            count, _, frames = z.shape[:3]
            t = self.scheduler.sample_timesteps(
                count,
                height=given["height"],
                width=given["width"],
                num_frames=given["num_frames"],
                device=z.device,
            )
            x_mask = None
            if self.masks is not None:
                rng = random.Random(batch_seed(self.config.seed, batch.number) + 1)
                x_mask = self.masks(count, frames, rng)
                if x_mask is not None and bool(x_mask.all()):
                    x_mask = None  # the same, with less to compute
            losses = self.scheduler.training_losses(
                self.models.transformer,
                z,
                {"y": y, "mask": mask, **given},
                t=t,
                mask=None if x_mask is None else x_mask.to(self.device),
            )
        pt, ph, pw = self.models.transformer.config.patch_size
        patches = -(-frames // pt) * -(-z.shape[3] // ph) * -(-z.shape[4] // pw)
        return Losses(losses["loss"].float(), t, count * patches)

    def stand_in(self, batch: Batch) -> Batch:
        """Return a batch of one blank clip, for a batch none of whose rows could be read.

        All processes must take part in a step; this one's loss then gets a weight of zero.
        """
        told = {name: torch.ones(1) for name in ("num_frames", "height", "width", "fps", "ar")}
        told["num_frames"] = torch.tensor([float(batch.size.frames)])
        width = self.models.transformer.config
        blank = replace(
            batch,
            names=["blank"],
            latent=torch.zeros(1, width.in_channels, 1, 2, 2),
            conditions=told,
            text=[""],
        )
        if self.models.text_encoder is None:
            channels = width.hidden_size if width.skip_y_embedder else width.caption_channels
            blank.states = torch.zeros(1, 1, 1, channels)
            blank.mask = torch.ones(1, 1, dtype=torch.int64)
        return blank
