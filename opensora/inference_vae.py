"""Reconstruct the clips of a table with a video VAE, and measure what is lost.

    python scripts/inference_vae.py configs/vae/inference/video.py --data-path meta.csv
    python scripts/inference_vae.py --ckpt-path tiny --num-frames 17 --image-size 64 64 \
        --data-path meta.csv

For every row three files go to --save-dir: NAME_ori, the clip as the VAE gets it; NAME_rec, its
reconstruction; NAME_spatial, the reconstruction by the 2D VAE alone, which tells the losses of the
two parts apart. Clips are mp4, single frames png. `metrics.jsonl` has one object a row, and
`summary.json` their means and the mean and spread of every latent channel: what `shift` and `scale`
of a newly trained VAE should be.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.config import parse_command_line, setting
from opensora.data.batch import Size
from opensora.data.dataset import VariableVideoTextDataset, build_dataset
from opensora.data.loader import Loader
from opensora.data.sampler import FixedSampler
from opensora.devices import choose_device, choose_dtype
from opensora.errors import UsageError
from opensora.files import check_folder, write_text
from opensora.media import estimate_bytes, write_clip
from opensora.models.vae import SPATIAL_SCALE, VideoAutoencoder
from opensora.models.vae.loading import TINY, build_vae
from opensora.models.vae.losses import fold_frames, kl_loss, reconstruction_loss
from opensora.models.vae.lpips import LPIPS
from opensora.program import run_program, stop_if_requested
from opensora.training.vae_objective import psnr

_ALONE = "accepted; clips are taken one at a time here"
DATA, MODEL, LOSS, OUTPUT = "data", "model", "losses", "output"
KINDS = ("ori", "rec", "spatial")
_SSIM_SIDE = 11  # of its window, pixels


@dataclasses.dataclass(frozen=True)
class InferenceVAEConfig:
    """Hold the settings of one run; names are those of Open-Sora's configs/vae/inference."""

    dataset: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_path: str | None = setting(
        None, "table of clips (over dataset.data_path)", group=DATA, metavar="TABLE"
    )
    num_frames: int | None = setting(None, "frames of a clip", group=DATA, minimum=1)
    image_size: tuple[int, int] | None = setting(None, "height and width in pixels", group=DATA)
    frame_interval: int | None = setting(None, "step between frames", group=DATA, minimum=1)
    num_samples: int | None = setting(None, "rows to take (default: all)", group=DATA, minimum=1)
    max_test_samples: int | None = setting(
        None, "upstream's other name of num_samples", group=DATA, minimum=1
    )
    num_workers: int = setting(4, "threads that read clips", group=DATA, minimum=0)
    batch_size: int = setting(1, "upstream's batch size", group=DATA, minimum=1, note=_ALONE)

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    ckpt_path: str | None = setting(
        None, "weights (over model.from_pretrained): tiny, a folder, a hub id", group=MODEL
    )
    dtype: str | None = setting(
        None, "precision (default: bf16 on a GPU that has it, else fp32)", group=MODEL,
        choices=("fp32", "bf16", "fp16"),
    )  # fmt: skip
    device: str | None = setting(None, "cpu, cuda (default: a GPU if there is one)", group=MODEL)
    seed: int = setting(
        42, "of the posteriors' noise and the clips' starts", group=MODEL, minimum=0
    )
    sample: bool = setting(
        True, "draw from the posteriors, as published; --no-sample takes their means", group=MODEL
    )

    perceptual_loss_weight: float = setting(0.1, "of LPIPS in nll", group=LOSS, minimum=0)
    lpips_path: tuple[str, ...] | None = setting(
        None, "weights of LPIPS: a folder, or files (default: without)", group=LOSS, metavar="PATH"
    )
    kl_loss_weight: float = setting(1e-6, "of the KL term", group=LOSS, minimum=0)
    cal_stats: bool = setting(True, "measure mean and spread of the latents", group=LOSS)

    save_dir: str = setting("samples/vae", "folder of the results", group=OUTPUT, metavar="FOLDER")
    save_clips: bool = setting(True, "write clips; --no-save-clips only measures", group=OUTPUT)
    fps: float | None = setting(None, "of the files (default: the clips')", group=OUTPUT, minimum=1)
    log_stats_every: int = setting(100, "rows between lines of means", group=OUTPUT, minimum=1)


