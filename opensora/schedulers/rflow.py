"""Sample and train rectified flow, the scheduler of Open-Sora 1.2.

    x_t = (1 - t/1000) * x_0 + (t/1000) * noise,    velocity = x_0 - noise,    t in [0, 1000]

t = 1000 is pure noise. Sampling walks t from 1000 to 0 with Euler steps
`z += velocity * (t_i - t_{i+1}) / 1000`. Arithmetic is float32 (float64 if the latent is), whatever
dtype the model runs in. Shapes: B batch, C latent channels, T latent frames, H x W latent pixels.

Source: Open-Sora 1.2, recorded in `tests/golden/rflow_*.safetensors`. One deliberate difference:
2 to 16 frames (see `timesteps.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora.errors import UsageError
from opensora.ops.cfg_rflow_step import cfg_rflow_step
from opensora.schedulers.config import RFlowConfig
from opensora.schedulers.noise import StepNoise
from opensora.schedulers.timesteps import clip_sizes, timestep_transform

#: `model(x, timestep, y=..., **kwargs)` -> [B', >= C, T, H, W]; channels [:C] are the velocity.
Model = Callable[..., Tensor]
#: `callback(step, num_steps, t, z)` after each step; t is the timestep [B] the step started from.
Callback = Callable[[int, int, Tensor, Tensor], None]


@dataclass(frozen=True)
class RFlow(RFlowConfig):
    """Sample and train a rectified flow; the settings are those of `RFlowConfig`."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mix data and noise: (1 - t/1000) * x0 + (t/1000) * noise.

        Args:
            x0: clean latent [B, C, T, H, W].
            noise: same shape.
            t: [B] in [0, num_timesteps].

        Returns:
            [B, C, T, H, W], float32 or wider.
        """
        u = (t.float() / self.num_timesteps).view(-1, *(1 for _ in range(x0.dim() - 1)))
        keep = 1 - u
        # 1 - keep, not u: the original's rounding, so that recorded values are met bit for bit.
        return keep * x0 + (1 - keep) * noise

    def sample_timesteps(
        self,
        batch: int,
        *,
        height: Tensor | int | None = None,
        width: Tensor | int | None = None,
        num_frames: Tensor | int | None = None,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw training timesteps: one draw from the generator, before any noise is drawn.

        Args:
            batch: B.
            height: [B] pixels, needed with use_timestep_transform; so are width and num_frames.
            width: [B] pixels.
            num_frames: [B] video frames.
            device: where the result lies.
            generator: source of randomness; None uses the global one of `device`.

        Returns:
            float32 [B] in [0, num_timesteps].
        """
        where = torch.device(device) if generator is None else generator.device
        if self.use_discrete_timesteps:
            t = torch.randint(
                0, self.num_timesteps, (batch,), device=where, generator=generator
            ).float()
        elif self.sample_method == "uniform":
            t = torch.rand((batch,), device=where, generator=generator) * self.num_timesteps
        else:
            normal = torch.randn((batch,), device=where, generator=generator)
            t = torch.sigmoid(normal * self.scale + self.loc) * self.num_timesteps
        t = t.to(device)
        if self.use_timestep_transform:
            size = clip_sizes(height, width, num_frames, batch, t.device)
            t = timestep_transform(
                t, *size, scale=self.transform_scale, num_timesteps=self.num_timesteps
            )
        return t.float()

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        model_kwargs: Mapping[str, Any],
        *,
        num_frames: Tensor | int | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute the mean squared error of the predicted velocity, per sample.

            loss = mean((model(x_t, t)[:, :C] - (x_start - noise))^2)

        Timesteps are drawn before the noise. Frames whose mask is False are given clean (t = 0) and
        do not count in the mean.

        Args:
            model: called as `model(x_t, t, **model_kwargs)`, and `x_mask=mask` if there is a mask.
            x_start: clean latents [B, C, T, H, W].
            model_kwargs: y and conditions. `height` and `width` [B] are read for the transform.
            num_frames: [B] video frames for the transform; None reads model_kwargs["num_frames"].
            t: [B] timesteps; None draws them.
            noise: [B, C, T, H, W]; None draws it.
            mask: bool [B, T], True where the model learns to denoise; None means everywhere.
            generator: source of both draws; None uses the global one of x_start's device.

        Returns:
            {"loss": float32 [B]}.
        """
        kwargs = dict(model_kwargs)
        batch, channels = x_start.shape[:2]
        if t is None:
            t = self.sample_timesteps(
                batch,
                height=kwargs.get("height"),
                width=kwargs.get("width"),
                num_frames=kwargs.get("num_frames") if num_frames is None else num_frames,
                device=x_start.device,
                generator=generator,
            )
        if noise is None:
            where = x_start.device if generator is None else generator.device
            noise = torch.randn(
                x_start.shape, dtype=x_start.dtype, device=where, generator=generator
            ).to(x_start.device)
        x_t = self.add_noise(x_start, noise, t)
        if mask is not None:
            mask = mask.to(device=x_start.device, dtype=torch.bool)
            x_t = torch.where(_per_frame(mask), x_t, x_start)
            kwargs["x_mask"] = mask
        velocity = model(x_t, t, **kwargs)[:, :channels].float()
        error = (velocity - (x_start.float() - noise.float())).square()
        if mask is None:
            return {"loss": error.flatten(1).mean(1)}
        per_frame = error.mean(dim=(1, 3, 4)) * mask
        # A sample without a single True frame has nothing to learn: its loss is 0, not 0/0.
        return {"loss": per_frame.sum(1) / mask.sum(1).clamp(min=1)}

    def timesteps(
        self,
        height: Tensor | int | None = None,
        width: Tensor | int | None = None,
        num_frames: Tensor | int | None = None,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """List the timesteps of a sampling run.

            t_i = (1 - i/n) * 1000, rounded if use_discrete_timesteps, then transformed

        Args:
            height: pixels, a number or [B]; needed with use_timestep_transform, as are the others.
            width: pixels.
            num_frames: video frames.
            batch: B.
            device: where the result lies.

        Returns:
            float32 [num_sampling_steps, B], falling, the first 1000.
        """
        steps = self.num_sampling_steps
        values = [(1 - i / steps) * self.num_timesteps for i in range(steps)]
        if self.use_discrete_timesteps:
            values = [float(round(value)) for value in values]
        t = torch.tensor(values, dtype=torch.float32, device=device)[:, None].repeat(1, batch)
        if self.use_timestep_transform:
            size = clip_sizes(height, width, num_frames, batch, t.device)
            t = timestep_transform(t, *size, num_timesteps=self.num_timesteps)
        return t.float()

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        z: Tensor,
        *,
        y: Tensor,
        y_null: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        num_frames: Tensor | int | None = None,
        guidance_scale: float | None = None,
        mask: Tensor | None = None,
        noise: StepNoise = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Turn noise into a latent.

            velocity = uncond + g * (cond - uncond),    z += velocity * (t_i - t_{i+1}) / 1000

        The model sees the batch [cond; uncond] in one call; with g = 1 only the first half runs.

        With a mask [B, T], frame value m: a frame takes part from the first step with
        t_i <= 1000 m on (m = 1 always, m = 0 never, between: an edit of that strength) and is
        noised to t_i when it joins, unless m = 1. Until then it keeps its value, and the model sees
        `x_mask` False for it. One noise tensor is drawn at every step whenever a mask is given,
        even if it is all ones: upstream does, so equal seeds stay equal.

        Args:
            model: called as `model(z, t, y=..., **model_kwargs)`; t float32 [2B], y [2B, ...]. It
                must not change z. A method `reusing` of it, as STDiT3 has, is opened around the
                calls: what they share is then computed once.
            z: initial noise (reference latents in masked frames) [B, C, T, H, W]; not changed.
            y: text states [B, 1, L, D].
            y_null: text states of the empty prompt [1 or B, 1, L, D]; needed unless g = 1.
            model_kwargs: passed on unchanged and not doubled: the model repeats them to its batch.
                `height` and `width` are read for the timestep transform.
            num_frames: video frames for the transform; None reads model_kwargs["num_frames"].
            guidance_scale: g; None uses cfg_scale.
            mask: [B, T] in [0, 1], or None.
            noise: noise for masked runs: a function (step, z) -> tensor like z, a sequence with one
                tensor a step, or None for torch.randn from the global generator of z's device.
            callback: called after each step; may change z in place.

        Returns:
            The latent [B, C, T, H, W], float32 or wider.

        Raises:
            UsageError: y_null or the size is missing.
        """
        kwargs = dict(model_kwargs or {})
        guidance = float(self.cfg_scale if guidance_scale is None else guidance_scale)
        guided = guidance != 1.0
        batch = z.shape[0]
        if guided:
            if y_null is None:
                raise UsageError("sampling with guidance needs y_null, the states of no prompt")
            y = torch.cat([y, y_null.to(y).expand_as(y)])
        times = self.timesteps(
            kwargs.get("height"),
            kwargs.get("width"),
            kwargs.get("num_frames") if num_frames is None else num_frames,
            batch=batch,
            device=z.device,
        )
        steps = len(times)
        after = torch.cat([times[1:], torch.zeros_like(times[:1])])
        dt = (times - after) / self.num_timesteps
        copies = 2 if guided else 1
        model_times = times.repeat(1, copies)
        wide = torch.promote_types(z.dtype, torch.float32)
        moves: list[Tensor | None] = [None] * steps
        joins: list[Tensor | None] = []
        x_masks: list[Tensor] = []
        if mask is not None:
            taking_part, joins = self._taking_part(mask.to(z.device), times)
            moves, x_masks = list(taking_part), list(taking_part.repeat(1, copies, 1))
        x = torch.cat([z, z]) if guided else z
        reusing = getattr(model, "reusing", nullcontext)
        with reusing(model_times):
            for step, t in enumerate(times):
                moving = moves[step]
                if moving is not None:
                    drawn, joining = _draw(noise, step, z), joins[step]
                    if joining is not None:
                        z = torch.where(_per_frame(joining), self.add_noise(z, drawn, t), z)
                    if joining is not None or z.dtype != wide:
                        z = z.to(wide)
                        x = torch.cat([z, z]) if guided else z
                    kwargs["x_mask"] = x_masks[step]
                velocity = model(x, model_times[step], y=y, **kwargs)
                # The step writes the batch that the model sees next; the last one only z.
                x = cfg_rflow_step(
                    z.to(wide),
                    velocity,
                    guidance if guided else None,
                    dt[step],
                    mask=moving,
                    copies=copies if step + 1 < steps else 1,
                )
                z = x[:batch]
                if callback is not None:
                    version = _version(z)
                    callback(step, steps, t, z)
                    if version is None or _version(z) != version:
                        x = torch.cat([z, z]) if guided else z
        return z

    def _taking_part(self, mask: Tensor, times: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return for every step which frames take part and which of them join.

        Waits for the device once: most steps see no frame join, and need not noise any.

        Args:
            mask: [B or 1, T] in [0, 1].
            times: [steps, B].

        Returns:
            Bool [steps, B, T], and for every step a bool [B, T], or None where no frame joins.
        """
        mask = mask.float()
        # `mask == 1`: rounding lifts the first transformed t of eight small image sizes to
        # 1000.0001, and the original then skips a step.
        always = mask == 1
        moves = (mask * self.num_timesteps >= times[:, :, None]) | always
        joins = moves & ~torch.cat([always.expand_as(moves[:1]), moves[:-1]])
        some = joins.flatten(1).any(1).tolist()
        joining = [frames if any_ else None for frames, any_ in zip(joins, some, strict=True)]
        return moves, joining


def _per_frame(mask: Tensor) -> Tensor:
    """View a frame mask [B, T] as [B, 1, T, 1, 1]."""
    return mask[:, None, :, None, None]


def _version(z: Tensor) -> int | None:
    """Return how often z was changed in place; None where torch does not count."""
    return None if z.is_inference() else z._version


def _draw(noise: StepNoise, step: int, z: Tensor) -> Tensor:
    """Return the noise of one step, shaped and placed like z."""
    if noise is None:
        return torch.randn_like(z)
    drawn = noise(step, z) if callable(noise) else noise[step]
    return drawn.to(z)
