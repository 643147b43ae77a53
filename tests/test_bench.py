"""Test the bench machinery: the GPU command on a machine without one, and that it can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from bench import cases, gpu, plot, training
from opensora import verified
from opensora.testing import randn
from opensora.training.plot import curves
from opensora.verified import Kernel


def arguments(dtype: torch.dtype, device: str, seed: int) -> cases.Arguments:
    return (randn(8, 16, dtype=dtype, device=device, seed=seed),)


def double_it(x: Tensor) -> Tensor:
    return x * 2


def lose_the_last_row(x: Tensor) -> Tensor:
    y = x * 2
    y[-1] = x[-1]
    return y


def leave_a_row_unwritten(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:-1] = x[:-1] * 2
    return y


def only(monkeypatch: pytest.MonkeyPatch, **found: cases.Case) -> None:
    monkeypatch.setattr(gpu, "collect", lambda _: found)
    monkeypatch.setattr(gpu, "build", lambda: "done")


def test_the_gpu_command_runs_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(_: Tensor) -> None:
        raise ModuleNotFoundError("No module named 'peer'")

    peers = {"same": double_it, "peer": absent}
    case = cases.Case(arguments, double_it, double_it, lambda size: 256 * size, peers=peers)
    only(monkeypatch, **{"double it": case})
    assert gpu.main(["--no-tests", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no GPU here" in printed
    assert "1 cases, 0 wrong; tests of the ops: not run" in printed
    summary = json.loads((tmp_path / "cpu.json").read_text())
    (entry,) = summary["results"]
    assert entry["correct"]
    assert set(entry["ratios"]) == {"eager", "same"}
    assert "No module named 'peer'" in entry["missing"]["peer"]
    assert 0 < entry["share"] < 100
    assert (tmp_path / "cpu.svg").read_text().startswith("<svg")


def test_the_gpu_command_fails_on_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, wrong=cases.Case(arguments, lose_the_last_row, double_it))
    assert gpu.main(["--no-tests"]) == 1
    assert "WRONG: error" in capsys.readouterr().out


def test_a_gpu_run_vouches_for_ops_whose_cases_all_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "architecture", lambda _: "sm_test")
    good = cases.Case(arguments, double_it, double_it)
    wrong = cases.Case(arguments, lose_the_last_row, double_it)
    listed = [
        ("gate_residual a", good, torch.float32),
        ("gate_residual b", good, torch.bfloat16),
        ("patchify a", good, torch.float32),
        ("patchify b", wrong, torch.float32),
        ("double it", good, torch.float32),
    ]
    entries = [gpu.verify(title, case, dtype, "cpu") for title, case, dtype in listed]
    found = gpu.vouch(entries, passed=True)
    assert found.keys() == {"gate_residual", "patchify"}
    version = found["gate_residual"]["version"]
    expected = {Kernel("gate_residual", "sm_test", d, version) for d in ("float32", "bfloat16")}
    assert set(verified._passed(found)) == expected
    assert version == verified.triton_version("gate_residual")
    assert set(verified._passed(gpu.vouch(entries, passed=False))) == set()


def test_a_kernel_that_cannot_run_costs_only_its_own_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Tensor) -> Any:
        raise RuntimeError("out of resource: shared memory")

    good = cases.Case(arguments, double_it, double_it)
    only(monkeypatch, broken=cases.Case(arguments, broken, double_it), good=good)
    assert gpu.main(["--no-tests"]) == 1
    printed = capsys.readouterr().out
    assert "broken bfloat16" in printed
    assert "FAILED  RuntimeError: out of resource" in printed
    assert "2 cases, 1 wrong" in printed


def test_when_time_is_up_cases_are_verified_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, good=cases.Case(arguments, double_it, double_it))
    assert gpu.main(["--no-tests", "--minutes", "0"]) == 0
    printed = capsys.readouterr().out
    assert "verified good bfloat16" in printed
    assert "timed good" not in printed
    assert "not timed: time was up" in printed
    only(monkeypatch, wrong=cases.Case(arguments, lose_the_last_row, double_it))
    assert gpu.main(["--no-tests", "--minutes", "0"]) == 1


def test_verifying_finds_memory_that_nobody_wrote() -> None:
    case = cases.Case(arguments, leave_a_row_unwritten, double_it)
    with pytest.raises(AssertionError):
        cases.verify(case, torch.float32, "cpu")


def test_verifying_finds_results_that_change() -> None:
    calls = 0

    def drifting(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * 2 if calls < 3 else torch.nextafter(x * 2, torch.tensor(torch.inf))

    case = cases.Case(arguments, drifting, double_it)
    with pytest.raises(AssertionError, match="repeat 1 differs"):
        cases.verify(case, torch.float32, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes minutes and writes figures")
def test_the_gpu_command_runs_where_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--no-tests", "--minutes", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert ", 0 wrong; tests of the ops: not run" in printed
    assert printed.count("verified ") == printed.count(": time was up") + printed.count("timed ")
    for op in {name.split()[0] for name in gpu.collect("")}:
        assert f"verified {op} " in printed


def test_every_op_has_cases_that_fit_a_cpu() -> None:
    found = gpu.collect("")
    for op in {name.split()[0] for name in found}:
        small = [
            name
            for name, case in found.items()
            if name.split()[0] == op and case.size(case.dtypes[0]) <= gpu.CPU_BYTES
        ]
        assert small, f"{op} has no case small enough for a machine without a GPU"


def test_curves_of_training_stages_follow_one_another(tmp_path: Path) -> None:
    def stage(name: str, *records: tuple[int, float]) -> str:
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in records]
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)

    first = stage("a", (50, 1.0), (100, 0.5), (50, 0.9))  # resumed: step 50 was done twice
    second = stage("b", (100, 0.1))
    out = tmp_path / "loss.svg"
    runs = [f"one={first}", f"two <b>={second}", f"+other={second}"]
    assert plot.main([*runs, "--output", str(out), "--title", "a & b"]) == 0
    root = ElementTree.parse(out).getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    x = [[float(p.split(",")[0]) for p in line.attrib["points"].split()] for line in lines]
    y = [[float(p.split(",")[1]) for p in line.attrib["points"].split()] for line in lines]
    assert x == [[240.0, 420.0], [780.0], [420.0]]  # steps 50, 100; 200; 100 of at most 200
    assert y[0][0] < y[0][1] < y[1][0] == y[2][0]
    assert len(y[0]) == 2
    with pytest.raises(SystemExit):
        plot.main(["one=missing", "--output", str(out)])
    with pytest.raises(ValueError, match="nothing to draw"):
        curves({"empty": []}, "")


def test_training_steps_are_measured_by_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--width", "64", "--depth", "1", "--buckets", "144p/1/2", "--steps", "1"]
    output = tmp_path / "training.json"
    assert training.run([*small, "--policies", "none", "full", "--output", str(output)]) == 0
    results = json.loads(output.read_text("utf-8"))["results"]
    assert set(results) == {"144p/1/2 none", "144p/1/2 full"}
    # 2 images of 144x256: 18 x 32 latents, 9 x 16 patches.
    for figures in results.values():
        assert figures["tokens_per_second"] == pytest.approx(288 / figures["seconds"], rel=1e-3)
        assert figures["gib"] > 0
    assert "tokens/s" in capsys.readouterr().out
