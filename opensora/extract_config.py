"""Name every setting of the program that extracts features; the names are Open-Sora's, and more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opensora.config import setting

_TRAINING = "accepted; it belongs to training"


@dataclass(frozen=True)
class ExtractConfig:
    """Hold the settings of an extraction; see `--help`."""

    # Dicts with `type`; ruff takes a dict default for a mutable one.
    dataset: dict[str, Any] | None = setting(None, "table of clips")  # noqa: RUF009
    bucket_config: dict[str, Any] | None = setting(None, "sizes of clips")  # noqa: RUF009
    vae: dict[str, Any] | None = setting(None, "video autoencoder")  # noqa: RUF009
    text_encoder: dict[str, Any] | None = setting(None, "text encoder")  # noqa: RUF009
    data_path: str | None = setting(None, "table; stands in for dataset.data_path")
    ckpt_path: str | None = setting(None, "pipeline whose VAE and text encoder are taken")
    outputs: str = setting("outputs/features", "folder of the features")
    save_latents: bool = setting(True, "encode the clips")
    save_text_features: bool = setting(False, "encode the captions")
    save_compressed_text_features: bool = setting(
        False, "the same: states are stored without padding either way"
    )
    save_distribution: bool = setting(
        True, "store mean and deviation of latents, so that training draws them; no: one draw"
    )
    clean_captions: bool = setting(True, "clean captions as Open-Sora does before it encodes them")
    features_dtype: str = setting(
        "fp16", "type of what is stored", choices=("fp32", "bf16", "fp16")
    )
    dtype: str | None = setting(
        None, "precision of the models (default: bf16 on a GPU, fp32 on a CPU)", env=True
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1", env=True)
    seed: int = setting(1024, "of buckets and of the frames that are read", minimum=0)
    batch_size: int | None = setting(None, "clips together (default: the bucket's)", minimum=1)
    bin_size: int = setting(250, "rows a shard; a kill costs at most these", minimum=1)
    num_workers: int = setting(4, "threads that read clips", minimum=1)
    start_index: int = setting(0, "first row of the table", minimum=0)
    end_index: int | None = setting(None, "row to stop before", minimum=0)
    overwrite: bool = setting(False, "encode rows anew that are stored already")
    log_every: float = setting(10.0, "seconds between lines of progress", minimum=0)

    model: dict[str, Any] | None = setting(None, "no effect", note=_TRAINING)  # noqa: RUF009
    wandb: bool = setting(False, "no effect", note=_TRAINING)
    epochs: int | None = setting(None, "no effect", note="accepted; rows are encoded once")
    num_bucket_build_workers: int | None = setting(None, "no effect", note=_TRAINING)
    log_time: bool = setting(False, "no effect", note="accepted; progress shows rows a second")
