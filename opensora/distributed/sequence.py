"""Split the tokens of one batch over several ranks, and move them between ways of splitting.

Sizes need not be divisible: `split` and `switch` pad with zeros at the end and `gather` drops them.

Gradients: every operation's backward is the transposed communication, so a rank's `.grad` is that
of the *sum* of all the ranks' losses with respect to its own copy of a weight. If each rank of a
group computes the same loss from the gathered result, as a model that gathers its output does, the
*mean* of `.grad` over the group is one process's gradient. FSDP2 takes that mean with the mean over
batches (its mesh holds both sides), as `reduce_gradients` does where nothing is wrapped: the loss
is never scaled by the size of the group.

B batch, N tokens, H heads, D head width; n ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from opensora.distributed.collectives import (
    broadcast_object,
    gather_into,
    named,
    reduce_scatter_into,
)
from opensora.distributed.mesh import World

T = TypeVar("T")


@dataclass(frozen=True)
class Sequence:
    """Name the ranks that share a batch.

    Attributes:
        group: the ranks.
        size: n.
        rank: this one, 0 to n - 1.
    """

    group: dist.ProcessGroup
    size: int
    rank: int

    @classmethod
    def of(cls, world: World) -> Sequence | None:
        """Return the world's ranks of one batch; None where this process has its batch alone."""
        group = world.sequence_group
        return None if group is None else cls(group, world.sp_size, world.sp_rank)

    def local(self, length: int) -> int:
        """Return how many of `length` places a rank holds, the padding counted."""
        return -(-length // self.size)

    def agree(self, value: T, what: str) -> T:
        """Return the first rank's value on all: what they must not each draw for themselves.

        Raises:
            CollectiveError: a rank did not arrive.
        """
        return broadcast_object(value, what, dist.get_global_rank(self.group, 0), self.group)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's part of a tensor that every rank has; no communication."""
        part = self.local(x.shape[dim])
        start = min(self.rank * part, x.shape[dim])
        held = x.narrow(dim, start, min(part, x.shape[dim] - start))
        return pad(held, dim, part)

    def gather(self, x: Tensor, dim: int, length: int, what: str = "tokens") -> Tensor:
        """Undo `split`: return all `length` places along `dim`, on every rank.

        Backward adds the ranks' gradients up and keeps this rank's part.

        Raises:
            CollectiveError: a rank did not arrive.
        """
        parts: Tensor = _Gather.apply(x, self, what)  # type: ignore[no-untyped-call]
        return parts.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length)

    def switch(
        self, x: Tensor, split_dim: int, join_dim: int, length: int, what: str = "tokens"
    ) -> Tensor:
        """Split along `split_dim` what was split along `join_dim`: one all-to-all.

        Args:
            x: every place of `split_dim`, this rank's part of `join_dim`.
            split_dim: this rank keeps its part of it, padded.
            join_dim: not negative; `length` places of it come back.
            length: places of `join_dim`, without padding.
            what: for the error message.

        Raises:
            CollectiveError: a rank did not arrive.
        """
        part = self.local(x.shape[split_dim])
        x = pad(x, split_dim, part * self.size)
        x = x.unflatten(split_dim, (self.size, part)).movedim(split_dim, 0)
        x = _Exchange.apply(x, self, what)  # type: ignore[no-untyped-call]
        # [n, ...], now by the rank that a part came from.
        return x.movedim(0, join_dim).flatten(join_dim, join_dim + 1).narrow(join_dim, 0, length)

    def heads(self, x: Tensor, length: int) -> Tensor:
        """Give this rank all tokens of its heads: [B, N / n, ..., H, D] to [B, N, ..., H / n, D].

        Heads that do not divide are padded with zeros, which attend to zeros (Ulysses).
        """
        return self.switch(x, x.ndim - 2, 1, length, "heads")

    def tokens(self, x: Tensor, heads: int) -> Tensor:
        """Undo `heads`: [B, N, ..., H / n, D] to [B, N / n, ..., H, D]."""
        return self.switch(x, 1, x.ndim - 2, heads, "heads")


def pad(x: Tensor, dim: int, length: int) -> Tensor:
    """Return x with zeros at the end of `dim`, `length` places in all; x itself if it has them."""
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    behind = x.ndim - 1 - dim % x.ndim
    return F.pad(x, (*(0, 0) * behind, 0, missing))


class _Exchange(torch.autograd.Function):
    """Send the i-th part of dimension 0 to rank i: its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: Sequence, what: str) -> Tensor:
        ctx.sequence, ctx.what = sequence, what
        return _exchange(x, sequence, what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grad, ctx.sequence, f"{ctx.what} (backward)"), None, None


def _exchange(x: Tensor, sequence: Sequence, what: str) -> Tensor:
    x = x.contiguous()
    result = torch.empty_like(x)
    with named("all_to_all", what, sequence.group):
        dist.all_to_all_single(result, x, group=sequence.group)
    return result


class _Gather(torch.autograd.Function):
    """Join the ranks' tensors along a new dimension 0; the transpose adds and scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: Sequence, what: str) -> Tensor:
        ctx.sequence, ctx.what = sequence, what
        x = x.contiguous()
        result = x.new_empty(sequence.size, *x.shape)
        with named("all_gather", what, sequence.group):
            gather_into(result.flatten(), x.flatten(), sequence.group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous()
        result = grad.new_empty(grad.shape[1:])
        with named("reduce_scatter", f"{ctx.what} (backward)", ctx.sequence.group):
            reduce_scatter_into(result.flatten(), grad.flatten(), group=ctx.sequence.group)
        return result, None, None
