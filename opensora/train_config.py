"""Name every setting of the training program: configuration keys, flags, defaults, limits.

The names are those of Open-Sora 1.2's training configurations and flags, plus our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opensora.config import setting
from opensora.errors import UsageError
from opensora.sample_config import DTYPE_WORDS, Section

DATA, MODELS, OPTIMISER, EXECUTION, OUTPUT = "data", "models", "optimiser", "execution", "run"

_AUTOMATIC = "accepted; the fastest exact kernel is chosen automatically here"


@dataclass(frozen=True)
class TrainConfig:
    """Hold the settings of one training run; see `scripts/train.py --help`."""

    # Dicts; ruff takes a dict default for a mutable one.
    dataset: Section = setting(None, "type, data_path, transform_name, ...")  # noqa: RUF009
    bucket_config: dict[Any, Any] | None = setting(  # noqa: RUF009
        None, "resolution -> frames -> (keep probability, batch size)"
    )
    data_path: str | None = setting(
        None, "table of clips (dataset.data_path)", group=DATA, metavar="FILE"
    )
    batch_size: int | None = setting(
        None, "clips per batch, where there are no buckets", group=DATA, minimum=1
    )
    load_video_features: bool = setting(False, "the dataset holds latents", group=DATA)
    load_text_features: bool = setting(False, "the dataset holds text states", group=DATA)
    num_workers: int = setting(4, "threads that read ahead", group=DATA, minimum=0)
    prefetch: int = setting(4, "batches read ahead", group=DATA, minimum=1)
    mask_ratios: dict[str, float] | None = setting(  # noqa: RUF009
        None, "share of each kind of given frames"
    )

    model: Section = setting(None, "transformer")  # noqa: RUF009
    vae: Section = setting(None, "video autoencoder, frozen")  # noqa: RUF009
    text_encoder: Section = setting(None, "text encoder; train=True trains it along")  # noqa: RUF009
    scheduler: Section = setting(None, "training loss and timesteps")  # noqa: RUF009
    lora: Section = setting(None, "rank, alpha, targets: train these alone")  # noqa: RUF009
    ckpt_path: str | None = setting(
        None, "weights to start from (model.from_pretrained)", group=MODELS, metavar="PATH"
    )
    clean_captions: bool = setting(
        True, "clean captions as prompts are cleaned when clips are made", group=MODELS
    )
    caption_fps: float | None = setting(
        None, "frame rate that the model is told (default: the clip's)", group=MODELS
    )
    vae_out_channels: int = setting(4, "of latents in a cache", group=MODELS)
    text_encoder_output_dim: int = setting(4096, "of text states in a cache", group=MODELS)
    text_encoder_model_max_length: int = setting(300, "of text states in a cache", group=MODELS)

    epochs: int = setting(1000, "passes over the table", group=OPTIMISER, minimum=1)
    max_steps: int | None = setting(
        None, "stop after so many optimiser steps", group=OPTIMISER, minimum=1
    )
    accumulation_steps: int = setting(1, "batches a step", group=OPTIMISER, minimum=1)
    optimizer: Section = setting(None, "name: adamw, muon; further options")  # noqa: RUF009
    lr: float = setting(1e-4, "learning rate", group=OPTIMISER, minimum=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", group=OPTIMISER, minimum=0)
    adam_eps: float = setting(1e-8, "epsilon of Adam", group=OPTIMISER, minimum=0)
    warmup_steps: int | None = setting(None, "steps of linear warm-up", group=OPTIMISER, minimum=0)
    decay: float = setting(
        0.0, "last part of the run over which the rate falls to 0", group=OPTIMISER,
        minimum=0, maximum=1,
    )  # fmt: skip
    grad_clip: float | str | None = setting(
        None, "largest gradient norm, or adaptive", group=OPTIMISER, metavar="NORM|adaptive"
    )
    ema_decay: float = setting(
        0.9999, "decay of the averaged weights", group=OPTIMISER, minimum=0, maximum=1
    )
    ema_warm_up: bool = setting(
        False, "begin with a short average, and lengthen it", group=OPTIMISER
    )
    max_bad_steps: int = setting(
        3, "steps without a finite loss in a row before going back", group=OPTIMISER, minimum=1
    )

    dtype: str = setting(
        "bf16", "precision of the products", group=EXECUTION, choices=DTYPE_WORDS,
        metavar="fp32|bf16|fp16",
    )  # fmt: skip
    device: str = setting("auto", "auto, cpu or cuda", group=EXECUTION, env=True)
    sp_size: int = setting(
        1, "processes that share a clip (sequence parallel)", group=EXECUTION, minimum=1
    )
    replicate: int = setting(
        1, "groups that hold the weights once each (HSDP)", group=EXECUTION, minimum=1
    )
    grad_checkpoint: bool = setting(False, "recompute every block", group=EXECUTION)
    recompute: str | None = setting(
        None,
        "what the backward pass computes again (default: by grad_checkpoint, all or nothing)",
        group=EXECUTION,
        metavar="none|full|every-N|first-N|ops",
    )
    compile: bool = setting(False, "compile every block", group=EXECUTION)
    cpu_offload: bool = setting(False, "keep weights in host memory", group=EXECUTION)
    timeout: float = setting(
        600.0, "seconds before a collective that nobody answers fails", group=EXECUTION, minimum=1
    )

    seed: int = setting(42, "of data, timesteps and noise", group=OUTPUT, minimum=0, maximum=2**62)
    outputs: str = setting("outputs", "folder of all runs", group=OUTPUT)
    load: str | None = setting(
        None, "checkpoint to go on from: a folder, or latest", group=OUTPUT, metavar="PATH|latest"
    )
    start_from_scratch: bool = setting(
        False, "take the weights of --load alone, from step 0", group=OUTPUT
    )
    log_every: int = setting(10, "steps between log lines", group=OUTPUT, minimum=1)
    ckpt_every: int = setting(
        0, "steps between checkpoints; 0: one at the end", group=OUTPUT, minimum=0
    )
    keep_last: int = setting(3, "newest checkpoints kept", group=OUTPUT, minimum=1)
    keep_every: int = setting(
        0, "keep those whose step it divides for good", group=OUTPUT, minimum=0
    )
    validation: Section = setting(None, "every, data_path, timesteps, prompts")  # noqa: RUF009
    defaults: Section = setting(None, "of requests, kept with the exported pipeline")  # noqa: RUF009
    tensorboard: bool = setting(False, "also log for TensorBoard", group=OUTPUT)
    wandb: bool = setting(False, "also log to Weights & Biases", group=OUTPUT)
    dry_run: bool = setting(
        False, "run one step of every bucket, fit batch sizes, and stop", group=OUTPUT
    )
    quiet: bool = setting(False, "no progress", group=OUTPUT, flags=("-q",), env=True)

    plugin: str | None = setting(
        None, "no effect", group=EXECUTION, choices=("zero2", "zero2-seq"),
        note="accepted; weights, gradients and optimiser are sharded by FSDP2",
    )  # fmt: skip
    num_bucket_build_workers: int | None = setting(
        None, "no effect", group=DATA, note="accepted; a table is sorted into buckets at once"
    )
    flash_attn: bool | None = setting(None, "no effect", group=MODELS, note=_AUTOMATIC)
    layernorm_kernel: bool | None = setting(None, "no effect", group=MODELS, note=_AUTOMATIC)

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            UsageError: a precision, policy or checkpoint that cannot be meant.
        """
        if isinstance(self.grad_clip, str) and self.grad_clip != "adaptive":
            raise UsageError(f"grad_clip {self.grad_clip!r}: give a number or adaptive")
        if self.dtype in ("fp16", "float16"):
            raise UsageError(
                f"dtype {self.dtype}: small gradients would round to 0 in it. Train in bf16, which "
                "is as fast and has float32's range, or in fp32; make clips of the result in fp16"
            )
        if self.start_from_scratch and self.load is None and self.ckpt_path is None:
            raise UsageError("--start-from-scratch needs --load, the checkpoint to take")

    @property
    def checkpointing(self) -> str:
        """Return the policy of activation checkpointing: none, full, every-N, first-N or ops."""
        return self.recompute or ("full" if self.grad_checkpoint else "none")
