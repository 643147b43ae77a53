"""Name every setting of VAE training: configuration keys, flags, defaults, limits.

The names and defaults are those of Open-Sora 1.2's configs/vae/train and its training script, plus
a few of our own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opensora.config import setting
from opensora.config_file import suggest
from opensora.errors import UsageError
from opensora.models.vae.lpips import NEEDED

MIXED = ("mixed_video_image", "mixed_video_random")
_ENGINE = "accepted; parameters are copied to every process and gradients averaged here"
DATA, MODEL, LOSS, GAN, RUN = "data", "model", "losses", "discriminator", "run"


@dataclass(frozen=True)
class TrainVAEConfig:
    """Hold the settings of one training run; see `scripts/train_vae.py --help`."""

    dataset: dict[str, Any] = field(default_factory=dict)
    data_path: str | None = setting(
        None, "table of clips (over dataset.data_path)", group=DATA, metavar="TABLE"
    )
    num_frames: int | None = setting(None, "frames of a clip", group=DATA, minimum=1)
    image_size: tuple[int, int] | None = setting(None, "height and width in pixels", group=DATA)
    batch_size: int = setting(1, "clips a process takes at a time", group=DATA, minimum=1)
    num_workers: int = setting(4, "threads that read clips", group=DATA, minimum=0)
    prefetch: int = setting(2, "batches read ahead", group=DATA, minimum=1)
    mixed_strategy: str | None = setting(
        None,
        "mixed_video_image: some batches keep their first frame alone; mixed_video_random: "
        "batches keep a random number of first frames",
        group=DATA,
        choices=MIXED,
    )
    mixed_image_ratio: float = setting(
        0.0, "share of batches that keep one frame", group=DATA, minimum=0, maximum=1
    )

    model: dict[str, Any] = field(default_factory=dict)
    ckpt_path: str | None = setting(None, "weights (over model.from_pretrained)", group=MODEL)
    dtype: str = setting(
        "bf16", "precision of the computation; weights are fp32", group=MODEL,
        choices=("bf16", "fp32"),
    )  # fmt: skip
    grad_checkpoint: bool = setting(False, "recompute blocks instead of keeping them", group=MODEL)
    device: str | None = setting(None, "cpu, cuda (default: a GPU if there is one)", group=MODEL)
    plugin: str = setting("zero2", "upstream's engine", group=MODEL, note=_ENGINE)
    sp_size: int = setting(
        1, "upstream's sequence parallelism", group=MODEL, unavailable="VAEs train with sp_size 1"
    )

    use_real_rec_loss: bool = setting(False, "compare pixels, and add the KL term", group=LOSS)
    use_z_rec_loss: bool = setting(False, "compare 2D latents", group=LOSS)
    use_image_identity_loss: bool = setting(
        False, "let the temporal latent of a single frame be its 2D latent", group=LOSS
    )
    perceptual_loss_weight: float = setting(
        0.1, "of LPIPS, where pixels are compared", group=LOSS, minimum=0
    )
    lpips_path: tuple[str, ...] | None = setting(
        None, "weights of LPIPS: a folder, or files", group=LOSS, metavar="PATH"
    )
    kl_loss_weight: float = setting(1e-6, "of the KL term", group=LOSS, minimum=0)
    logvar_init: float = setting(0.0, "log of the assumed variance of a value", group=LOSS)

    discriminator: dict[str, Any] | None = field(default=None)
    discriminator_factor: float = setting(1.0, "of both adversarial losses", group=GAN, minimum=0)
    discriminator_start: int = setting(-1, "first step with adversarial losses", group=GAN)
    generator_factor: float = setting(
        0.5, "of the generator's loss, over its adaptive weight", group=GAN, minimum=0
    )
    generator_loss_type: str = setting(
        "hinge", "loss of the decoder", group=GAN, choices=("hinge", "non-saturating")
    )
    discriminator_loss_type: str = setting(
        "hinge", "loss of the discriminator", group=GAN,
        choices=("hinge", "vanilla", "non-saturating"),
    )  # fmt: skip
    lecam_loss_weight: float | None = setting(
        None, "of LeCam's regulariser, with the hinge loss", group=GAN, minimum=0
    )
    gradient_penalty_loss_weight: float | None = setting(
        None, "upstream's gradient penalty", group=GAN,
        unavailable="a gradient penalty is not supported; use lecam_loss_weight",
    )  # fmt: skip

    seed: int = setting(1024, "of weights, order, crops, lengths and noise", group=RUN, minimum=0)
    outputs: str = setting("outputs", "folder of the runs", group=RUN, metavar="FOLDER")
    load: str | None = setting(
        None, "checkpoint to resume: latest, or a folder", group=RUN, metavar="latest|FOLDER"
    )
    epochs: int = setting(1000, "times through the table", group=RUN, minimum=1)
    accumulation_steps: int = setting(1, "batches of a step", group=RUN, minimum=1)
    lr: float = setting(1e-5, "step size of AdamW", group=RUN, minimum=0)
    warmup_steps: int | None = setting(None, "steps of the warm-up", group=RUN, minimum=0)
    weight_decay: float = setting(0.0, "of AdamW", group=RUN, minimum=0)
    adam_eps: float = setting(1e-8, "of AdamW", group=RUN, minimum=0)
    grad_clip: float = setting(0.0, "largest gradient norm; 0: none", group=RUN, minimum=0)
    ema_decay: float | None = setting(
        None, "average the weights; the averages are what is saved", group=RUN,
        minimum=0, maximum=1,
    )  # fmt: skip
    log_every: int = setting(1, "steps between log lines", group=RUN, minimum=1)
    ckpt_every: int = setting(0, "steps between checkpoints; 0: only the end", group=RUN, minimum=0)
    keep_last: int | None = setting(None, "checkpoints to keep", group=RUN, minimum=1)
    keep_every: int | None = setting(
        None, "keep checkpoints of steps divisible by this for good", group=RUN, minimum=1
    )
    wandb: bool = setting(False, "also log to Weights & Biases", group=RUN)
    tensorboard: bool = setting(False, "also log to TensorBoard", group=RUN)

    @property
    def needs_pixels(self) -> bool:
        """Tell whether a loss looks at reconstructed pixels; else the 2D decoder does not run."""
        return self.use_real_rec_loss or self.discriminator is not None

    @property
    def needs_perceptual(self) -> bool:
        """Tell whether LPIPS is part of a loss."""
        return self.needs_pixels and self.perceptual_loss_weight > 0

    def clip(self) -> tuple[int, int, int]:
        """Return frames, height and width of the clips.

        Raises:
            UsageError: neither the dataset nor the configuration says them, or they disagree in
                form.
        """
        frames = self.num_frames or self.dataset.get("num_frames")
        size = self.image_size or self.dataset.get("image_size")
        if isinstance(size, int):
            size = (size, size)
        if not isinstance(frames, int) or frames < 1:
            raise UsageError("num_frames is not set: give --num-frames N")
        if not isinstance(size, tuple | list) or len(size) != 2 or min(size) < 8:
            raise UsageError(
                f"image_size {size!r}: expected height and width: give --image-size H W"
            )
        return frames, int(size[0]), int(size[1])

    def dataset_settings(self) -> dict[str, Any]:
        """Return what `build_dataset` takes: the dataset's entry under the flags that override it.

        Raises:
            UsageError: see `clip`.
        """
        frames, height, width = self.clip()
        if self.dataset.get("type") == "ShapesDataset":
            return dict(self.dataset)
        settings = {"type": "VideoTextDataset", "frame_interval": 1, **self.dataset}
        settings |= {"num_frames": frames, "image_size": (height, width)}
        if self.data_path is not None:
            settings["data_path"] = self.data_path
        return settings

    def check(self) -> None:
        """Refuse settings that do not go together, before anything is loaded.

        Raises:
            UsageError: says which, and what to type.
        """
        kind = self.dataset.get("type", "VideoTextDataset")
        if kind not in ("VideoTextDataset", "ShapesDataset"):
            raise UsageError(
                f"dataset.type {kind!r}: VAEs train on clips of one size, type "
                f"'VideoTextDataset'{suggest(str(kind), ['VideoTextDataset'])}"
            )
        if not (self.use_real_rec_loss or self.use_z_rec_loss):
            raise UsageError(
                "no reconstruction loss is on: set use_real_rec_loss (pixels) or use_z_rec_loss "
                "(2D latents)"
            )
        if self.needs_perceptual and not self.lpips_path:
            raise UsageError(
                f"perceptual_loss_weight is {self.perceptual_loss_weight} and pixels are compared: "
                f"{NEEDED}. Give them with --lpips-path PATH, or set --perceptual-loss-weight 0"
            )
        if self.lecam_loss_weight and self.discriminator_loss_type != "hinge":
            raise UsageError(
                f"lecam_loss_weight goes with discriminator_loss_type 'hinge', not "
                f"{self.discriminator_loss_type!r}"
            )
