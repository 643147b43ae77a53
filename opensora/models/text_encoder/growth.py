"""Give a trained T5 encoder more layers and heads that carry words on to the words after them.

A small byte-level encoder whose heads look at neighbouring letters knows words, but not which of
two colours belongs to which of two motions: T5 shares its position bias between layers, so no
number of such layers carries a word far. What starts at zero does not learn to either, for the
stream between the layers grows large (its root mean square is 423 in the first embedded model, and
an update of the weights 0.003). So new heads of new layers begin as copies: each adds to every
token, in its own dimensions, what lies to its left, the nearer the more.
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
#: Position bias of new heads: of the token itself, what it loses a bucket to the left (by turns;
#: buckets are 1 token up to 7, then 8, 12, 16, 23, 32, 46, 64 and 91 away), and to the right.
_SELF, _LOSSES, _RIGHT = 2.0, (0.3, 0.15), -6.0
#: What is of usual size in the stream is found by encoding this.
_TEXT = "a red circle moving up and a blue square standing still"


def grow(
    encoder: T5TextEncoder, num_layers: int, num_heads: int, share: float = 0.5
) -> T5TextEncoder:
    """Return an encoder of more layers and heads.

    New heads of present layers change nothing at first, nor do present heads and feed-forward
    parts of new layers.

    Args:
        encoder: is copied.
        num_layers: at least as many as it has.
        num_heads: at least as many as it has, of the same width.
        share: what new layers' new heads add, as a part of the stream; 0 changes no states.

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
    if (num_layers, num_heads) == (layers, heads):
        return encoder
    config.num_layers, config.num_heads = num_layers, num_heads
    generator = torch.Generator().manual_seed(0)  # the same on every process
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = load_transformers().T5EncoderModel(config)
    old = encoder.model.state_dict()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith(("SelfAttention.o.weight", "wo.weight")):
                weight.zero_()
            if name.endswith(_BIAS):
                _look_left(weight, heads)
            if name in old:
                known = old[name]
                weight[tuple(slice(0, size) for size in known.shape)] = known
        size = share * _stream(encoder)
        for block in model.encoder.block[layers:]:
            _copy(block.layer[0].SelfAttention, heads, size, generator)
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
    return grow(encoder, len(blocks), heads)


def _look_left(table: Tensor, first: int) -> None:
    """Set the biases [buckets, heads] of the heads from `first` on."""
    left = table.shape[0] // 2  # the upper half of the buckets holds the tokens to the right
    distance = torch.arange(left).to(table)
    for head in range(first, table.shape[1]):
        table[left:, head] = _RIGHT
        table[:left, head] = _SELF - _LOSSES[(head - first) % len(_LOSSES)] * distance


def _copy(attention: Any, first: int, size: float, generator: torch.Generator) -> None:
    """Let the heads from `first` on attend by position alone and pass on what they see."""
    wide = attention.o.weight.shape[0]
    each = attention.o.weight.shape[1] // attention.n_heads
    rows = torch.linalg.qr(torch.randn(wide, wide, generator=generator))[0].to(attention.o.weight)
    for head in range(first, attention.n_heads):
        own = torch.arange(head * each, (head + 1) * each)
        seen = rows[((head - first) * each + torch.arange(each)) % wide]
        attention.q.weight[own] = 0
        attention.v.weight[own] = seen
        attention.o.weight[:, own] = size * seen.T


def _stream(encoder: T5TextEncoder) -> float:
    """Return the root mean square of the stream that enters the last norm."""
    found: list[Tensor] = []
    model: Any = encoder.model
    handle = model.encoder.final_layer_norm.register_forward_pre_hook(
        lambda module, given: found.append(given[0])
    )
    ids, mask = encoder.tokenizer(_TEXT, return_tensors="pt").values()
    model(input_ids=ids.to(encoder.device), attention_mask=mask.to(encoder.device))
    handle.remove()
    return float(found[0].square().mean().sqrt())
