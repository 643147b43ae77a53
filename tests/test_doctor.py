"""Test `opensora doctor`: it knows every op, passes here, and fails what does not work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora import __main__ as program
from opensora import _extension, doctor
from opensora.ops import _library
from opensora.ops import layernorm_modulate as op
from opensora.recipe import describe_kernels

CPU = torch.device("cpu")


def test_it_checks_every_op_that_has_a_kernel() -> None:
    listed = describe_kernels(CPU)
    assert set(doctor.CHECKS) <= set(listed)
    unchecked = set(listed) - set(doctor.CHECKS)
    assert unchecked == {"qk_norm_rope_inplace"}  # a part of qk_norm_rope's check


@pytest.mark.skipif(_extension.path is None, reason="nothing is compiled")
def test_it_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    assert printed.count(" agrees (") >= 8
    assert f"C++ for {_extension.instruction_set()}" in printed


@pytest.mark.skipif(_extension.path is None, reason="nothing is compiled")
@pytest.mark.parametrize("fault", ["values", "gradients", "raises"])
def test_it_fails_what_does_not_work(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = op._backward if fault == "gradients" else op._forward
    right = broken._call

    def wrong(*args: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("illegal instruction\nand more")
        result = right(*args)
        return tuple(t * 1.1 for t in result) if isinstance(result, tuple) else result * 1.1

    monkeypatch.setattr(broken, "_call", wrong)
    assert program.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    line = next(
        line for line in printed.splitlines() if line.split()[0:1] == [op._forward.name[:-8]]
    )
    assert "WRONG" in line
    assert ("RuntimeError: illegal instruction" if fault == "raises" else "differs by") in line
    assert "1 kernels do not work here" in printed


def test_it_says_how_to_get_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(_extension, "path", None)
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)  # as if setup.py had never run
    for one in _library.registry:
        monkeypatch.setattr(one, "_kernels", {})
    assert program.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "the PyTorch reference serves" in printed
    assert "pip install --no-build-isolation" in printed


@pytest.mark.parametrize(
    ("note", "said", "status"),
    [
        ({"skipped": "no CMake was found"}, "none: when this was installed, no CMake was found", 0),
        ({"skipped": None}, "WRONG  they were built, but", 1),
        ("spoilt", "none: nothing was built", 0),
    ],
)
def test_it_says_why_nothing_is_compiled(
    note: Any,
    said: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "_build.json").write_text(json.dumps(note))
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(_extension, "path", None)
    monkeypatch.setattr(doctor, "_examine", lambda _: 0)
    assert program.main(["doctor"]) == status
    assert f"compiled kernels: {said}" in capsys.readouterr().out


def test_it_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["doctor", "--fast"]) == 2
    assert "takes no arguments, got '--fast'" in capsys.readouterr().err
    assert program.main(["doctor", "--help"]) == 0
