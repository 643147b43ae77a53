"""Decide whether a GPU kernel may serve: unverified is not trusted.

A kernel is trusted if this version of it, on this architecture and in this dtype, passed

* every case of its bench: a record (`opensora/verified.py`), or
* the check of `opensora/self_check.py` on an earlier day: an entry in the user's cache, or
* that check now: milliseconds, and what its compiler takes the first time.

Forward, backward and variants of an op are judged together; kernels in C++ (`csrc/cuda`) apart from
Triton's, as the family "<op>.native". A kernel that fails is reported by a
warning and not used: the op's PyTorch reference takes its place in the dispatcher, and so in eager
code, in autograd and in compiled graphs alike. The cache keeps failures too: they outweigh a
record, and the next process checks again. Only a kernel that broke the GPU's context is not tried
twice (`opensora doctor` does).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from opensora import verified
from opensora.errors import KernelWarning, OpenSoraError
from opensora.verified import Verdict

_verdicts: dict[tuple[str, str, torch.dtype], Verdict] = {}
_lock = threading.RLock()
_thread = threading.local()
_suspended = 0


def judge(
    family: str, version: Callable[[], str], device: torch.device, dtype: torch.dtype
) -> Verdict:
    """Return whether a kernel may serve; the first call checks it if nothing vouches for it.

    While a CUDA graph is captured nothing can be checked. A kernel that nothing vouches for is not
    trusted then: the reference is captured, a warning says so, and the next call asks again.

    Raises:
        OpenSoraError: The check broke the GPU's context; this process cannot go on with it.
        torch.OutOfMemoryError: The device has no room for the check.
    """
    key = (family, verified.architecture(device), dtype)
    with _lock:
        if key in _verdicts:
            return _verdicts[key]
        kernel = verified.describe(family, version, device, dtype)
        verdict = verified.vouch(kernel)
        if verdict is None and _is_capturing(device):
            verdict = Verdict(
                "",
                "nothing vouches for it, and it cannot be checked while a CUDA graph is captured: "
                "call the op once before the capture",
            )
        if verdict is None:
            verdict = Verdict("this run", check(family, device, dtype))
            lost = verdict.problem is not None and is_lost(device)
            verified.remember(kernel, verdict.problem, is_fatal=lost)
            if lost:
                raise OpenSoraError(
                    f"the GPU kernel of {family} broke the GPU's context on "
                    f"{kernel.architecture} ({kernel.dtype}: {verdict.problem}). Start again: the "
                    "PyTorch reference will serve this op. Please report it with what `opensora "
                    "doctor` prints"
                )
        if verdict.is_final:
            _verdicts[key] = verdict
    if verdict.problem is not None:
        native = family.endswith(".native")
        instead = "Triton's kernel serves" if native else "The PyTorch reference serves"
        warnings.warn(
            f"the GPU kernel of {family} is not used for {kernel.dtype} on {kernel.architecture}: "
            f"{verdict.problem}. {instead} instead, correct but slower. Please "
            "report it with what `opensora doctor` prints; OPENSORA_KERNELS=reference runs "
            "without kernels, and OPENSORA_KERNELS=require makes this an error.",
            KernelWarning,
            stacklevel=4,
        )
    return verdict


def failures(device: torch.device) -> set[str]:
    """Return the families that references have replaced on a device in this process."""
    if device.type != "cuda":
        return set()
    here = verified.architecture(device)
    return {f for (f, a, _), verdict in [*_verdicts.items()] if a == here and verdict.problem}


def check(family: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what is wrong with an op's kernels, None if nothing is.

    The check runs in a thread of its own, so that the caller's autograd mode, autocast, hooks of
    saved tensors, device and stream neither reach it nor change. In that thread guards let kernels
    through (`is_checking`), and a backward pass stays in it.
    """
    from opensora import self_check

    def work() -> str | None:
        _thread.checking = family
        with torch.autograd.set_multithreading_enabled(False):
            return self_check.find_problem(family.removesuffix(".native"), device, dtype)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="opensora-check") as pool:
        return pool.submit(work).result()


def is_checking() -> bool:
    """Tell whether this thread runs a check."""
    return checked() != ""


def checked() -> str:
    """Return the family that this thread checks; "" outside of a check."""
    family: str = getattr(_thread, "checking", "")
    return family


@contextmanager
def suspend() -> Iterator[None]:
    """Let every kernel serve unchecked, in this process, while the context lasts."""
    global _suspended
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1


def is_suspended() -> bool:
    """Tell whether kernels may serve unasked: in a check, or where `suspend` lasts."""
    return _suspended > 0 or is_checking()


def is_lost(device: torch.device) -> bool:
    """Tell whether a GPU's context is broken, as by an illegal access: nothing more can run."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
