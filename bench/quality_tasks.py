"""Ask the embedded model for more than plain clips: images, given frames, sizes, two shapes.

Every task draws its own prompts from a seed and returns shares of clips that are right, judged from
their pixels (`opensora.data.shapes_judge`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from opensora.data.shape_captions import caption
from opensora.data.shape_pairs import caption_pair, sample_pair
from opensora.data.shapes import COLOURS, Scene, combinations, render, sample_scene
from opensora.data.shapes_dataset import to_model
from opensora.data.shapes_judge import ATTRIBUTES, judge, judge_pair
from opensora.pipeline import OpenSoraPipeline
from opensora.schedulers.noise import initial_noise

#: (frames, height, width) beside 17 x 64x64: two further areas, two further ratios of each.
SIZES = [
    (17, 48, 80),
    (17, 80, 48),
    (17, 80, 80),
    (17, 64, 96),
    (17, 96, 64),
    (17, 96, 96),
    (17, 80, 128),
    (17, 128, 80),
    (34, 64, 64),
]


def generate(
    pipeline: OpenSoraPipeline, prompts: Sequence[str], first_seed: int, batch: int, **size: int
) -> list[Tensor]:
    """Generate one clip a prompt: uint8 [T, H, W, 3] each."""
    output = pipeline(list(prompts), seed=first_seed, batch_size=batch, progress=False, **size)
    return [torch.from_numpy(frames) for frames in output.frames]


def images(
    pipeline: OpenSoraPipeline, num: int, seed: int, batch: int
) -> tuple[float, list[tuple[Tensor, str]]]:
    """Draw pictures; returns the share with shape, colour and a named background right."""
    rng = random.Random(f"quality/images/{seed}")
    seen = [triple for triple in combinations("seen") if triple[2] == "still"]
    scenes = [sample_scene(rng, rng.choice(seen)) for _ in range(num)]
    prompts, names = [], []
    for scene in scenes:
        text = f"a {scene.colour} {scene.shape}"
        named = ["shape", "colour"]
        if rng.random() < 0.5:
            text, named = f"{text} on a {scene.background} background", [*named, "background"]
        prompts.append(text)
        names.append(named)
    clips = generate(pipeline, prompts, seed * 1_000_000, batch, num_frames=1)
    right = []
    for clip, scene, named in zip(clips, scenes, names, strict=True):
        verdict = judge(clip.repeat(2, 1, 1, 1))
        right.append(all(verdict.right(name, getattr(scene, name)) for name in named))
    wrong = [(c, p) for c, p, ok in zip(clips, prompts, right, strict=True) if not ok]
    return sum(right) / num, wrong


def sizes(
    pipeline: OpenSoraPipeline, num: int, seed: int, batch: int
) -> tuple[dict[str, float], list[tuple[Tensor, str]]]:
    """Draw clips of other sizes and lengths; returns size -> share with all named right."""
    rng = random.Random(f"quality/sizes/{seed}")
    shares, wrong = {}, []
    each = max(1, num // len(SIZES))
    for frames, height, width in SIZES:
        scenes = [sample_scene(rng, rng.choice(combinations("seen"))) for _ in range(each)]
        texts = [caption(scene, rng) for scene in scenes]
        size = {"num_frames": frames, "height": height, "width": width}
        clips = generate(pipeline, [t for t, _ in texts], seed * 1_000_000 + 7, batch, **size)
        right = []
        for clip, scene, (text, names) in zip(clips, scenes, texts, strict=True):
            verdict = judge(clip)
            named = [name for name in ATTRIBUTES if name in names]
            right.append(all(verdict.right(name, getattr(scene, name)) for name in named))
            if not right[-1]:
                wrong.append((clip, text))
        shares[f"{frames}x{height}x{width}"] = sum(right) / each
    return shares, wrong


def pairs(
    pipeline: OpenSoraPipeline, num: int, seed: int, batch: int
) -> tuple[float, list[tuple[Tensor, str]]]:
    """Draw clips of two shapes; returns the share in which all that is named of both is right."""
    rng = random.Random(f"quality/pairs/{seed}")
    order = list(COLOURS)
    drawn = [sample_pair(rng) for _ in range(num)]
    texts = [caption_pair(pair, rng) for pair in drawn]
    clips = generate(pipeline, [text for text, _ in texts], seed * 1_000_000 + 11, batch)
    right = [
        pair_is_right(clip, pair, names, order)
        for clip, pair, (_, names) in zip(clips, drawn, texts, strict=True)
    ]
    wrong = [(c, t) for c, (t, _), ok in zip(clips, texts, right, strict=True) if not ok]
    return sum(right) / num, wrong


def pair_is_right(
    clip: Tensor,
    pair: tuple[Scene, Scene],
    names: tuple[tuple[str, ...], tuple[str, ...]],
    order: list[str],
) -> bool:
    """Tell whether a clip shows what a text names of two scenes."""
    verdicts = judge_pair(clip)
    if verdicts is None:
        return False
    wanted = sorted(zip(pair, names, strict=True), key=lambda item: order.index(item[0].colour))
    return all(
        verdict.right(name, getattr(scene, name))
        for verdict, (scene, named) in zip(verdicts, wanted, strict=True)
        for name in named
        if name in ATTRIBUTES
    )


@torch.no_grad()
def conditioned(
    pipeline: OpenSoraPipeline, num: int, seed: int, batch: int
) -> tuple[float, float, list[tuple[Tensor, str]]]:
    """Go on from a given first frame.

    Returns:
        The mean PSNR in dB of the clips' first frames against the given ones, the share of clips
        that move as their prompts say, and those that do not.
    """
    rng = random.Random(f"quality/conditioned/{seed}")
    decibels, right, wrong = [], 0, []
    for first in range(0, num, batch):
        count = min(batch, num - first)
        scenes = [sample_scene(rng, rng.choice(combinations("seen"))) for _ in range(count)]
        texts = [caption(scene, rng)[0] for scene in scenes]
        given = torch.stack([to_model(render(scene, only=[0])) for scene in scenes])
        clips = continue_frames(pipeline, given, texts, seed * 1_000_000 + first)
        error = (clips[:, :, :1] - given).square().flatten(1).mean(1)
        decibels += (10 * torch.log10(4 / error)).tolist()
        for clip, scene, text in zip(clips, scenes, texts, strict=True):
            frames = (clip.permute(1, 2, 3, 0) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
            good = judge(frames).right("motion", scene.motion)
            right += good
            if not good:
                wrong.append((frames, text))
    return sum(decibels) / num, right / num, wrong


def continue_frames(
    pipeline: OpenSoraPipeline, given: Tensor, texts: list[str], seed: int, num_frames: int = 17
) -> Tensor:
    """Sample clips whose first frame is given.

    Args:
        pipeline: the model.
        given: [B, 3, 1, H, W] in [-1, 1].
        texts: B prompts.
        seed: of the noise of the first clip; the next has seed + 1.
        num_frames: of the clips.

    Returns:
        float32 [B, 3, T, H, W] in [-1, 1].
    """
    vae, model = pipeline.vae, pipeline.transformer.eval()
    height, width = given.shape[3:]
    latent = vae.encode(given, sample=False).float()
    frames = vae.get_latent_size((num_frames, height, width))[0]
    shape = (len(texts), latent.shape[1], frames, *latent.shape[3:])
    z = initial_noise(shape, [seed + i for i in range(len(texts))], device=latent.device)
    z[:, :, :1] = latent
    mask = torch.ones(len(texts), shape[2])
    mask[:, 0] = 0
    y, text_mask = pipeline.text_encoder.encode(texts)
    y_null = model.y_embedder.y_embedding[: y.shape[2]][None, None].to(y)
    values = {"height": height, "width": width, "fps": 8}
    told = {name: torch.full((len(texts),), float(value)) for name, value in values.items()}
    z = pipeline.scheduler.sample(
        model,
        z,
        y=y,
        y_null=y_null,
        model_kwargs={"mask": text_mask, **told},
        num_frames=num_frames,
        mask=mask,
    )
    return vae.decode(z, num_frames).float().clamp(-1, 1)
