"""Give a trained T5 encoder more layers and heads without changing what it computes.

What is new begins with output weights of zero, so training goes on from the states that the rest of
the model knows. New heads look far: by turns at all tokens to the left and to the right, the nearer
the stronger, where those of `T5TextEncoder.byt5` look at neighbours. T5 shares its position bias
between layers, so an encoder whose heads are all near ones cannot tell which of two colours belongs
to which of two shapes, however many layers it has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opensora.errors import UsageError
from opensora.models.text_encoder.lazy_transformers import load_transformers
from opensora.models.text_encoder.t5 import T5TextEncoder

_BIAS = "relative_attention_bias.weight"
#: Position bias of a far head: on its side up to 7 tokens away, on the other side.
_THIS_SIDE, _OTHER_SIDE = 1.0, -4.0
#: What it loses a bucket from there on (8, 12, 16, 23, 32, 46, 64, 91 tokens); head by head.
_LOSSES = (0.7, 0.3)


def grow(encoder: T5TextEncoder, num_layers: int, num_heads: int) -> T5TextEncoder:
    """Return an encoder of more layers and heads that gives the same states.

    Args:
        encoder: is copied.
        num_layers: at least as many as it has.
        num_heads: at least as many as it has, of the same width.

    Raises:
        UsageError: fewer than it has.
    """
    config: Any = copy.deepcopy(encoder.model.config)
    heads, layers = config.num_heads, config.num_layers
    if num_layers < layers or num_heads < heads:
        raise UsageError(
            f"text_encoder.grow: the encoder has {layers} layers and {heads} heads, which can only "
            f"become more, not {num_layers} and {num_heads}"
        )
    config.num_layers, config.num_heads = num_layers, num_heads
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same on every process
        model: Any = load_transformers().T5EncoderModel(config)
    old = encoder.model.state_dict()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith(("SelfAttention.o.weight", "wo.weight")):
                weight.zero_()
            if name.endswith(_BIAS):
                _look_far(weight, heads)
            if name in old:
                known = old[name]
                weight[tuple(slice(0, size) for size in known.shape)] = known
    model.to(device=encoder.device, dtype=encoder.dtype).train(encoder.model.training)
    return T5TextEncoder(model, encoder.tokenizer, encoder.max_length)


def grow_to_fit(encoder: T5TextEncoder, weights: Mapping[str, Tensor]) -> T5TextEncoder:
    """Return an encoder as large as weights of its model are, or the encoder itself if that fails.

    Args:
        encoder: of the same width.
        weights: name -> tensor, of a model that may have been grown.
    """
    blocks = {int(name.split(".")[2]) for name in weights if name.startswith("encoder.block.")}
    heads = next((w.shape[1] for name, w in weights.items() if name.endswith(_BIAS)), 0)
    config: Any = encoder.model.config
    if len(blocks) < config.num_layers or heads < config.num_heads:
        return encoder
    if (len(blocks), heads) == (config.num_layers, config.num_heads):
        return encoder
    return grow(encoder, len(blocks), heads)


def _look_far(table: Tensor, first: int) -> None:
    """Set the biases [buckets, heads] of the heads from `first` on: left, right, left, ..."""
    half = table.shape[0] // 2  # the upper half of the buckets holds the tokens to the right
    near = half // 2  # buckets of one distance each; the others grow by a constant factor
    distance = torch.arange(half).sub(near - 1).clamp(min=0).to(table)
    for head in range(first, table.shape[1]):
        side = (head - first) % 2
        loss = _LOSSES[(head - first) // 2 % len(_LOSSES)]
        table[:, head] = _OTHER_SIDE
        table[side * half : (side + 1) * half, head] = _THIS_SIDE - loss * distance
