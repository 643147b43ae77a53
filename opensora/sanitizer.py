"""Watch the memory of kernels under test: what is allocated, and what interpreted Triton accesses.

The interpreter runs programs one after the other, so a wrong mask or a missing barrier often leaves
right values: what one program spoils the next one overwrites. Here such an access is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Elements in front of and behind a guarded tensor; a multiple of what any load is wide.
MARGIN = 64

_Addresses = NDArray[np.int64]


@contextmanager
def guard_memory() -> Iterator[None]:
    """Poison what is allocated while the context lasts, and check that nobody writes past its ends.

    Every byte of a new tensor, and of `MARGIN` elements before and behind it, is 0xFF: NaN in every
    floating dtype, though not the NaN that arithmetic makes.

    Raises:
        AssertionError: At the end of the context; a margin was written to.
    """
    guarded: list[Tensor] = []

    def guard(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_guarded(*args: Any, **kwargs: Any) -> Tensor:
            t = allocate(*args, **kwargs)
            if type(t) is not Tensor or t.device.type == "meta" or t.numel() == 0:
                return t
            surrounded = surround(t)
            guarded.append(surrounded)
            return surrounded

        return allocate_guarded

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, guard(getattr(owner, name))))
        yield
    for t in guarded:
        assert not _is_spoilt(t), f"{t.dtype} {list(t.shape)} was written to past its ends"


def surround(t: Tensor) -> Tensor:
    """Return a poisoned tensor of t's shape, strides, dtype and device between poisoned margins."""
    size = (t.numel() + 2 * MARGIN) * t.element_size()
    storage = torch.full((size,), 0xFF, dtype=torch.uint8, device=t.device)
    return storage.view(t.dtype).as_strided(t.shape, t.stride(), MARGIN)


def _is_spoilt(t: Tensor) -> bool:
    """Tell whether a margin made by `surround` is no longer poisoned."""
    storage = torch.tensor([], dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
    margin = MARGIN * t.element_size()
    return bool((torch.cat((storage[:margin], storage[-margin:])) != 0xFF).any())


class _Launch:
    """Follow the accesses of one launch."""

    def __init__(self, tensors: list[Tensor]) -> None:
        spans = sorted(_span(t) for t in tensors if t.numel() > 0)
        self.starts = np.array([start for start, _ in spans], dtype=np.int64)
        # Tensors may be views of one another: an address is inside if any earlier span reaches it.
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], dtype=np.int64))
        self.program = -1
        self.loads: list[tuple[int, _Addresses]] = []
        self.stores: list[tuple[int, _Addresses]] = []
        self.since_barrier: list[tuple[bool, _Addresses, _Addresses]] = []

    def next_program(self) -> None:
        self.program += 1
        self.since_barrier = []

    def access(self, pointers: Any, mask: Any, itemsize: int, is_store: bool) -> None:
        """Note the addresses that a load or store touches.

        Raises:
            AssertionError: One lies in no tensor, or another thread of the same program may not
                be done with it.
        """
        every = pointers.astype(np.int64)
        touched = every[mask.astype(bool)]
        if touched.size == 0:
            return
        what = "store" if is_store else "load"
        place = np.searchsorted(self.starts, touched, side="right") - 1
        inside = (place >= 0) & (touched + itemsize <= self.ends[np.maximum(place, 0)])
        assert inside.all(), f"a {what} reaches outside of every tensor of the launch"
        for was_store, pattern, earlier in self.since_barrier:
            # What is stored in place was loaded by the same thread, if lane by lane it is the same.
            in_place = is_store and np.array_equal(pattern, every)
            if (is_store or was_store) and not in_place:
                assert not np.isin(touched, earlier).any(), (
                    f"a {what} needs a barrier after an earlier {'store' if was_store else 'load'}"
                )
        self.since_barrier.append((is_store, every, touched))
        (self.stores if is_store else self.loads).append((self.program, np.unique(touched)))

    def finish(self) -> None:
        """Compare the programs.

        Raises:
            AssertionError: Two programs store to one address, or one loads what another stores.
        """
        stored, writers = _flatten(self.stores)
        order = np.lexsort((writers, stored))
        stored, writers = stored[order], writers[order]
        again = (stored[1:] == stored[:-1]) & (writers[1:] != writers[:-1])
        assert not again.any(), "two programs of a launch store to the same address"
        if stored.size == 0:
            return
        loaded, readers = _flatten(self.loads)
        place = np.minimum(np.searchsorted(stored, loaded), stored.size - 1)
        foreign = (stored[place] == loaded) & (writers[place] != readers)
        assert not foreign.any(), "a program loads what another program of its launch stores"


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _flatten(accesses: list[tuple[int, _Addresses]]) -> tuple[_Addresses, _Addresses]:
    """Return the addresses, and the program of each."""
    none = np.empty(0, dtype=np.int64)
    addresses = np.concatenate([none, *[touched for _, touched in accesses]])
    programs = np.concatenate([none, *[np.full(len(a), p, dtype=np.int64) for p, a in accesses]])
    return addresses, programs


@contextmanager
def watch_interpreter() -> Iterator[None]:
    """Check every access of the Triton kernels that are interpreted while the context lasts.

    The launch raises where an access lies outside of the tensors that were passed, where a program
    stores what another one loads or stores, and where a program loads what it stored, or stores
    what it loaded or stored, with no `tl.debug_barrier()` in between: another thread may not be
    done. Only a store to exactly the addresses of an earlier access, lane by lane, needs none.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launches: list[_Launch] = []

    def around(owner: Any, name: str, before: Callable[..., None]) -> Any:
        original = getattr(owner, name)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            before(*args)
            return original(self, *args, **kwargs)

        return mock.patch.object(owner, name, watched)

    copy_arguments, run = executor._init_args_hst, executor.__call__

    def note_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        copies, named = copy_arguments(self, args, kwargs)
        tensors = [t for t in (*copies, *named.values()) if isinstance(t, Tensor)]
        launches.append(_Launch(tensors))
        return copies, named

    def run_and_compare(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        launches.pop().finish()
        return result

    def load(pointers: Any, mask: Any, *_: Any) -> None:
        itemsize = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        launches[-1].access(pointers.data, mask.data, itemsize, False)

    def store(pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        launches[-1].access(pointers.data, mask.data, value.data.itemsize, True)

    with ExitStack() as stack:
        for patch in (
            mock.patch.object(executor, "_init_args_hst", note_arguments),
            mock.patch.object(executor, "__call__", run_and_compare),
            around(builder, "set_grid_idx", lambda *_: launches[-1].next_program()),
            around(builder, "create_barrier", lambda *_: launches[-1].since_barrier.clear()),
            around(builder, "create_masked_load", load),
            around(builder, "create_masked_store", store),
        ):
            stack.enter_context(patch)
        yield
