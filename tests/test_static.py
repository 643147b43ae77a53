"""Test that compiled kernels keep to their recorded resources, and that the gate can fail."""

from __future__ import annotations

import copy

import pytest

from bench import static
from opensora.launches import CAPABILITIES

CASES = static.cases()
GOOD = {
    "registers": 100,
    "spills": 0,
    "shared": 1024,
    "barriers": 4,
    "accesses": ["LDG.E.128", "STG.E.128"],
    "matrix": ["HGMMA"],
    "instructions": 1000,
    "seconds": 1.0,
    "macs_per_useful": 1.1,
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_to_the_baseline(name: str) -> None:
    known = static.load()["kernels"]
    failures = []
    for kernel, launch in static.kernels(CASES[name]):
        for capability in CAPABILITIES:
            title = f"{name}: {kernel} sm_{capability}"
            counts = static.count(CASES[name], launch, capability)
            failures += [f"{title}: {p}" for p in static.problems(counts, known.get(title))]
    assert not failures, "\n".join(failures)


def test_the_baseline_holds_nothing_else() -> None:
    kernels = {
        f"{name}: {kernel} sm_{capability}"
        for name, case in CASES.items()
        for kernel, _ in static.kernels(case)
        for capability in CAPABILITIES
    }
    assert set(static.load()["kernels"]) == kernels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "3 spill instructions"),
        ({"macs_per_useful": 1.78}, "1.780 multiply-accumulates"),
        ({"registers": 111}, "registers grew from 100 to 111"),
        ({"shared": 2048}, "shared grew"),
        ({"barriers": 7}, "barriers grew"),
        ({"barriers": 3}, "barriers fell from 4 to 3"),
        ({"instructions": 1101}, "instructions grew"),
        ({"accesses": ["LDG.E.U16", "STG.E.128"]}, "new memory accesses LDG.E.U16"),
        ({"matrix": []}, "no longer uses HGMMA"),
        ({"seconds": 30.0}, "compiling took 30.0 s"),
    ],
)
def test_the_gate_fails_what_got_worse(change: dict[str, object], message: str) -> None:
    assert static.problems(GOOD, GOOD) == []
    (problem,) = static.problems(copy.deepcopy(GOOD) | change, GOOD)
    assert message in problem


def test_the_gate_fails_a_kernel_it_does_not_know() -> None:
    assert "not in the baseline" in static.problems(GOOD, None)[0]
