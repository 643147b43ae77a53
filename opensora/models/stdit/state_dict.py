"""Read an STDiT3's architecture off the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from opensora.errors import WeightsError
from opensora.models.stdit.config import STDiT3Config

# The published models' head width, for weights without qk-norm, whose shapes do not show it.
_HEAD_WIDTH = 72


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> STDiT3Config:
    """Return the config of a state dict; what shapes cannot tell has its published default.

    Those are input_size, input_sq_size, class_dropout_prob and drop_path, and the number of heads
    where neither a `q_norm` nor `rope.freqs` is there.

    Args:
        shapes: tensor name -> shape.

    Raises:
        WeightsError: a tensor that decides is missing or has an impossible shape.
    """
    try:
        hidden, in_channels, *patch = shapes["x_embedder.proj.weight"]
        pt, ph, pw = patch
        caption = shapes["y_embedder.y_embedding"]
        values = shapes["final_layer.linear.weight"][0]
        qk_norm = "spatial_blocks.0.attn.q_norm.weight" in shapes
        if qk_norm:
            head = shapes["spatial_blocks.0.attn.q_norm.weight"][0]
        else:
            head = 2 * shapes.get("rope.freqs", (_HEAD_WIDTH // 2,))[0]
        return STDiT3Config(
            in_channels=in_channels,
            patch_size=(pt, ph, pw),
            hidden_size=hidden,
            depth=_count("spatial_blocks.", shapes),
            num_heads=hidden // head,
            mlp_ratio=shapes["spatial_blocks.0.mlp.fc1.weight"][0] / hidden,
            pred_sigma=values // (pt * ph * pw) == 2 * in_channels,
            caption_channels=caption[1],
            model_max_length=caption[0],
            qk_norm=qk_norm,
        )
    except KeyError as error:
        raise WeightsError(
            f"cannot tell the size of this STDiT3: the tensor {error} is missing; pass the folder "
            "that has its config.json"
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(
            f"cannot tell the size of this STDiT3 from its shapes ({error}); pass the folder that "
            "has its config.json"
        ) from error


def _count(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many blocks `prefix` numbers."""
    numbers = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1
