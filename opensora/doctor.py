"""Check this installation: every kernel runs once against its reference, in a second or two.

opensora doctor        # exits with 1 if something that is installed does not work
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import opensora
from opensora import _extension, functional, testing
from opensora.ops import _library
from opensora.recipe import describe_device, describe_kernels
from opensora.testing import randn

#: Largest difference from the reference, of the largest value: the dtype's own rounding and more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Inputs = Callable[..., Tensor]


class Verdict(NamedTuple):
    """Hold how one op fared on one device.

    Attributes:
        kernel: What serves it: "C++", "oneDNN", "Triton", or None.
        problem: What is wrong, in words; None if nothing is.
        seconds: Of the check.
    """

    kernel: str | None
    problem: str | None
    seconds: float


def _layernorm_modulate(new: Inputs) -> Any:
    return functional.layernorm_modulate(new(2, 9, 72), new(2, 72), new(2, 72))


def _residual_layernorm_modulate(new: Inputs) -> Any:
    rows = [new(2, 72) for _ in range(3)]
    return functional.residual_layernorm_modulate(new(2, 9, 72), new(2, 9, 72), *rows)


def _gate_residual(new: Inputs) -> Any:
    return functional.gate_residual(new(2, 9, 72), new(2, 9, 72), new(2, 72))


def _qk_norm_rope(new: Inputs) -> Any:
    return functional.qk_norm_rope(new(2, 5, 3, 2, 72), new(72), new(72), _table(new))


def _spatial_attention(new: Inputs) -> Any:
    return functional.spatial_attention(new(1, 2, 19, 3, 2, 72), new(72), new(72))


def _temporal_attention(new: Inputs) -> Any:
    return functional.temporal_attention(new(1, 5, 3, 3, 2, 72), new(72), new(72), _table(new))


def _cross_attention(new: Inputs) -> Any:
    q, kv = new(2, 9, 2, 72), new(12, 2, 2, 72)
    starts, lengths = torch.tensor([[0, 5], [5, 7]], dtype=torch.int32, device=q.device).unbind(0)
    return functional.cross_attention(q, kv, starts, lengths, longest=7)


def _groupnorm_silu(new: Inputs) -> Any:
    return functional.groupnorm_silu(new(1, 64, 3, 5, 7), new(64), new(64), 32)


def _causal_conv3d(new: Inputs) -> Any:
    return functional.causal_conv3d(new(1, 16, 3, 5, 7), new(16, 16, 3, 3, 3), new(16))


def _patchify(new: Inputs) -> Any:
    return functional.patchify(
        new(1, 4, 3, 6, 10), new(48, 4, 1, 2, 2), new(48), new(15, 48).detach()
    )


def _cfg_rflow_step(new: Inputs) -> Any:
    z, velocity, dt = (t.detach() for t in (new(2, 4, 3, 5, 7), new(4, 8, 3, 5, 7), new(2)))
    mask = torch.tensor([[True, False, True], [True, True, False]], device=z.device)
    return functional.cfg_rflow_step(z, velocity, 7.0, dt, mask=mask, copies=2)


CHECKS: dict[str, Callable[[Inputs], Any]] = {
    function.__name__[1:]: function
    for function in (
        _layernorm_modulate,
        _residual_layernorm_modulate,
        _gate_residual,
        _qk_norm_rope,
        _spatial_attention,
        _temporal_attention,
        _cross_attention,
        _groupnorm_silu,
        _causal_conv3d,
        _patchify,
        _cfg_rflow_step,
    )
}


def _table(new: Inputs) -> tuple[Tensor, Tensor]:
    angles = new(5, 36).detach().repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def check(name: str, device: torch.device) -> Verdict:
    """Run one op on a device, forward and backward, and compare it with its reference."""
    ops = {op.name: op for op in _library.registry}
    forward = ops[f"{name}_forward"] if f"{name}_forward" in ops else ops[name]
    kernel = forward.kernel(device.type)
    if kernel is None:
        return Verdict(None, None, 0.0)
    started = time.perf_counter()
    problem = None
    try:
        for dtype in forward.dtypes.get(device.type, ()):
            if dtype in TOLERANCE and problem is None:
                problem = _difference(CHECKS[name], device, dtype)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        problem = f"{type(error).__name__}: {lines[0]}"
    return Verdict(kernel, problem, time.perf_counter() - started)


def _difference(
    run: Callable[[Inputs], Any], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Say how far a kernel is from its reference, if that is too far."""
    with testing.require():
        found = _results(run, device, dtype)
    with testing.reference():
        expected = _results(run, device, dtype)
    for one, other in zip(found, expected, strict=True):
        error = (one.float() - other.float()).abs().max().item()
        allowed = TOLERANCE[dtype] * other.float().abs().max().item()
        if not error <= allowed:
            return f"{dtype}: differs by {error:.1e}, allowed {allowed:.1e}"
    return None


def _results(
    run: Callable[[Inputs], Any], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return an op's results and, if it has any, the gradients of all its inputs."""
    made: list[Tensor] = []

    def new(*shape: int) -> Tensor:
        x = randn(*shape, seed=len(made)).to(device, dtype).requires_grad_()
        made.append(x)
        return x

    results = run(new)
    results = [results] if isinstance(results, Tensor) else list(results)
    if not any(y.requires_grad for y in results):
        return results
    gradients = torch.autograd.grad(sum(y.square().sum() for y in results), made, allow_unused=True)
    return [y.detach() for y in results] + [g for g in gradients if g is not None]


def advice() -> Iterator[str]:
    """Say what would make this installation faster."""
    if _extension.path is None:
        if shutil.which("c++") is None and shutil.which("g++") is None:
            yield "no C++ kernels: install a compiler (Debian: apt-get install g++), then"
        else:
            yield "no C++ kernels were built: run"
        yield "    OPENSORA_BUILD=require pip install --no-build-isolation --force-reinstall ."
    if torch.cuda.is_available() and find_spec("triton") is None:
        yield "no Triton kernels on the GPU: pip install triton"
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        yield f"torch {torch.__version__} sees no GPU, but nvidia-smi is here: install a CUDA torch"


def main() -> int:
    """Print versions and one line for each op and device; 1 if a kernel is wrong or fails."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    built = "none" if _extension.path is None else f"C++ for {_extension.instruction_set()}"
    versions = f"torch {torch.__version__}  python {platform.python_version()}"
    print(f"opensora {opensora.__version__}  {versions}  {platform.system()}")
    print(f"compiled kernels: {built}")
    failed = 0
    for device in devices:
        print(f"\n{device}  ({describe_device(device)})")
        for name in describe_kernels(device):
            if name not in CHECKS:
                continue
            verdict = check(name, device)
            failed += verdict.problem is not None
            state = "no kernel here, the PyTorch reference serves"
            if verdict.kernel is not None:
                state = f"{verdict.kernel:<8} "
                state += verdict.problem or f"agrees ({verdict.seconds * 1e3:.0f} ms)"
                state = state if verdict.problem is None else f"WRONG  {state}"
            print(f"  {name:<30}{state}")
    for line in advice():
        print(line)
    if failed:
        print(f"\n{failed} kernels do not work here. OPENSORA_KERNELS=reference runs without them.")
    return 1 if failed else 0
