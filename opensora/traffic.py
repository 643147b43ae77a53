"""Count what a module launches and moves on a GPU that need not be here.

`trace` runs a function on meta tensors: shapes are real, nothing is computed. Ops go to their
Triton launchers, which are noted instead of run; everything else is noted as torch dispatches it.
Views and allocations launch nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opensora.launches import record
from opensora.ops import _library

_MATRIX = ("mm", "addmm", "bmm", "baddbmm", "convolution")
_FREE = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "detach")


@dataclass(frozen=True)
class Step:
    """Note one thing that a GPU would do.

    Attributes:
        name: The op: "spatial_attention_forward", "aten.addmm".
        launches: Kernels that it launches; 1 for torch's own.
        read: Bytes of its tensor arguments.
        written: Bytes of its results.
    """

    name: str
    launches: int
    read: int
    written: int

    @property
    def is_product(self) -> bool:
        """Tell a matrix product or a convolution of torch from everything else."""
        return self.name.removeprefix("aten.") in _MATRIX


class _Notes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.paused or func.is_view or name in _FREE or name.startswith(("sym_", "_local")):
            return result
        if name in ("_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size"):
            return result
        self.note(f"aten.{name}", 1, (args, kwargs), result)
        return result

    def note(self, name: str, launches: int, arguments: Any, result: Any) -> None:
        self.steps.append(Step(name, launches, _bytes(arguments), _bytes(result)))


def trace(function: Callable[[], object]) -> list[Step]:
    """Run a function of meta tensors and return, in order, what a GPU would launch."""
    notes = _Notes()
    with _triton_on_meta(notes), notes:
        function()
    return notes.steps


@contextmanager
def _triton_on_meta(notes: _Notes) -> Iterator[None]:
    """Send meta tensors to the Triton launchers, which are counted and not run."""
    with ExitStack() as stack:
        for op in _library.registry:
            if op.launcher is not None:
                stack.enter_context(mock.patch.object(op, "_call", _counted(op, notes)))
                stack.enter_context(mock.patch.dict(op._kernels, {"meta": "Triton"}))
                stack.enter_context(mock.patch.dict(op.dtypes, {"meta": op.dtypes["cuda"]}))
        yield


def _counted(op: _library.Op, notes: _Notes) -> Callable[..., Any]:
    launcher = op.launcher
    assert launcher is not None

    def call(*args: Any) -> Any:
        results: list[Any] = []
        before, notes.paused = notes.paused, True
        try:
            launches = record(lambda: results.append(launcher(*args)))
        finally:
            notes.paused = before
        notes.note(op.name, len(launches), args, results[0])
        return results[0]

    return call


def _bytes(value: Any) -> int:
    """Sum the bytes of the tensors of an argument list or a result; the same one counts once."""
    seen: dict[Any, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            key = (item.untyped_storage()._cdata, item.storage_offset(), tuple(item.shape))
            distinct = [n for n, s in zip(item.shape, item.stride(), strict=True) if s != 0]
            seen[key] = torch.Size(distinct).numel() * item.element_size()
        elif isinstance(item, (tuple, list)):
            for part in item:
                visit(part)
        elif isinstance(item, dict):
            visit(list(item.values()))

    visit(value)
    return sum(seen.values())
