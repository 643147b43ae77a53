"""Run the cases of `bench/ops` under pytest-benchmark, with every kernel that this machine has.

    pytest bench -s -k layernorm_modulate

Only the ratios carry over to another machine.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import cases
from bench.gpu import collect
from bench.shapes import CPU
from opensora import testing
from opensora.testing import Implementation

KERNELS = [i for i in testing.implementations() if i.name != "reference"]
#: A clip of 480p takes a CPU minutes; its pieces do not.
SMALL = (CPU, "tiny")
RUNS = [
    pytest.param(case, dtype, id=f"{name} {str(dtype).removeprefix('torch.')}".replace(" ", "-"))
    for name, case in collect("").items()
    if torch.cuda.is_available() or any(f" {word}" in name for word in SMALL)
    for dtype in case.dtypes
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize(("case", "dtype"), RUNS)
def bench_op(
    benchmark: BenchmarkFixture, kernel: Implementation, case: cases.Case, dtype: torch.dtype
) -> None:
    arguments = case.arguments(dtype, kernel.device, 0)
    with kernel.activate(), torch.no_grad():
        try:
            case.run(*arguments)
        except NotImplementedError as error:
            pytest.skip(str(error).split(". ")[0])
        benchmark(case.run, *arguments)
        result = cases.measure(case, dtype, kernel.device)
    for name, ratio in result.ratios.items():
        benchmark.extra_info[f"times_faster_than_{name}"] = round(ratio, 2)
    if result.share is not None:
        benchmark.extra_info["share"] = round(result.share, 2)
    print(f"\n{benchmark.name}: {benchmark.extra_info}")