def reconstruct(config: InferenceVAEConfig) -> dict[str, Any]:
    """Reconstruct and measure the clips that `config` names.

    Returns:
        The content of summary.json: "rows", "failed", means of the rows' measures, and
        "latent_mean" and "latent_std", one number per channel.

    Raises:
        UsageError: a table or folder that cannot be used, or no row can be read.
        WeightsError: weights are missing, damaged or of another model.
    """
    dataset = _build_dataset(config)
    size = dataset.size
    assert size is not None
    folder = Path(config.save_dir)
    rows = len(dataset.entries()) - len(dataset.problems)
    count = min(rows, config.num_samples or config.max_test_samples or rows)
    check_folder(folder, count * len(KINDS) * estimate_bytes(*size) if config.save_clips else 0)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    source = config.ckpt_path or (None if config.model else TINY)
    vae, origin = build_vae(config.model, source=source, dtype=dtype, device=device)
    print(f"{origin}: {count} of {rows} rows as {size.frames} x {size.height} x {size.width}")
    perceptual = None
    if config.lpips_path:
        perceptual = LPIPS.from_files(config.lpips_path).to(device)
    names = _names(dataset)
    measured: defaultdict[str, list[float]] = defaultdict(list)
    entries = dataset.entries()
    failed = {entries[index].name: reason for index, reason in dataset.problems.items()}
    latents, lines = _Spread(), []
    for index, clip, fps, reasons in _clips(dataset, size, count, config):
        stop_if_requested()
        failed |= reasons
        if clip is None:
            print(f"{names[index]}: left out, {next(iter(reasons.values()))}", flush=True)
            continue
        torch.manual_seed(config.seed + index)
        values, made, z = _measure(vae, clip.to(device), config, perceptual)
        latents.add(z)
        for name, value in values.items():
            measured[name].append(value)
        lines.append(json.dumps({"row": entries[index].name, **values}))
        print(names[index], _shown(values), sep=": ", flush=True)
        if config.save_clips:
            suffix = ".png" if size.frames == 1 else ".mp4"
            for kind, video in zip(KINDS, made, strict=True):
                recipe = {"row": entries[index].name, "vae": origin, "kind": kind}
                path = folder / f"{names[index]}_{kind}{suffix}"
                write_clip(path, video.cpu(), config.fps or fps, {**recipe, **values})
        if len(lines) % config.log_stats_every == 0:
            print(f"{len(lines)} rows: {_shown(_means(measured))}", flush=True)
    summary: dict[str, Any] = {"rows": len(lines), "failed": failed, **_means(measured)}
    if config.cal_stats:
        summary["latent_mean"], summary["latent_std"] = latents.result()
    write_text(folder / "metrics.jsonl", "\n".join([*lines, ""]))
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


