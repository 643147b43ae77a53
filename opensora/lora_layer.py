"""A linear with a low-rank update that trains beside its frozen weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opensora.linear import Linear
from opensora.lora_files import LoraUpdate


class LoraLinear(Linear):
    """Add a low-rank update to a linear: x W' + b + scaling * B(A(dropout(x))).

    It holds the parameters of the linear it replaces, which do not train.

    Args:
        base: the linear; its parameters are taken over, not copied.
        rank: of the update, >= 1.
        scaling: factor of the update, alpha / rank.
        dropout: chance that an input of A is zeroed in training.
        dtype: of A and B; None: the linear's. FSDP2 wants one type in a group of parameters.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        made = {"device": base.weight.device, "dtype": dtype or base.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **made)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **made)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.rank, self.scaling, self.dropout_rate = rank, scaling, dropout
        self.kept: Tensor | None = None  # the own weight while a merged one stands in for it
        self.train(base.training)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Begin anew: A uniform within 1 / sqrt(in), as PEFT has it, and B zero."""
        a = self.lora_A.weight
        if not a.is_meta:
            drawn = torch.rand(a.shape, generator=torch.Generator().manual_seed(seed))
            a.copy_((2 * drawn - 1) / self.in_features**0.5)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def merged(self) -> bool:
        """Tell whether `weight` holds the sum."""
        return self.kept is not None

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Return [..., out] for x [..., in], through GELU (tanh) where it is asked for."""
        if self.kept is not None:
            return super().forward(x, gelu)
        # The factor goes to the narrow tensor between A and B.
        low = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))) * self.scaling
        y = super().forward(x)
        y = y + self.lora_B(low).to(y.dtype)
        return F.gelu(y, approximate="tanh") if gelu else y

    def update(self) -> LoraUpdate:
        """Return the update as a file holds it; of a sharded model every rank must ask."""
        halves = [_whole(half.weight.detach()) for half in (self.lora_A, self.lora_B)]
        return LoraUpdate(halves[0], halves[1], self.scaling * self.rank, self.scaling)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
