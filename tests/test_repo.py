"""Test the repository itself: one stem per op, what a wheel holds, what importing costs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = [
    path
    for folder in ("opensora", "kernels", "scripts", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if (ROOT / "opensora/kernels") not in path.parents  # the symlink to kernels/
]
OPS = {path.stem for path in (ROOT / "opensora/ops").glob("[!_]*.py")}


def run_python(code: str, *args: str) -> str:
    """Run code in a fresh process outside the repository and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENSORA_")}
    run = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("tests/ops", "test_(.+).py"),
        ("bench/ops", "bench_(.+).py"),
        ("kernels", "([^_].*).py"),
        ("csrc/cpu", "(.+).cpp"),
        ("csrc/cuda", "(.+).cu"),
    ],
)
def test_every_file_of_an_op_has_its_stem(folder: str, pattern: str) -> None:
    files = [path.name for path in (ROOT / folder).glob("*") if path.is_file()]
    stems = {match[1] for name in files if (match := re.fullmatch(pattern, name))}
    assert stems <= OPS, f"{folder}: {stems - OPS} is no op of opensora/ops"
    if folder.endswith("/ops"):
        assert stems == OPS, f"{folder}: nothing for {OPS - stems}"


def test_functional_exports_every_op() -> None:
    from opensora import functional

    assert set(functional.__all__) == OPS
    assert all(callable(getattr(functional, name)) for name in OPS)


def test_an_op_names_kernels_that_exist() -> None:
    for stem in OPS:
        source = (ROOT / f"opensora/ops/{stem}.py").read_text("utf-8")
        for target in re.findall(r'cuda="opensora\.kernels\.(\w+):\w+"', source):
            assert target == stem
            assert (ROOT / f"kernels/{stem}.py").is_file()
        cpu = ROOT / f"csrc/cpu/{stem}.cpp"
        registered = re.findall(r'm\.impl\("(\w+)"', cpu.read_text()) if cpu.is_file() else []
        assert set(registered) <= set(re.findall(r'"(\w+)\(', source))


@dataclass
class Distribution:
    """Hold an sdist, and a wheel built from it where there is no compiler."""

    sources: list[str]
    wheel: dict[str, bytes]
    tag: str
    said: str


RECORD = {"layernorm_modulate": {"version": "triton-0", "architecture": "sm_90", "passed": True}}
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build_without_compiler(
    hook: str, source: Path, out: Path, mode: str
) -> subprocess.CompletedProcess[str]:
    """Call the build backend with nothing on PATH; the name of its result ends what it prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PATH")}
    return subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(out)],
        cwd=source,
        env=environment | {"PATH": "/none", "OPENSORA_BUILD": mode},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist from a copy of the checkout and unpack it; return its folder."""
    out = tmp_path_factory.mktemp("sdist")
    source = out / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, copy)
    baselines = source / "bench/baselines"
    (baselines / "a-gpu.json").write_text(json.dumps({"verified": RECORD, "results": []}))
    (baselines / "spoilt.json").write_text("{")
    run = build_without_compiler("build_sdist", source, out, "auto")
    assert run.returncode == 0, run.stdout + run.stderr
    with tarfile.open(out / run.stdout.splitlines()[-1]) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (folder,) = (out / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="session")
def distribution(unpacked: Path) -> Distribution:
    """Build a wheel from the sdist."""
    stale = unpacked / "build/lib/opensora/stale.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    sources = [p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()]
    run = build_without_compiler("build_wheel", unpacked, unpacked.parent, "auto")
    assert run.returncode == 0, run.stdout + run.stderr
    name = run.stdout.splitlines()[-1]
    with zipfile.ZipFile(unpacked.parent / name) as wheel:
        contents = {each: wheel.read(each) for each in wheel.namelist()}
    tag = name.removesuffix(".whl").split("-", 2)[-1]
    return Distribution(sources, contents, tag, run.stdout + run.stderr)


def test_the_sdist_can_build_the_kernels(distribution: Distribution) -> None:
    inside = set(distribution.sources)
    assert {"CMakeLists.txt", "LICENSE", "README.md", "constraints.txt"} <= inside
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert expected <= inside


def test_the_wheel_holds_the_package_and_nothing_else(distribution: Distribution) -> None:
    files = distribution.wheel.keys()
    top = {name.partition("/")[0] for name in files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"opensora"}
    folders = {"opensora": ROOT / "opensora", "opensora/kernels": ROOT / "kernels"}
    for prefix, folder in folders.items():
        for path in folder.rglob("*"):
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            if path.suffix in (".py", ".safetensors", ".json") or path.name == "py.typed":
                assert name in files
    assert not [name for name in files if name.endswith((".so", ".pyc"))]
    assert "opensora/stale.py" not in files


def test_a_wheel_without_kernels_says_why(distribution: Distribution) -> None:
    assert distribution.tag == "py3-none-any"
    reason = "no C++ compiler was found (Debian: apt-get install g++)"
    said = f"opensora: compiled CPU and CUDA kernels skipped: {reason}"
    assert distribution.said.count(said) == distribution.said.count("skipped") == 1
    note = json.loads(distribution.wheel["opensora/_build.json"])
    assert note == {"skipped": reason, "skipped_cuda": reason}


