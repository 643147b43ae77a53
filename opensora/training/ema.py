"""Average weights exponentially, in float32, on the shards that a process holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

#: Names that Open-Sora never averages.
SKIPPED = "pos_embed"


class EMA:
    """Keep float32 exponential moving averages of weights.

        average = average + (1 - decay) * (value - average)

    A tensor that goes by two names (T5's embedding) is held once: swapping it twice would not give
    it back. A sharded parameter (DTensor) has an average that is sharded alike, so no process holds
    more than its part, and updates need no communication.

    Args:
        modules: name -> module; averages are named "name.key". One module alone: just "key".
        decay: between 0 and 1.
        warm_up: after n updates the decay is min(decay, (1 + n) / (10 + n)).
        trained_only: average as Open-Sora does: only parameters that require gradients and have no
            "pos_embed" in their name, no buffers. Otherwise all parameters and float buffers that
            are saved.

    Attributes:
        state: name -> average, float32, DTensor where the parameter is.
        updates: how many there were.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module] | nn.Module,
        decay: float,
        *,
        warm_up: bool = True,
        trained_only: bool = False,
    ) -> None:
        self.modules = {"": modules} if isinstance(modules, nn.Module) else dict(modules)
        self.decay, self.warm_up, self.trained_only = decay, warm_up, trained_only
        self.updates, self.swapped = 0, False
        self._held: dict[str, Tensor] = {}
        self.state = {key: value.float().clone() for key, value in self._values()}

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is averaged, detached, each tensor once under its first name."""
        seen = set()
        for name, module in self.modules.items():
            # Through state_dict: it makes FSDP put the shards back, and drops wrappers' names.
            for key, value in module.state_dict(keep_vars=True).items():
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                if self.trained_only and (not value.requires_grad or SKIPPED in key):
                    continue
                if id(value) not in seen:
                    seen.add(id(value))
                    yield f"{name}.{key}" if name else key, value.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present values.

        Raises:
            RuntimeError: The modules hold the averages at present.
        """
        if self.swapped:
            raise RuntimeError("EMA.update was called between a swap and its end")
        self.updates += 1
        decay = self.decay
        if self.warm_up:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        averages, values = [], []
        for key, value in self._values():
            averages.append(_local(self.state[key]))
            values.append(_local(value).to(averages[-1]))
        torch._foreach_lerp_(averages, values, 1 - decay)

    def swap(self) -> _Swapped:
        """Exchange the averages with the modules' values, at once; a second call changes back.

        `with ema.swap(): ...` changes back at the end of the block, whatever happens in it.
        Weights and averages come back bit for bit, in any dtype.
        """
        self._exchange()
        return _Swapped(self)

    @torch.no_grad()
    def _exchange(self) -> None:
        for key, value in self._values():
            average, now = _local(self.state[key]), _local(value)
            if now.dtype == average.dtype:
                held = now.clone()
                now.copy_(average)
                average.copy_(held)
            elif self.swapped:  # an average that went through bfloat16 would come back rounded
                now.copy_(self._held.pop(key))
            else:
                self._held[key] = now.clone()
                now.copy_(average)
        self.swapped = not self.swapped

    def state_dict(self) -> dict[str, Any]:
        """Return {"updates": number, "averages": name -> tensor}; the tensors are not copied.

        Raises:
            RuntimeError: The modules hold the averages at present.
        """
        if self.swapped:
            raise RuntimeError("EMA.state_dict was called between a swap and its end")
        return {"updates": self.updates, "averages": dict(self.state)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state back; whole tensors are cut into the shards that this process holds.

        Raises:
            ValueError: Names are missing or unknown, or a shape differs.
        """
        averages: Mapping[str, Tensor] = state["averages"]
        different = sorted(set(averages) ^ set(self.state))
        if different:
            raise ValueError(
                f"averages of other weights: {len(different)} names differ, first {different[0]!r}"
            )
        for key, own in self.state.items():
            given = averages[key]
            if given.shape != own.shape:
                raise ValueError(
                    f"average {key!r}: expected {list(own.shape)}, got {list(given.shape)}"
                )
            if isinstance(own, DTensor) and not isinstance(given, DTensor):
                given = distribute_tensor(
                    given.to(own.device), own.device_mesh, own.placements, src_data_rank=None
                )
            own.copy_(given)
        self.updates = int(state["updates"])


class _Swapped:
    """Change an EMA back at the end of a `with` block."""

    def __init__(self, ema: EMA) -> None:
        self._ema = ema

    def __enter__(self) -> EMA:
        return self._ema

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ema._exchange()


def _local(value: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value
