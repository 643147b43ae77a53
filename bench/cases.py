"""Describe what an op's bench measures, and measure it: on a GPU by graph replay, else by turns.

Every `bench/ops/bench_<op>.py` lists `CASES`. One case gives random inputs, the op, its reference
and its peers as functions of the same arguments. Variants are timed in turns in one process and
compared by the median of their ratios; shares of copy or matrix speed are against a copy and an
8192^3 bfloat16 product of the same run. Inputs are normal noise: zeros run faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opensora import testing

Arguments = tuple[Any, ...]
#: Inputs rotate through this many bytes, so that no call finds its data in the cache (H100: 50 MB).
ROTATION = 256 * 2**20
REPEATS = 200


@dataclass(frozen=True)
class Case:
    """Name one measurement of an op.

    Attributes:
        arguments: (dtype, device, seed) -> the arguments of all the functions below.
        run: The op, through its public function.
        reference: The same in plain PyTorch; timed eager and compiled, and the oracle in float64.
        moved: Bytes that any implementation must read and write, given the size of an element; for
            the share of copy speed. None: not bound by memory.
        flops: Useful floating-point operations; for the share of matrix speed.
        peers: Other implementations by name; one that raises is reported as missing.
        check: Smaller arguments for the comparison with float64, if the full ones would not fit.
        dtypes: Measured with each of these.
    """

    arguments: Callable[[torch.dtype, str, int], Arguments]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    moved: Callable[[int], int] | None = None
    flops: int | None = None
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    check: Callable[[torch.dtype, str, int], Arguments] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)

    def size(self, dtype: torch.dtype) -> int:
        """Return the bytes of the arguments."""
        arguments = tensors(self.arguments(dtype, "meta", 0))
        return sum(t.numel() * t.element_size() for t in arguments)


@dataclass(frozen=True)
class Result:
    """Hold the times of one case.

    Attributes:
        seconds: Median of the op.
        ratios: Variant -> how many times as long as the op it took; missing ones are absent.
        missing: Variant -> why it could not run.
        share: Of a same-run copy's bandwidth, or of a same-run product's speed; None without one.
    """

    seconds: float
    ratios: dict[str, float]
    missing: dict[str, str]
    share: float | None


def tensors(value: Any) -> list[Tensor]:
    """List the tensors of an argument tuple or a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return []


def verify(case: Case, dtype: torch.dtype, device: str) -> None:
    """Compare with float64, then repeat on poisoned memory and compare bit for bit.

    Raises:
        AssertionError: A value is too far off, or a repeat differs: a race or a read of memory that
            nobody wrote.
    """
    make = case.check or case.arguments
    arguments = make(dtype, device, 0)
    first = [t.clone() for t in tensors(case.run(*arguments))]
    working = tensors(case.reference(*arguments))
    truth = tensors(case.reference(*testing.double(arguments)))
    for actual, own, true in zip(first, working, truth, strict=True):
        testing.assert_as_exact_as(own, actual, true)
    del working, truth
    for repeat in range(REPEATS if device == "cuda" else 2):
        poison(first)
        again = tensors(case.run(*arguments))
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other), f"repeat {repeat} differs from the first run"


def poison(like: Sequence[Tensor]) -> None:
    """Leave NaN in freed memory of the sizes that the next call will allocate."""
    for t in like:
        if t.is_floating_point():
            torch.full_like(t, torch.nan)


def measure(case: Case, dtype: torch.dtype, device: str, rounds: int = 9) -> Result:
    """Time the op beside its reference and its peers, in turns."""
    sets = max(1, min(16, -(-ROTATION // max(case.size(dtype), 1)))) if device == "cuda" else 1
    inputs = [case.arguments(dtype, device, seed) for seed in range(sets)]
    if device == "cuda":  # a replay of at least 32 calls: one launch from the host does not count
        inputs *= -(-32 // sets)
    variants = {"op": case.run, "eager": case.reference, **case.peers}
    if device == "cuda":
        variants["compiled"] = torch.compile(case.reference, dynamic=False)
    calls: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    for name, function in variants.items():
        try:
            calls[name] = _prepare(function, inputs, device)
        except Exception as error:
            # A peer may refuse a shape, or not be installed, in ways of its own.
            if name == "op":
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    times = testing.interleave(calls, rounds=rounds)
    seconds = statistics.median(times["op"]) / len(inputs)
    ratios = testing.median_ratios(times, to="op")
    share = None
    itemsize = torch.empty((), dtype=dtype).element_size()
    if case.moved is not None:
        share = case.moved(itemsize) / seconds / copy_speed(device)
    elif case.flops is not None:
        share = case.flops / seconds / product_speed(device)
    return Result(seconds, {n: r for n, r in ratios.items() if n != "op"}, missing, share)


def _prepare(
    function: Callable[..., Any], inputs: list[Arguments], device: str
) -> Callable[[], object]:
    """Return a call that runs the function on every input set: on a GPU, a captured graph."""

    def run() -> None:
        for arguments in inputs:
            function(*arguments)

    run()
    if device != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@cache
def copy_speed(device: str) -> float:
    """Measure a copy of 512 MB (64 MB on a CPU): bytes read and written, per second."""
    source = testing.randn(2**27 if device == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = testing.interleave({"copy": lambda: target.copy_(source)}, rounds=15)["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(times)


@cache
def product_speed(device: str) -> float:
    """Measure a bfloat16 product of noise, 8192^3 (1024^3 on a CPU): operations per second."""
    size = 8192 if device == "cuda" else 1024
    a, b = (testing.randn(size, size, dtype=torch.bfloat16, device=device, seed=s) for s in (0, 1))
    out = a @ b
    times = testing.interleave({"product": lambda: torch.mm(a, b, out=out)}, rounds=15)["product"]
    return 2 * size**3 / statistics.median(times)
