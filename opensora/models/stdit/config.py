"""Describe STDiT3 architectures and list the published ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from opensora.errors import UsageError
from opensora.models.config_fields import read_fields

# Keys of published configurations that say how to run or train, not what the model is.
_EXECUTION = (
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
    "sp_size",
    "only_train_temporal",
    "freeze_y_embedder",
    "auto_map",
    "return_dict",
)


@dataclasses.dataclass(frozen=True)
class STDiT3Config:
    """Describe an STDiT3.

    Attributes:
        input_size: latent (T, H, W) that it was made for; kept for published files, unused.
        input_sq_size: side in pixels of the square whose position codes are unscaled.
        in_channels: channels of the latent.
        patch_size: latent (frames, rows, columns) of a token.
        hidden_size: C.
        depth: pairs of a spatial and a temporal block.
        num_heads: H; hidden_size / num_heads is even.
        mlp_ratio: hidden width of the MLPs over C.
        class_dropout_prob: chance to drop a caption in training.
        pred_sigma: predict twice the channels; the second half is unused by rectified flow.
        drop_path: chance to skip a branch of the last block in training, growing with depth.
        caption_channels: width of the text encoder.
        model_max_length: text tokens in training.
        qk_norm: RMSNorm of queries and keys in self-attention.
        skip_y_embedder: text arrives already projected and packed.
    """

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True
    skip_y_embedder: bool = False

    def __post_init__(self) -> None:
        """Check what the layers need."""
        if self.num_heads < 1 or self.hidden_size % (2 * self.num_heads) or self.hidden_size % 4:
            raise UsageError(
                f"STDiT3Config: hidden_size {self.hidden_size} must be a multiple of 4 and of "
                f"twice num_heads {self.num_heads}"
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise UsageError(
                f"STDiT3Config: patch_size must be three positive numbers, got {self.patch_size}"
            )

    @property
    def out_channels(self) -> int:
        """Return the channels of the prediction."""
        return self.in_channels * (2 if self.pred_sigma else 1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> STDiT3Config:
        """Read a published config.json, the `model` entry of a configuration, or `to_dict`.

        Keys that choose kernels, training modes or are bookkeeping are dropped.

        Raises:
            UsageError: an unknown key, with a suggestion; or sizes that do not fit together.
        """
        return cls(**read_fields(cls, data, ignored=_EXECUTION))

    def to_dict(self) -> dict[str, Any]:
        """Return the published config.json's form."""
        return {"model_type": "STDiT3", **dataclasses.asdict(self)}


PRESETS: dict[str, STDiT3Config] = {
    "STDiT3-XL/2": STDiT3Config(),
    "STDiT3-3B/2": STDiT3Config(hidden_size=1872, num_heads=26),
}
