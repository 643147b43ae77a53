"""One block of STDiT3: self-attention over space or time, cross-attention to the text, an MLP.

B batch, T frames, S patches per frame, N = T * S tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.functional import gate_residual, layernorm_modulate, residual_layernorm_modulate
from opensora.nn import EPS, Attention, Mlp, MultiHeadCrossAttention, PackedText

_ATTENTION, _MLP = 0, 3  # first row of each branch: shift, scale, gate


class Modulation(NamedTuple):
    """Hold the adaLN vectors of one block.

    Attributes:
        rows: [B, 6, C]: shift, scale and gate of the self-attention, then of the MLP.
        select: bool [B, T]; False frames take `rows0`. None: no frame does.
        rows0: like `rows`, from timestep zero; comes with `select`.
    """

    rows: Tensor
    select: Tensor | None = None
    rows0: Tensor | None = None

    def plus(self, table: Tensor) -> Modulation:
        """Return the modulation with a table [6, C] added to its rows."""
        rows0 = None if self.rows0 is None else self.rows0 + table
        return Modulation(self.rows + table, self.select, rows0)

    def norm(self, first: int) -> dict[str, Any]:
        """Return shift and scale as the ops take them."""
        return self._named(shift=first, scale=first + 1)

    def gate(self, first: int) -> dict[str, Any]:
        """Return the gate as the ops take it."""
        return self._named(gate=first + 2)

    def _named(self, **places: int) -> dict[str, Any]:
        named: dict[str, Any] = {"select": self.select}
        for name, place in places.items():
            named[name] = self.rows.select(1, place)
            named[f"{name}0"] = None if self.rows0 is None else self.rows0.select(1, place)
        return named


class STDiT3Block(nn.Module):
    """Update tokens by three residual branches, two of them modulated and gated by the timestep.

        (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = scale_shift_table + t
        x = x + gate_a * attn(LN(x) * (1 + scale_a) + shift_a)
        x = x + cross_attn(x, y)
        x = x + gate_m * mlp(LN(x) * (1 + scale_m) + shift_m)

    A sum and the norm that follows it are one pass over the tokens, also from block to block: a
    block that is told what follows returns the next one's norm beside its tokens. The forward
    takes tensors and plain numbers and reads no tensor on the host, so `block.compile()` gives one
    graph.

    `recompute = True` computes the block again in the backward pass instead of keeping what is
    inside it, except what `recompute_context` keeps (see `torch.utils.checkpoint`); it then takes
    and makes no norm of its neighbours. `adds_table = True` makes it add its own table to the
    modulation, which then comes without: for parameters that are only gathered inside the block.

    Args:
        hidden_size: C.
        num_heads: H.
        mlp_ratio: hidden width of the MLP over C.
        temporal: attend each patch over the frames (rotary positions) instead of each frame over
            its patches.
        qk_norm: RMSNorm queries and keys of the self-attention.
        drop_path: chance to skip a gated branch for a sample, in training.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        temporal: bool = False,
        qk_norm: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.temporal, self.drop_path = temporal, drop_path
        self.recompute, self.adds_table = False, False
        self.recompute_context: Callable[[], Any] | None = None
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.cross_attn = MultiHeadCrossAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def modulation(
        self, t: Tensor, select: Tensor | None = None, t0: Tensor | None = None
    ) -> Modulation:
        """Return `scale_shift_table + t` for t [B, 6 * C]; t0 and `select` as in `Modulation`."""
        table = self.scale_shift_table
        rows0 = None if t0 is None else table + t0.unflatten(1, table.shape)
        return Modulation(table + t.unflatten(1, table.shape), select, rows0)

    def forward(
        self,
        x: Tensor,
        text: PackedText,
        modulation: Modulation,
        frames: int,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        normed: Tensor | None = None,
        following: Modulation | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens [B, N, C], and with `following` their norm for the next block.

        Args:
            x: tokens [B, N, C], frames slowest.
            text: the text of all samples.
            modulation: what `modulation` returns.
            frames: T.
            rotary: cos and sin [T, D] of the frames' positions, for a temporal block.
            normed: x normalised and modulated for the self-attention, if it is known already.
            following: the modulation of the next block.
        """
        if not self.recompute or not torch.is_grad_enabled():
            return self._update(x, text, modulation, frames, rotary, normed, following)
        call = partial(checkpoint, self._update, use_reentrant=False)
        if self.recompute_context is not None:  # Dynamo wants a constant, or nothing
            call = partial(call, context_fn=self.recompute_context)
        result: tuple[Tensor, None] = call(x, text, modulation, frames, rotary)
        return result

    def _update(
        self,
        x: Tensor,
        text: PackedText,
        modulation: Modulation,
        frames: int,
        rotary: tuple[Tensor, Tensor] | None,
        normed: Tensor | None = None,
        following: Modulation | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.adds_table:
            modulation = modulation.plus(self.scale_shift_table)
        if normed is None:
            normed = layernorm_modulate(x, **modulation.norm(_ATTENTION), eps=EPS)
        by_frame = normed.unflatten(1, (frames, -1))
        branch = self.attn(by_frame, rotary, temporal=self.temporal).flatten(1, 2)
        x = gate_residual(x, self._dropped(branch), **modulation.gate(_ATTENTION))
        x, normed = residual_layernorm_modulate(
            x, self.cross_attn(x, text), None, **modulation.norm(_MLP), eps=EPS
        )
        branch = self._dropped(self.mlp(normed))
        if following is None:
            return gate_residual(x, branch, **modulation.gate(_MLP)), None
        return residual_layernorm_modulate(
            x, branch, **modulation.gate(_MLP) | following.norm(_ATTENTION), eps=EPS
        )

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * kept.to(branch.dtype) / (1 - self.drop_path)