def test_a_failed_build_costs_its_kernels_alone(unpacked: Path) -> None:
    """Build in place by a compiler that fails; an earlier build's library must go."""
    library = unpacked / "opensora/_C.abi3.so"
    for mode in ("auto", "require"):
        library.touch()
        run = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=unpacked,
            env={**os.environ, "CXX": shutil.which("false") or "false", "OPENSORA_BUILD": mode},
            capture_output=True,
            text=True,
            check=False,
        )
        if mode == "require":
            assert run.returncode != 0
            assert "OPENSORA_BUILD=require, but the build failed" in run.stderr
            continue
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("compiled CPU kernels skipped: the build failed") == 1
        assert not library.exists()
        note = json.loads((unpacked / "opensora/_build.json").read_text())
        assert note["skipped"].startswith("the build failed")
    library.unlink()


def test_the_wheel_carries_what_gpus_verified(distribution: Distribution) -> None:
    shipped = json.loads(distribution.wheel["opensora/verified.json"])
    assert shipped["a-gpu"] == RECORD
    assert "spoilt" not in shipped
    for path in (ROOT / "bench/baselines").glob("*.json"):
        record = json.loads(path.read_text()).get("verified")
        assert shipped.get(path.stem) == record


def test_a_build_can_be_required(unpacked: Path) -> None:
    run = build_without_compiler("build_wheel", unpacked, unpacked.parent, "require")
    assert run.returncode != 0
    assert "OPENSORA_BUILD=require, but no C++ compiler was found" in run.stderr
    run = build_without_compiler("build_wheel", unpacked, unpacked.parent, "maybe")
    assert run.returncode != 0
    assert "OPENSORA_BUILD must be auto, require or off, got 'maybe'" in run.stderr


HEAVY = ("triton", "transformers", "torchvision", "diffusers", "av")


@pytest.mark.parametrize("argument", [None, "", "--version", "--help"])
def test_import_is_light(argument: str | None) -> None:
    """Import the package, or run the program with at most one word, and see what was loaded."""
    loaded = run_python(
        """
import runpy, sys, torch
if len(sys.argv) == 1:
    import opensora.functional, opensora.trust
    assert not torch.cuda.is_initialized()
else:
    sys.argv = ["opensora", *filter(None, sys.argv[1:])]
    try:
        runpy.run_module("opensora", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert not stop.code
print(*sorted(name for name in sys.modules if "." not in name))
""",
        *([] if argument is None else [argument]),
    ).splitlines()[-1]
    assert "opensora" in loaded.split()
    assert not set(HEAVY) & set(loaded.split())


def test_import_is_quick() -> None:
    """Compare with importing torch, in turns."""
    programs = {
        "torch": ["-c", "import torch"],
        "opensora": ["-c", "import torch, opensora.functional"],
        "program": ["-m", "opensora"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(3):
        for name, arguments in programs.items():
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=tempfile.gettempdir(),
                stdout=subprocess.DEVNULL,
                check=True,
            )
            seconds[name].append(time.perf_counter() - started)
    for name in ("opensora", "program"):
        pairs = zip(seconds[name], seconds["torch"], strict=True)
        assert statistics.median(one - other for one, other in pairs) < 1, (name, seconds)


def test_works_where_torchvision_cannot_be_imported() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "opensora").rglob("*.py")
        if "kernels" not in path.parts and path.name != "__main__.py"
    )
    run_python(
        """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        # transformers and diffusers ask whether it exists; a missing module is a fine answer.
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
for module in sys.argv[1:]:
    importlib.import_module(module)
assert "torchvision" not in sys.modules
""",
        *modules,
    )


def test_kernels_are_imported_under_their_own_name_alone() -> None:
    run_python("""
import sys
sys.path.insert(0, sys.path[0] or ".")
import opensora.kernels
try:
    import kernels
except ImportError as error:
    assert "opensora.kernels" in str(error)
else:
    raise AssertionError("`import kernels` found this repository's folder")
""")


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Return the calls of a module with the dotted names of what they call."""
    tree = ast.parse(path.read_text("utf-8"))
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_loads_no_code_and_runs_no_shell(path: Path) -> None:
    for name, call in calls(path):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
        assert not name.startswith("pickle.")
        assert keywords.get("shell", "False") == "False"
        assert keywords.get("trust_remote_code", "False") == "False"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert "torchvision" not in {name.partition(".")[0] for name in names}


def test_csrc_includes_the_stable_abi_alone() -> None:
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert files
    for path in files:
        for include in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text()):
            assert not include.startswith(("ATen/", "c10/", "torch/extension", "torch/all", "pyb"))
            if include.startswith("torch/"):
                assert path.name == "common.h"
                assert include.startswith(("torch/csrc/stable/", "torch/headeronly/"))


def test_readme_tree_is_the_real_one() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    entries = {name.partition("/")[0] + ("/" if "/" in name else "") for name in listed}
    shown = {name for name in entries if name[0] != "." and name != "README.md"}
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.S | re.M)
    assert blocks, "the README has no fenced block that shows the tree"
    tree = max(blocks, key=lambda block: sum(entry in block for entry in shown))
    named = set(re.findall(r"(?<!\S)[.\w][\w.-]*/?", tree))
    assert shown <= named, f"the README's tree lacks {sorted(shown - named)}"
    first = set(re.findall(r"^[.\w][\w.-]*/?", tree, re.M))
    assert first <= entries, f"the README's tree names {sorted(first - entries)}, not in the tree"
