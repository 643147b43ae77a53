"""Test that unverified kernels are not trusted, with planted kernels on a planted architecture."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from opensora import doctor, sample, self_check, testing, trust, verified
from opensora.errors import OpenSoraError
from opensora.functional import gate_residual
from opensora.ops import _library
from opensora.ops import gate_residual as op
from opensora.testing import randn
from opensora.verified import Kernel

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
KERNEL = Kernel("gate_residual", "sm_test", "float32", "v1")
pytestmark = pytest.mark.skipif(
    _library.INTERPRETED, reason="a guard is for CUDA; interpreted kernels are called directly"
)

Launcher = Callable[..., Any]


class Planted:
    """Count how often kernels ran; they compute what references do, spoilt on request."""

    def __init__(self) -> None:
        self.runs: dict[str, int] = {}
        self.faults: dict[str, Callable[[Any], Any]] = {}
        self.checks = 0

    def launcher(self, one: _library.Op) -> Launcher:
        def launch(*args: Any) -> Any:
            self.runs[one.name] = self.runs.get(one.name, 0) + 1
            return self.faults.get(one.name, lambda results: results)(one.reference(*args))

        return launch

    @contextmanager
    def on_cpu(self, *ops: _library.Op) -> Iterator[None]:
        """Let guards of planted kernels serve ops on the CPU, as in a fresh process."""
        with torch.library._scoped_library("opensora", "IMPL") as library, ExitStack() as stack:

            def patch(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(mock.patch.object(owner, name, value))

            check = trust.check

            def counted(*args: Any) -> str | None:
                self.checks += 1
                return check(*args)

            patch(trust, "_verdicts", {})
            patch(trust, "check", counted)
            patch(verified, "architecture", lambda _: "sm_test")
            for one in ops:
                patch(one, "launcher", self.launcher(one))
                patch(one, "version", lambda: "v1")
                stack.enter_context(mock.patch.dict(one._kernels, {"cpu": "C++"}))
                stack.enter_context(mock.patch.dict(one.dtypes, {"cpu": one.dtypes["cuda"]}))
                library.impl(one.name, one.guard(), "CPU", allow_override=True)
            yield


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache of every test to itself; no kernel has a record."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verified, "records", frozenset)
    return tmp_path / "opensora/verified"


OPS = (op._forward, op._backward)


def arguments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((2, 5, 33), (2, 5, 33), (2, 33))
    return [randn(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate(shapes)]


def run(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the op's result and its gradients."""
    args = arguments(dtype)
    z = gate_residual(*args)
    return [z.detach(), *torch.autograd.grad(z, args, randn(2, 5, 33, dtype=dtype, seed=9))]


def expected(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with testing.reference():
        return run(dtype)


def assert_right(results: list[Tensor]) -> None:
    for one, other in zip(results, expected(results[0].dtype), strict=True):
        torch.testing.assert_close(one, other)


def raises(_: Any) -> Any:
    raise RuntimeError("no kernel image is available\nand more")


def halved(results: Any) -> Any:
    return results / 2 if isinstance(results, Tensor) else tuple(t / 2 for t in results)


def with_nan(results: Any) -> Any:
    (results if isinstance(results, Tensor) else results[-1]).flatten()[-1] = torch.nan
    return results


def test_a_right_kernel_is_checked_once_and_then_vouched_for(
    planted: Planted, folder: Path
) -> None:
    with planted.on_cpu(*OPS):
        assert_right(run())
        counts = dict(planted.runs)
        run()
    assert planted.checks == 1
    assert planted.runs == {name: count + 1 for name, count in counts.items()}
    assert verified.vouch(KERNEL) == verified.Verdict("cache", None)
    with planted.on_cpu(*OPS):  # as a new process
        run()
        assert planted.checks == 1
        run(torch.bfloat16)  # a dtype is trusted by itself
        assert planted.checks == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        "gate_residual-sm_test-bfloat16-v1.json",
        "gate_residual-sm_test-float32-v1.json",
    ]


