"""Provide what tests and benches of ops share: oracles, implementations, tolerances, counts.

One property is written once, as a test over `implementations()`: the reference, the C++ kernels of
every instruction set this processor has, and Triton where CUDA is. Without CUDA the same test file
runs again in a process whose Triton kernels are interpreted (`run_interpreted`).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from opensora import _extension, trust
from opensora.ops import _library
from opensora.sanitizer import guard_memory, surround, watch_interpreter


@contextmanager
def _mode(mode: _library.Mode) -> Iterator[None]:
    before, _library.mode = _library.mode, mode
    try:
        yield
    finally:
        _library.mode = before


def reference() -> AbstractContextManager[None]:
    """Run every op on its PyTorch reference, in this process, while the context lasts."""
    return _mode("reference")


def require() -> AbstractContextManager[None]:
    """Raise, while the context lasts, where an op has no kernel for its tensors."""
    return _mode("require")


@dataclass(frozen=True)
class Implementation:
    """Name one way to run every op, and the device its tensors live on."""

    name: str
    device: str
    activate: Callable[[], AbstractContextManager[None]]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def implementations() -> list[Implementation]:
    """List what can run here; in a process with `TRITON_INTERPRET=1`, interpreted Triton alone."""
    if _library.INTERPRETED:
        return [Implementation("Triton interpreted", "cpu", _watched)]
    found = [Implementation("reference", "cpu", reference)]
    for name in _extension.INSTRUCTION_SETS:
        try:
            with _instruction_set(name):
                activate = partial(_instruction_set, name)
        except ValueError:
            continue  # this processor lacks it, or nothing is compiled
        found.append(Implementation(f"C++ {name}", "cpu", activate))
    if torch.cuda.is_available():
        found.append(Implementation("Triton", "cuda", _guarded))
    return found


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    before = _extension.instruction_set()
    _extension.use_instruction_set(name)
    try:
        with require():
            yield
    finally:
        if before is not None:
            _extension.use_instruction_set(before)


@contextmanager
def _guarded() -> Iterator[None]:
    with require(), trust.suspend(), guard_memory():  # a test is the check
        yield


@contextmanager
def _watched() -> Iterator[None]:
    with _guarded(), watch_interpreter():
        yield


@contextmanager
def dispatched(*ops: _library.Op) -> Iterator[None]:
    """Give ops a CPU kernel: their own launcher where Triton is interpreted, else the reference.

    Schemas, fakes and autograd of ops without a C++ kernel are tested so, through the dispatcher.
    """
    with torch.library._scoped_library("opensora", "IMPL") as library, ExitStack() as stack:
        for op in ops:
            library.impl(op.name, op.launcher if _library.INTERPRETED else op.reference, "CPU")
            stack.enter_context(mock.patch.dict(op._kernels, {"cpu": "a test's"}))
            stack.enter_context(mock.patch.dict(op.dtypes, {"cpu": op.dtypes["cuda"]}))
        stack.enter_context(require())
        yield


def run_interpreted(test_file: str, keyword: str) -> None:
    """Run the tests of a file that match `keyword` with Triton's interpreter, in a new process.

    Raises:
        AssertionError: A test failed or none ran; the message is pytest's output.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test_file]
    run = subprocess.run(
        [*command, "-k", keyword],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """Draw a normal tensor that depends on the seed alone, not on device or dtype.

    In memory NaN stands in front of it and behind it, for whoever reads past its ends.
    """
    if str(device) == "meta":
        return torch.empty(*shape, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return surround(drawn).copy_(drawn)


def alternate(batch: int, frames: int, device: str | torch.device = "cpu") -> Tensor:
    """Choose every other frame, bool [B, T]; both kinds in every sample that has two frames."""
    tokens = torch.arange(batch * (frames + 1), device=device)
    return (tokens.view(batch, frames + 1)[:, :frames] % 2 == 1).contiguous()


def double(values: Sequence[Any]) -> list[Any]:
    """Return an op's arguments with every floating-point tensor copied to float64."""
    return [
        v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for v in values
    ]


def assert_as_exact_as(working: Tensor, actual: Tensor, truth: Tensor) -> None:
    """Check `actual` against the truth, by the error that the reference makes itself.

    Args:
        working: The reference's result in the working dtype.
        actual: The kernel's result, in the same dtype.
        truth: The reference's result in float64. NaN must be NaN in `actual` too.

    Raises:
        AssertionError: An element is further from the truth than twice the largest error of
            `working` plus one rounding step of the dtype at that element.
    """
    assert actual.dtype == working.dtype
    assert actual.shape == truth.shape
    step = torch.finfo(actual.dtype).eps
    actual, working, truth = (t.detach().double().cpu() for t in (actual, working, truth))
    assert torch.equal(actual.isnan(), truth.isnan()), "NaN in other places than the truth"
    if truth.numel() == 0:
        return
    own = (working - truth).abs().nan_to_num(0.0).max()
    error = (actual - truth).abs().nan_to_num(0.0)
    allowed = 2 * own + step * truth.abs().nan_to_num(0.0)
    excess = (error - allowed).max().item()
    found = f"error {error.max():.3e}, the reference's own {own:.3e}, over by {excess:.3e}"
    assert excess <= 0, found


def interleave(
    functions: dict[str, Callable[[], object]], *, rounds: int = 7
) -> dict[str, list[float]]:
    """Time functions in turns, so that they share whatever else the machine does.

    Returns:
        Seconds of every round by name; element i of each list belongs to round i.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def median_ratios(times: dict[str, list[float]], to: str) -> dict[str, float]:
    """Return how many times as long as `to` each function took: the median of ratios per round."""
    return {
        name: statistics.median(a / b for a, b in zip(seconds, times[to], strict=True))
        for name, seconds in times.items()
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
