"""Recognise which model a state dict belongs to, from the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

UNKNOWN = "unknown"

# First match wins: every name of a row is in the state dict, or starts one if it ends with a dot.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("STDiT3", ("spatial_blocks.", "temporal_blocks.", "t_block.1.weight")),
    ("STDiT2", ("blocks.0.attn_temp.qkv.weight", "t_block_temp.1.weight")),
    ("STDiT", ("blocks.0.attn_temp.qkv.weight",)),
    # Their names are the same, only the forward differs.
    ("DiT or Latte", ("blocks.0.adaLN_modulation.1.weight",)),
    ("PixArt", ("blocks.0.cross_attn.q_linear.weight", "blocks.0.scale_shift_table")),
    ("VideoAutoencoderPipeline", ("spatial_vae.", "temporal_vae.")),
    ("AutoencoderKL", ("encoder.down_blocks.", "decoder.up_blocks.")),
    ("VAE_Temporal", ("encoder.block_res_blocks.", "decoder.block_res_blocks.")),
    ("Open-Sora Plan LatteT2V", ("transformer_blocks.", "temporal_transformer_blocks.")),
    ("Open-Sora Plan SUV", ("transformer_blocks.", "skip_norm_linear.")),
    ("Open-Sora Plan", ("transformer_blocks.", "caption_projection.")),
    ("Open-Sora Plan WF-VAE", ("encoder.down1.", "encoder.connect_l1.")),
    ("T5", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
)

# What training programs wrap around a state dict, most wanted first: an average beats its source.
_WRAPPERS = ("ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module")
# What data parallel, torch.compile and Lightning put before or into the names.
_PREFIXES = ("module.", "model.", "ema.", "_orig_mod.")


def identify_family(names: Iterable[str]) -> str:
    """Return the family that tensors of these names belong to, `UNKNOWN` if it is none known.

    Families that this library can load have the name of the model class's `family`.
    """
    names = set(names)

    def has(mark: str) -> bool:
        if not mark.endswith("."):
            return mark in names
        return any(name.startswith(mark) for name in names)

    return next((family for family, marks in _MARKS if all(map(has, marks))), UNKNOWN)


def unwrap(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their plain names; empty if it has none.

    Wrappers such as {"ema": ...} or {"state_dict": ...} are opened and prefixes such as "module."
    dropped where all names have them. Entries that are no tensors are left out.
    """
    while isinstance(content, Mapping):
        inner = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return {}
    found = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    return dict(zip(plain_names(found), found.values(), strict=True))


def plain_names(names: Iterable[str]) -> list[str]:
    """Return the names without torch.compile's marks and without prefixes that all share."""
    plain = [name.replace("_orig_mod.", "") for name in names]
    while prefix := next(
        (p for p in _PREFIXES if plain and all(n.startswith(p) for n in plain)), ""
    ):
        plain = [name.removeprefix(prefix) for name in plain]
    return plain