@pytest.mark.parametrize("fault", [halved, with_nan, raises])
@pytest.mark.parametrize("name", ["gate_residual_forward", "gate_residual_backward"])
def test_a_wrong_kernel_is_reported_and_replaced(
    planted: Planted, fault: Callable[[Any], Any], name: str
) -> None:
    planted.faults[name] = fault
    with planted.on_cpu(*OPS):
        with pytest.warns(RuntimeWarning, match="kernel of gate_residual is not used") as caught:
            assert_right(run())
        ran = dict(planted.runs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_right(run())  # said once
            assert planted.runs == ran  # forward and backward are replaced together
        assert trust.failures(torch.device("cpu")) == set()
        with mock.patch.object(torch.Tensor, "device", torch.device("cuda")):
            assert trust.failures(torch.device("cuda")) == {"gate_residual"}
    (warning,) = caught
    said = str(warning.message)
    assert "float32 on sm_test" in said
    assert "opensora doctor" in said
    assert "OPENSORA_KERNELS=reference" in said
    what = "RuntimeError: no kernel image" if fault is raises else "differs by"
    assert what in said
    if fault is not raises:
        assert ("gradient" if name.endswith("backward") else "result") in said
    assert planted.checks == 1
    with planted.on_cpu(*OPS), pytest.warns(RuntimeWarning):  # the next process asks again
        run()
    assert planted.checks == 2


def test_a_quiet_program_reports_a_wrong_kernel(
    planted: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    planted.faults["gate_residual_forward"] = halved
    with planted.on_cpu(*OPS), sample._notes(sample._quiet, []):
        warnings.warn("a library's", RuntimeWarning, stacklevel=1)
        run()
    said = capsys.readouterr().err
    assert said.startswith("warning: the GPU kernel of gate_residual is not used")
    assert said.count("\n") == 1


def test_a_wrong_dtype_leaves_the_others_alone(planted: Planted) -> None:
    def spoil(results: Any) -> Any:
        return halved(results) if results.dtype == torch.bfloat16 else results

    planted.faults["gate_residual_forward"] = spoil
    with planted.on_cpu(*OPS):
        assert_right(run())
        with pytest.warns(RuntimeWarning, match="bfloat16 on sm_test"):
            assert_right(run(torch.bfloat16))
        ran = planted.runs["gate_residual_forward"]
        run()
        assert planted.runs["gate_residual_forward"] == ran + 1


@pytest.mark.filterwarnings("ignore:the GPU kernel")
def test_require_raises_for_a_wrong_kernel(planted: Planted) -> None:
    planted.faults["gate_residual_forward"] = halved
    with planted.on_cpu(*OPS), testing.require():
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=r"not trusted: result 1 differs"):
                run()
    planted.faults.clear()
    with planted.on_cpu(*OPS), testing.require():
        assert_right(run())


def test_the_reference_stands_in_for_a_kernel_in_a_compiled_graph(planted: Planted) -> None:
    compiled = torch.compile(gate_residual, backend="aot_eager", fullgraph=True)
    planted.faults["gate_residual_backward"] = halved
    args = arguments()
    with planted.on_cpu(*OPS):
        with pytest.warns(RuntimeWarning, match="is not used"):
            z = compiled(*args)
        gradients = torch.autograd.grad(z, args, randn(2, 5, 33, seed=9))
        kernels_ran = dict(planted.runs)
        compiled(*args)
        assert planted.runs == kernels_ran
    assert_right([z.detach(), *gradients])


def test_a_record_vouches_until_the_kernel_changes(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "records", lambda: frozenset({KERNEL}))
    with planted.on_cpu(*OPS):
        run()
        assert planted.checks == 0
    for changed in (
        KERNEL._replace(version="v0"),
        KERNEL._replace(architecture="sm_90"),
        KERNEL._replace(dtype="bfloat16"),
    ):
        monkeypatch.setattr(verified, "records", lambda changed=changed: frozenset({changed}))
        planted.checks = 0
        with planted.on_cpu(*OPS):
            verified.remember(KERNEL, "forgotten below")
            run()
        assert planted.checks == 1


def test_a_failure_outweighs_a_record(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "records", lambda: frozenset({KERNEL}))
    verified.remember(KERNEL, "result 1 differs")
    with planted.on_cpu(*OPS):
        run()
    assert planted.checks == 1
    assert verified.vouch(KERNEL) == verified.Verdict("record", None)


def test_a_kernel_that_broke_the_context_is_not_tried_twice(planted: Planted) -> None:
    planted.faults["gate_residual_forward"] = raises
    with (
        planted.on_cpu(*OPS),
        mock.patch.object(trust, "is_lost", return_value=True),
        pytest.raises(OpenSoraError, match=r"broke the GPU's context.*Start again"),
    ):
        run()
    with planted.on_cpu(*OPS), pytest.warns(RuntimeWarning, match="no kernel image"):
        assert_right(run())
    assert planted.checks == 1
    planted.faults.clear()
    verified.remember(KERNEL, None)  # as the doctor, who checks it again
    with planted.on_cpu(*OPS):
        assert_right(run())


def test_a_check_that_lacks_memory_decides_nothing(planted: Planted, folder: Path) -> None:
    def full(_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    planted.faults["gate_residual_forward"] = full
    with planted.on_cpu(*OPS):
        with pytest.raises(torch.OutOfMemoryError):
            run()
        planted.faults.clear()
        assert not folder.exists()
        assert_right(run())


def test_nothing_is_checked_while_a_graph_is_captured(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_is_capturing", lambda _: True)
    with planted.on_cpu(*OPS):
        with pytest.warns(RuntimeWarning, match="call the op once before the capture"):
            assert_right(run())
        assert planted.checks == 0
        assert planted.runs == {}
        monkeypatch.setattr(trust, "_is_capturing", lambda _: False)
        assert_right(run())
        assert planted.checks == 1
        monkeypatch.setattr(trust, "_is_capturing", lambda _: True)
        ran = planted.runs["gate_residual_forward"]
        run()
        assert planted.runs["gate_residual_forward"] == ran + 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"passed": 1}', b'{"passe', b"\xff\x00", b"[" * 9999]
)
def test_a_corrupt_cache_costs_a_check(planted: Planted, folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    path = folder / "gate_residual-sm_test-float32-v1.json"
    path.write_bytes(content)
    with planted.on_cpu(*OPS):
        assert_right(run())
    assert planted.checks == 1
    assert json.loads(path.read_text()) == {"passed": True}


def test_a_cache_that_cannot_be_written_costs_a_check(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    homes = {"XDG_CACHE_HOME": str(tmp_path / "file"), "HOME": "/proc/none"}
    for variable, value in homes.items():
        monkeypatch.setenv(variable, value)
        planted.checks = 0
        for _ in range(2):
            with planted.on_cpu(*OPS):
                assert_right(run())
        assert planted.checks == 2
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verified.cache_folder() == tmp_path / ".cache/opensora/verified"
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError))
    assert verified.cache_folder() is None
    assert verified.vouch(KERNEL) is None
    verified.remember(KERNEL, None)


def test_processes_share_a_cache(folder: Path) -> None:
    code = """
import sys
from opensora.verified import Kernel, remember, vouch
for i in range(200):
    kernel = Kernel("op", "sm_90", "float32", f"v{i % 20}")
    remember(kernel, None)
    assert vouch(kernel).by == "cache", i
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"op-sm_90-float32-v{i}.json" for i in range(20)
    )


def test_threads_wait_for_one_check(planted: Planted) -> None:
    barrier, reference = threading.Barrier(4), expected()

    def race() -> list[Tensor]:
        barrier.wait()
        return run()

    with planted.on_cpu(*OPS), ThreadPoolExecutor(4) as pool:
        outcomes = [future.result() for future in [pool.submit(race) for _ in range(4)]]
    assert planted.checks == 1
    for outcome in outcomes:
        for one, other in zip(outcome, reference, strict=True):
            torch.testing.assert_close(one, other)


def test_a_check_reaches_nothing_of_its_caller(planted: Planted) -> None:
    def note(results: Any) -> Any:
        if trust.is_checking():  # else a GPU's backward would leave the thread that is let through
            assert not torch._C._is_multithreading_enabled()
        return results

    planted.faults = dict.fromkeys((op._forward.name, op._backward.name), note)
    args = [t.detach() for t in arguments()]
    packed = []
    before = torch.get_rng_state()

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with (
        planted.on_cpu(*OPS),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        z = gate_residual(*args)
        assert planted.checks == 1
        assert z.is_inference()
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert packed == []
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not trust.is_checking()
    assert_right([z.detach().clone(), *expected()[1:]])


def test_a_check_can_start_in_a_backward_pass(planted: Planted) -> None:
    inner: list[Tensor] = []
    x = randn(3).requires_grad_()
    x.register_hook(lambda _: inner.extend(torch.enable_grad()(run)()))
    with planted.on_cpu(*OPS):
        x.sum().backward()
    assert planted.checks == 1
    assert_right(inner)


def test_a_check_asks_the_kernel_in_every_mode(planted: Planted) -> None:
    planted.faults["gate_residual_forward"] = halved
    args = [*(t.detach() for t in arguments()), None, None]
    with planted.on_cpu(*OPS), testing.reference(), pytest.warns(RuntimeWarning):
        torch.ops.opensora.gate_residual_forward(*args)
    assert verified.vouch(KERNEL) is None


def test_suspended_kernels_serve_unchecked(planted: Planted) -> None:
    planted.faults["gate_residual_forward"] = halved
    with planted.on_cpu(*OPS):
        x, y, gate = (t.detach() for t in arguments())
        right = op.reference(x, y, gate, None, None)
        with trust.suspend():
            assert torch.equal(gate_residual(x, y, gate), right / 2)
        with pytest.warns(RuntimeWarning):
            assert torch.equal(gate_residual(x, y, gate), right)
        with trust.suspend():  # also after a verdict
            assert torch.equal(gate_residual(x, y, gate), right / 2)
    assert planted.checks == 1


def test_a_check_runs_every_kernel_of_its_op(planted: Planted) -> None:
    by_family: dict[str, set[str]] = {}
    for one in _library.registry:
        by_family.setdefault(one.family, set()).add(one.name)
    assert by_family.keys() == self_check.CHECKS.keys()
    with planted.on_cpu(*_library.registry):
        for family, names in by_family.items():
            planted.runs = {}
            assert trust.check(family, CPU, torch.float32) is None
            assert planted.runs.keys() == names
    assert {torch.float32, torch.bfloat16, torch.float16} == self_check.TOLERANCE.keys()
    for one in _library.registry:
        assert set(one.dtypes["cuda"]) <= self_check.TOLERANCE.keys()


def test_references_return_what_fakes_promise(planted: Planted) -> None:
    """Compare shapes, dtypes and strides: a compiled graph relies on them."""
    calls: list[tuple[_library.Op, Any, Any]] = []

    def noting(one: _library.Op) -> Launcher:
        def launch(*args: Any) -> Any:
            results = one.reference(*args)
            calls.append((one, args, results))
            return results

        return launch

    def listed(value: Any) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else list(value or ())

    with mock.patch.object(planted, "launcher", noting), planted.on_cpu(*_library.registry):
        for family in self_check.CHECKS:
            assert trust.check(family, CPU, torch.float32) is None
    assert {one.name for one, _, _ in calls} == {one.name for one in _library.registry}
    for one, args, results in calls:
        mode = FakeTensorMode()

        def fake(value: Any, mode: FakeTensorMode = mode) -> Any:
            if isinstance(value, list):
                return [fake(item) for item in value]
            return mode.from_tensor(value.detach()) if isinstance(value, Tensor) else value

        faked = [fake(value) for value in args]
        with mode:
            promised = listed(one.overload(*faked))
        for real, promise in zip(listed(results), promised, strict=True):
            assert (real.shape, real.dtype) == (promise.shape, promise.dtype), one.name
            assert real.stride() == promise.stride(), one.name


def test_a_changed_source_is_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    package = tmp_path / "opensora"
    shutil.copytree(verified.PACKAGE / "kernels", package / "kernels")
    shutil.copytree(verified.PACKAGE / "ops", package / "ops")
    original = {name: verified.triton_version(name) for name in self_check.CHECKS}
    monkeypatch.setattr(verified, "PACKAGE", package)

    def changed(file: str) -> set[str]:
        """Return the ops whose version changes with a file."""
        path = package / file
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        found = {name for name in original if verified.triton_version(name) != original[name]}
        path.write_bytes(before)
        return found

    assert {name: verified.triton_version(name) for name in original} == original
    assert changed("kernels/gate_residual.py") == {"gate_residual"}
    assert changed("kernels/_tl.py") == original.keys()
    assert changed("kernels/qk_norm_rope.py") == {"qk_norm_rope", "temporal_attention"}
    assert changed("ops/_modulation.py") >= {"gate_residual", "residual_layernorm_modulate"}
    assert changed("ops/_library.py") == set()
    with mock.patch("triton.__version__", "0.0"):
        assert not set(original.values()) & {verified.triton_version(name) for name in original}
    shutil.rmtree(package)
    assert verified.describe("gate_residual", op._forward.version, CPU, torch.float32).version == ""
    assert verified.vouch(KERNEL._replace(version="")) is None


def test_records_come_from_the_checkout_or_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    entry = {"version": "v1", "architecture": "sm_test", "dtypes": ["float32"], "passed": True}
    table = {
        "gate_residual": entry,
        "qk_norm_rope": entry | {"passed": False},
        "patchify": entry | {"passed": "yes"},
        "cross_attention": entry | {"dtypes": None},
        "groupnorm_silu": None,
    }
    package, baselines = tmp_path / "opensora", tmp_path / "bench/baselines"
    package.mkdir()
    baselines.mkdir(parents=True)
    (package / "verified.json").write_text(json.dumps({"gpu": table, "other": None}))
    read = verified.records.__wrapped__
    with mock.patch.object(verified, "PACKAGE", package):
        assert read() == {KERNEL}
        (package / "verified.json").write_text("{")
        assert read() == set()
        (tmp_path / "CMakeLists.txt").touch()  # a checkout: its own results count
        (baselines / "gpu.json").write_text(json.dumps({"verified": table}))
        for name, content in {"a": "{", "b": "[]", "c": '{"verified": 3}'}.items():
            (baselines / f"{name}.json").write_text(content)
        assert read() == {KERNEL}


def test_the_doctor_says_what_vouches_for_a_gpu_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert doctor._remember(KERNEL, "wrong", CPU) == "this run"
    assert doctor._remember(KERNEL, None, CPU) == "this run"
    assert doctor._remember(KERNEL, None, CPU) == "cache"
    monkeypatch.setattr(verified, "records", lambda: frozenset({KERNEL}))
    assert doctor._remember(KERNEL, None, CPU) == "record"
    assert doctor._remember(KERNEL, "wrong", CPU) == "record"  # of the run before: it says WRONG
    assert doctor._remember(KERNEL, None, CPU) == "this run"


def test_triton_kernels_pass_and_the_interpreter_is_caught() -> None:
    """Check the real kernels as far as a machine without a GPU can: interpreted.

    The interpreter multiplies matrices of bfloat16 wrongly, as a broken compiler would.
    """
    pytest.importorskip("triton")
    code = """
import torch
from triton.runtime.interpreter import GridExecutor
from opensora import self_check, testing, trust
cpu, launch, launched = torch.device("cpu"), GridExecutor.__call__, set()
def note(self, *args, **kwargs):
    launched.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
    return launch(self, *args, **kwargs)
GridExecutor.__call__ = note
with testing.require():
    for name in self_check.CHECKS:
        problem = trust.check(name, cpu, torch.float32)
        assert problem is None, (name, problem)
    for name in ("spatial_attention", "temporal_attention", "cross_attention", "causal_conv3d"):
        assert "result 1 differs by" in trust.check(name, cpu, torch.bfloat16), name
    assert trust.check("gate_residual", cpu, torch.bfloat16) is None
print(*launched)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kernels = {
        f"{path.stem}.{name}"
        for path in (verified.PACKAGE / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert len(kernels) > 20
    assert set(run.stdout.split()) == kernels  # a check reaches every kernel of its op
