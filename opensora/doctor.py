"""Check this installation: every kernel runs once against its reference, in a second or two.

opensora doctor        # exits with 1 if something that is installed does not work

On a GPU it also says what vouches for a kernel in other runs (a record of this release, an earlier
check in the user's cache, or this run, which writes there), and how to get more kernels.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch

import opensora
from opensora import _extension, testing, trust, verified
from opensora.ops import _library
from opensora.recipe import describe_device
from opensora.self_check import CHECKS, TOLERANCE

REBUILD = "OPENSORA_BUILD=require pip install --no-build-isolation --force-reinstall ."


LOADED = "loaded; OPENSORA_CUDA=c++ lets them serve"

#: How the family of an op's kernels in `csrc/cuda` ends.
NATIVE = ".native"


class Finding(NamedTuple):
    """Hold how one op fared on one device.

    Attributes:
        kernel: What serves it: "C++", "oneDNN", "Triton", or None.
        problem: What is wrong, in words; None if nothing is.
        seconds: Of the check.
        vouched: On a GPU, what vouches for it, in words.
    """

    kernel: str | None
    problem: str | None
    seconds: float
    vouched: str


def check(name: str, device: torch.device) -> Finding:
    """Run one op on a device, forward and backward, and compare it with its reference."""
    op = next(op for op in _library.registry if op.family == name.removesuffix(NATIVE))
    kernel, version = op.kernel(device.type), op.version
    if name.endswith(NATIVE):
        kernel, version = "C++", _extension.cuda_version
    if kernel is None:
        return Finding(None, None, 0.0, "")
    started = time.perf_counter()
    sources: dict[str, list[str]] = {}
    for dtype in op.dtypes.get(device.type, ()):
        if dtype not in TOLERANCE:
            continue
        problem = trust.check(name, device, dtype)
        if device.type == "cuda":
            by = _remember(verified.describe(name, version, device, dtype), problem, device)
            sources.setdefault(by, []).append(str(dtype).removeprefix("torch."))
        if problem is not None:
            said = f"{str(dtype).removeprefix('torch.')}: {problem}"
            return Finding(kernel, said, time.perf_counter() - started, "")
    vouched = "; ".join(f"{', '.join(dtypes)} by {by}" for by, dtypes in sources.items())
    return Finding(kernel, None, time.perf_counter() - started, vouched)


def _remember(kernel: verified.Kernel, problem: str | None, device: torch.device) -> str:
    """Keep what was found of a GPU kernel, and say what vouches for it if it works."""
    earlier = verified.vouch(kernel)
    verified.remember(kernel, problem, is_fatal=problem is not None and trust.is_lost(device))
    return "this run" if earlier is None or earlier.problem is not None else earlier.by


def advice() -> Iterator[str]:
    """Say what would make this installation faster."""
    if _extension.path is None:
        if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
            yield "no C++ kernels: install a compiler (Debian: apt-get install g++), then run, in a"
            yield "checkout of opensora"
        else:
            yield "no C++ kernels: run, in a checkout of opensora"
        yield f"    {REBUILD}"
    if torch.cuda.is_available() and find_spec("triton") is None:
        yield "no Triton kernels on the GPU: pip install triton"
    elif torch.cuda.is_available() and not (
        os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))
    ):
        yield "Triton needs a C compiler when it runs: install one (Debian: apt-get install gcc)"
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        yield f"torch {torch.__version__} sees no GPU, but nvidia-smi is here: install a CUDA torch"


def main() -> int:
    """Print versions and one line for each op and device; 1 if something claimed does not work."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    built, works = _extension.describe()
    versions = f"torch {torch.__version__}  python {platform.python_version()}"
    print(f"opensora {opensora.__version__}  {versions}  {platform.system()}")
    print(f"compiled kernels: {built}")
    cuda = f"none: {_extension.why_no_cuda()}" if _extension.cuda_path is None else LOADED
    if _extension.cuda_is_broken():
        cuda, works = f"WRONG  {_extension.why_no_cuda()}", False
    print(f"CUDA kernels in C++: {cuda}")
    failed = sum(_examine(device) for device in devices)
    for line in advice():
        print(line)
    if failed:
        print(f"\n{failed} kernels do not work here. OPENSORA_KERNELS=reference runs without them.")
    return 1 if failed or not works else 0


def _examine(device: torch.device) -> int:
    """Print a line for each op on a device, and return how many are wrong."""
    architecture = f", {verified.architecture(device)}" if device.type == "cuda" else ""
    print(f"\n{device}  ({describe_device(device)}{architecture})")
    failed = 0
    names = [*CHECKS]
    if device.type == "cuda" and _extension.cuda_path is not None:
        names += {op.family + NATIVE for op in _library.registry if op.has_native}
    for name in sorted(names):
        with testing.require():
            finding = check(name, device)
        state = "no kernel here, the PyTorch reference serves"
        if finding.kernel is not None:
            state = f"{finding.kernel:<8} agrees ({finding.seconds * 1e3:.0f} ms)"
            state += f"  {finding.vouched}" if finding.vouched else ""
        if finding.problem is not None:
            failed += 1
            state = f"WRONG  {finding.kernel:<8} {finding.problem}"
        print(f"  {name:<30}{state}")
        if finding.problem is not None and trust.is_lost(device):
            print("  the GPU can no longer be used by this process: run this again for the rest")
            break
    return failed
