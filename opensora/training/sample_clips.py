"""Write clips of fixed prompts and seeds during training, to see what a loss does not say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.data.contact_sheet import save_contact_sheet
from opensora.media import write_clip
from opensora.training.validation import kept_generators


def sample_clips(
    pipeline: Callable[..., Any],
    prompts: Sequence[str],
    folder: Path,
    step: int,
    *,
    seed: int = 0,
    fps: float = 24.0,
    contact_sheet: bool = True,
    rank: int = 0,
    **request: Any,
) -> list[Path]:
    """Generate one clip a prompt and write them to `folder/clips/step-00000100/`.

    The clip of prompt i has seed `seed + i` at every step, so that clips of two steps differ by the
    weights alone. Global random generators are afterwards as they were. With a sharded model every
    process calls it; the first one writes.

    Args:
        pipeline: `OpenSoraPipeline`, or what is called like it and returns `frames`, uint8
            [B, T, H, W, 3].
        prompts: one clip each.
        folder: of the run.
        step: steps taken.
        seed: of the first prompt's clip.
        fps: of the clips.
        contact_sheet: also write `clips/step-00000100.png` with a few frames of each.
        rank: of this process.
        **request: passed on: num_frames, height, width, num_inference_steps, guidance_scale.

    Returns:
        The clips written, mp4 or png; empty on other processes.

    Raises:
        NonFiniteError: the model made NaN or infinity.
        UsageError: the folder cannot be written.
    """
    clips = []
    with torch.no_grad(), kept_generators():
        for index, prompt in enumerate(prompts):
            made = pipeline(prompt, seed=seed + index, fps=fps, progress=False, **request)
            clips.append(torch.as_tensor(made.frames[0]))
    if rank:
        return []
    written = []
    for index, (prompt, frames) in enumerate(zip(prompts, clips, strict=True)):
        suffix = ".png" if len(frames) == 1 else ".mp4"
        path = folder / "clips" / f"step-{step:08d}" / f"{index:02d}{suffix}"
        recipe = {"prompt": prompt, "seed": seed + index, "step": step, **request}
        written.append(write_clip(path, frames, fps, recipe).path)
    if contact_sheet and clips:
        save_contact_sheet(folder / "clips" / f"step-{step:08d}.png", clips, list(prompts))
    return written
