"""Test what holds for all CUDA C++ kernels: their harnesses, what their code uses, loading them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import static_cuda

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc/cuda"
OPS = sorted(path.stem for path in CUDA.glob("*.cu"))
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_library = pytest.mark.skipif(
    not static_cuda.LIBRARY.is_file() and os.environ.get("OPENSORA_BUILD") != "require",
    reason="no nvcc when opensora was built",
)


def run_harness(op: str, sources: Path, program: Path) -> subprocess.CompletedProcess[str]:
    """Compile a harness for the CPU, with every warning an error, and run it."""
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE", "-xc++"]
    command = ["c++", *flags, str(sources / f"harness/{op}.cu"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)


def test_every_kernel_has_a_harness() -> None:
    assert sorted(path.stem for path in (CUDA / "harness").glob("*.cu")) == OPS


@needs_compiler
@pytest.mark.parametrize("op", OPS)
def test_harness_agrees_in_every_order(op: str, tmp_path: Path) -> None:
    run = run_harness(op, CUDA, tmp_path / op)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(f"{op}: ")


# Each breaks what only a race, or an index at the edge, would show.
@needs_compiler
@pytest.mark.parametrize(
    ("op", "right", "wrong"),
    [
        ("qk_norm_rope", "__syncthreads();", ""),
        ("qk_norm_rope", "wait<0>();", ""),
        ("temporal_attention", "wait<0>();", ""),
        ("causal_conv3d", "wait<BUFFERS - 2>();", "wait<BUFFERS - 1>();"),
        ("causal_conv3d", "row >= a.H || column < 0", "row > a.H || column < 0"),
    ],
)
def test_a_planted_mistake_is_seen(op: str, right: str, wrong: str, tmp_path: Path) -> None:
    sources = shutil.copytree(CUDA, tmp_path / "cuda")
    source = sources / f"{op}.cu"
    text = source.read_text("utf-8")
    assert right in text
    source.write_text(text.replace(right, wrong, 1), "utf-8")
    run = run_harness(op, sources, tmp_path / op)
    assert run.returncode == 1, run.stdout + run.stderr


@needs_library
def test_kernels_keep_to_the_baseline() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench.static_cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d+ kernels, 0 failed$", run.stdout, re.M)


@needs_library
def test_the_baseline_holds_what_is_compiled() -> None:
    found = static_cuda.count()
    assert set(found) == set(static_cuda.load()["kernels"])
    assert {title.partition("::")[0] for title in found} == set(OPS)
    assert {title.rpartition(" ")[2] for title in found} == {"sm_80", "sm_90a"}
    products = [counts for title, counts in found.items() if "causal_conv3d::run<" in title]
    assert all(counts["matrix"] == ["HMMA"] for counts in products)


@needs_library
def test_the_library_loads_without_a_gpu() -> None:
    code = (
        "import torch, opensora.functional;"
        f"torch.ops.load_library({str(static_cuda.LIBRARY)!r});"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "assert has('opensora::qk_norm_rope_forward.native', 'CUDA');"
        "assert not torch.cuda.is_initialized()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("library", [None, b"no library"], ids=["missing", "broken"])
def test_a_library_that_cannot_be_loaded_stops_nobody_else(
    library: bytes | None, tmp_path: Path
) -> None:
    """Plant a torch with CUDA, and a copy of the package whose CUDA library is not one."""
    for name in ("opensora", "kernels"):
        skipped = shutil.ignore_patterns("assets", "_C_cuda*", "__pycache__", "kernels")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    (tmp_path / "opensora/kernels").symlink_to("../kernels")
    if library is not None:
        (tmp_path / "opensora/_C_cuda.abi3.so").write_bytes(library)
    code = (
        "import torch; torch.version.cuda = '13.0';"
        "from opensora import _extension, doctor; import opensora.functional;"
        "print(_extension.cuda_is_broken(), _extension.why_no_cuda()); print(doctor.main())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    first, *_, last = run.stdout.splitlines()
    if library is None:
        assert re.match(r"False (nothing was built|when this was installed|_C_cuda)", first)
        assert last == "0"
    else:
        assert first.startswith("True cannot load the compiled kernels")
        assert last == "1"
