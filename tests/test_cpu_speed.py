"""Gate speed and memory of the CPU kernels against the record, and test the gate itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, cpu, memory
from opensora import _extension
from opensora.testing import randn

#: Taken in CI: one of every kind, a few seconds in all. `make bench` takes all of them.
GATED = [
    "layernorm_modulate forward 480p bfloat16",
    "qk_norm_rope forward 480p norm, rotary bfloat16",
    "groupnorm_silu forward 256 wide bfloat16",
    "temporal_attention forward 15 frames bfloat16",
    "spatial_attention forward 480p bfloat16",
    "cfg_rflow_step 480p bfloat16",
]
needs_peaks = pytest.mark.skipif(not memory.supported(), reason="the system keeps no peak")
needs_kernels = pytest.mark.skipif(_extension.path is None, reason="nothing is compiled")


@needs_kernels
@pytest.mark.parametrize("name", GATED)
def test_a_kernel_is_as_fast_as_recorded(name: str) -> None:
    case, dtype = cpu.chosen(name.partition(" ")[0])[name]
    record = json.loads(cpu.BASELINE.read_text("utf-8"))
    recorded = record["results"][name]
    if record["processor"] != cpu.processor():
        # Ratios of another processor are no measure; much slower than plain PyTorch is never right.
        recorded = {"eager": 1.0}
    figures, low = cpu.check(case, dtype, recorded)
    assert figures is not None
    assert not low, f"{low}; all: {figures}"


def test_the_record_holds_every_case_and_no_other() -> None:
    record = json.loads(cpu.BASELINE.read_text("utf-8"))
    assert set(record["results"]) == set(cpu.chosen(""))
    assert all(figures["eager"] > 0.9 for figures in record["results"].values())
    assert set(record["memory"]) == set(memory.JOBS)
    assert memory.fallen(record["memory"]) == []


@needs_peaks
@needs_kernels
@pytest.mark.parametrize("job", memory.JOBS)
def test_kernels_take_no_more_memory_than_references(job: str) -> None:
    assert memory.fallen({job: memory.measure(job, frames=3)}) == []


ALIVE_TOGETHER = """
import torch
from bench import memory

def run():
    for _ in range(3):
        torch.ones(50_000_000, dtype=torch.uint8)
    kept = torch.ones(50_000_000, dtype=torch.uint8)
    torch.ones(50_000_000, dtype=torch.uint8).add_(kept)

torch.ones(10).add_(torch.ones(10))
print(memory._growth(run))
"""


@needs_peaks
def test_a_peak_is_what_was_alive_together() -> None:
    found = subprocess.run(
        [sys.executable, "-c", ALIVE_TOGETHER],
        cwd=Path(memory.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 95e6 < int(found.stdout) < 115e6
    assert memory.fallen({"a": {"ratio": 1.04}, "b": {"ratio": 1.06}}) == [
        "b: 1.06 of the references' peak memory, allowed 1.05"
    ]


def case_of(run: Any) -> cases.Case:
    def arguments(dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor]:
        return (randn(64, 1024, dtype=dtype, device=device, seed=seed),)

    return cases.Case(arguments, run, lambda x: x * 2, lambda size: 2 * 64 * 1024 * size)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure again without waiting."""
    monkeypatch.setattr(cpu, "PAUSES", (0.0, 0.0))


@pytest.mark.usefixtures("at_once")
def test_the_gate_fails_what_is_slow() -> None:
    def slow(x: Tensor) -> Tensor:
        for _ in range(50):
            x.sin()
        return x * 2

    figures, low = cpu.check(case_of(slow), torch.float32, {"eager": 1.0, "share": 0.9})
    assert figures is not None
    assert [reason.partition(" ")[0] for reason in low] == ["eager", "share"]
    fine = cpu.check(case_of(lambda x: x * 2), torch.float32, {"eager": 0.5})
    assert fine[1] == []
    assert cpu.fallen({"share": 0.61, "eager": 1.1}, {"share": 3.0, "eager": 9.0}) == []
    assert cpu.fallen({"share": 0.61, "eager": 0.9}, {"share": 3.0, "eager": 9.0}) != []
    assert cpu.fallen({"eager": 5.0}, {"eager": 9.0}) == ["eager 5.00, recorded 9.00"]
    assert cpu.fallen({"share": 0.59}, {"share": 3.0}) == ["share 0.59, recorded 3.00"]


def test_the_gate_fails_what_is_wrong() -> None:
    with pytest.raises(AssertionError):
        cpu.measure(case_of(lambda x: x * 2.1), torch.float32)


def test_a_record_that_holds_a_kernel_needs_one() -> None:
    def absent(_: Tensor) -> Tensor:
        raise NotImplementedError("no kernel")

    assert cpu.check(case_of(absent), torch.float32, {"eager": 1.0}) == (
        None,
        ["no kernel takes it"],
    )
    assert cpu.check(case_of(absent), torch.float32, {}) == (None, [])


@needs_kernels
@pytest.mark.usefixtures("at_once")
def test_the_command_compares_only_on_its_own_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"double it float32": (case_of(lambda x: x * 2), torch.float32)}
    monkeypatch.setattr(cpu, "chosen", lambda _: made)
    monkeypatch.setattr(memory, "JOBS", {})
    path = tmp_path / "cpu.json"
    assert cpu.main(["--update", "--baseline", str(path)]) == 0
    record = json.loads(path.read_text("utf-8"))
    assert set(record["results"]["double it float32"]) == {"eager", "share"}
    assert (tmp_path / "cpu.svg").read_text("utf-8").startswith("<svg")
    record["results"]["double it float32"] = {"eager": 1000.0}
    path.write_text(json.dumps(record), "utf-8")
    assert cpu.main(["--baseline", str(path)]) == 1
    assert "FALLEN  double it float32: eager" in capsys.readouterr().out
    path.write_text(json.dumps(record | {"processor": "another"}), "utf-8")
    assert cpu.main(["--baseline", str(path)]) == 0
    assert "nothing compared: cpu.json was recorded on another" in capsys.readouterr().out