@torch.no_grad()
def _measure(
    vae: VideoAutoencoder,
    clip: Tensor,
    config: InferenceVAEConfig,
    perceptual: LPIPS | None,
) -> tuple[dict[str, float], tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return what is measured, the three videos [3, T, H, W], and the raw latent."""
    x = clip[None].to(vae.scale)
    out = vae(x, sample=config.sample)
    spatial = vae.spatial_decode(out.x_z / SPATIAL_SCALE)
    x, made, alone = x.float(), out.x_rec.float(), spatial.float()
    values = {"psnr": float(psnr(x, made)), "psnr_spatial": float(psnr(x, alone))}
    if min(x.shape[3:]) >= _SSIM_SIDE and importlib.util.find_spec("torchmetrics"):
        values["ssim"] = _ssim(x, made)
    if perceptual is not None:
        distance = perceptual(fold_frames(x), fold_frames(made.clamp(-1, 1)))
        values["lpips"] = float(distance.mean())
    nll = reconstruction_loss(
        x, made, perceptual=perceptual, perceptual_weight=config.perceptual_loss_weight
    )
    values |= {
        "nll": float(nll),
        "kl": config.kl_loss_weight * float(kl_loss(out.posterior)),
        "z_nll": float(reconstruction_loss(out.x_z, out.x_z_rec)),
    }
    return values, (x[0], made[0], alone[0]), out.z


def _ssim(x: Tensor, made: Tensor) -> float:
    """Compute the mean structural similarity of the frames of [1, 3, T, H, W] in [-1, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    made, x = ((fold_frames(video.clamp(-1, 1)) + 1) / 2 for video in (made, x))
    value: Any = structural_similarity_index_measure(made, x, data_range=1.0)
    return float(value)


class _Spread:
    """Sum up latents for the mean and standard deviation of every channel."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | None = None

    def add(self, z: Tensor) -> None:
        """Take a latent [1, C, T, H, W]."""
        values = z[0].double().cpu().flatten(1)
        sums = torch.stack([values.sum(1), values.square().sum(1)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += values.shape[1]

    def result(self) -> tuple[list[float], list[float]]:
        """Return (means, standard deviations)."""
        if self._sums is None:
            return [], []
        mean, square = self._sums / self._count
        spread = (square - mean.square()).clamp(min=0).sqrt()
        return ([round(v, 4) for v in part.tolist()] for part in (mean, spread))  # type: ignore[return-value]


def _build_dataset(config: InferenceVAEConfig) -> VariableVideoTextDataset:
    given = {
        "num_frames": config.num_frames,
        "image_size": config.image_size,
        "frame_interval": config.frame_interval,
        "data_path": config.data_path,
    }
    settings = {"type": "VideoTextDataset", **config.dataset}
    settings |= {key: value for key, value in given.items() if value is not None}
    if settings["type"] != "VideoTextDataset":
        raise UsageError(
            f"dataset.type {settings['type']!r}: clips of one size are reconstructed, type "
            "'VideoTextDataset'"
        )
    dataset = build_dataset(settings)
    assert isinstance(dataset, VariableVideoTextDataset)
    return dataset


def _clips(
    dataset: VariableVideoTextDataset, size: Size, count: int, config: InferenceVAEConfig
) -> Iterator[tuple[int, Tensor | None, float, dict[str, str]]]:
    """Yield (row, clip or None, frames per second, name -> why it failed), in the table's order."""
    sampler = FixedSampler(dataset.entries(), size, 1, seed=config.seed, shuffle=False)
    rows = [index for planned in sampler.epoch(0) for index in planned.indices]
    loader = Loader(dataset, sampler, workers=config.num_workers, seed=config.seed, epochs=1)
    if not rows:
        raise UsageError(
            f"no row of {dataset.table.path} can be read; the first one: "
            f"{dataset.problems.get(0, 'unknown')}"
        )
    for index, batch in zip(rows, islice(loader.batches(), count), strict=False):
        clip = None if batch.video is None else batch.video[0]
        fps = float(batch.conditions["fps"][0]) if clip is not None else 0.0
        yield index, clip, fps, batch.failed


def _names(dataset: VariableVideoTextDataset) -> list[str]:
    """Return a file name for every row: that of its file, with the line where two would be one."""
    stems = Counter(row.path.stem for row in dataset.table.rows)
    return [
        row.path.stem if stems[row.path.stem] == 1 else f"{row.path.stem}-{row.line}"
        for row in dataset.table.rows
    ]


def _means(measured: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in measured.items()}


def _shown(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def main(argv: Sequence[str] | None = None, program: str = "inference_vae.py") -> int:
    """Read a configuration file and flags, then reconstruct; returns the exit status."""

    def run() -> int:
        config, sources = parse_command_line(
            InferenceVAEConfig,
            sys.argv[1:] if argv is None else argv,
            program,
            description="Reconstruct clips with a video VAE and measure the loss.",
        )
        print(sources.table(config), *sources.notes, sep="\n", flush=True)
        summary = reconstruct(config)
        means = {name: value for name, value in summary.items() if isinstance(value, float)}
        print(f"{summary['rows']} rows, {len(summary['failed'])} left out: {_shown(means)}")
        if config.cal_stats:
            print(f"latents: mean {summary['latent_mean']}, spread {summary['latent_std']}")
        if "ssim" not in summary:
            print("without SSIM: pip install torchmetrics, and frames of 11 pixels or more")
        print(f"wrote {config.save_dir}")
        return 0

    return run_program(run)
