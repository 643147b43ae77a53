"""Average weights exponentially."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Keep float32 exponential moving averages of all parameters and float buffers.

    The decay warms up: after n updates it is min(decay, (1 + n) / (10 + n)). A tensor that goes by
    two names (T5's embedding) is held once: swapping it twice would not give it back.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules, self.decay, self.updates = modules, decay, 0
        self.state = {key: value.detach().float().clone() for key, value in self._values()}

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        seen = set()
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                if value.is_floating_point() and value.data_ptr() not in seen:
                    seen.add(value.data_ptr())
                    yield f"{name}.{key}", value

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present values."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in self._values():
            self.state[key].lerp_(value.float(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the modules' values; a second call changes back."""
        for key, value in self._values():
            held = value.float().clone()
            value.copy_(self.state[key])
            self.state[key].copy_(held)
