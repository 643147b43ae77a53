"""Tell the builds of GPU kernels apart, and keep which of them passed.

A kernel is known by its op, the architecture of the device, the dtype and its version, a hash of
its source and of what compiles it. Records are results of `make gpu`, `bench/baselines/<gpu>.json`;
a wheel carries them as `opensora/verified.json`. The cache is the user's own, in the folder
`$XDG_CACHE_HOME/opensora/verified` or `~/.cache/opensora/verified`, one file for each verdict:
nothing is read, changed and written back, so processes lose no entry of each other. A cache that
cannot be read or written, and a record that makes no sense, cost a check and nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opensora.errors import OpenSoraError
from opensora.files import write_text

PACKAGE = Path(__file__).parent


class Kernel(NamedTuple):
    """Name what is trusted or not.

    Attributes:
        family: The op's file: "qk_norm_rope" with its forward, backward and variants.
        architecture: "sm_90".
        dtype: "bfloat16".
        version: "triton-3.7.1-0123456789abcdef"; "" where none can be told.
    """

    family: str
    architecture: str
    dtype: str
    version: str


class Verdict(NamedTuple):
    """Hold whether a kernel is trusted.

    Attributes:
        by: "record", "cache" or "this run"; "" if it could not be checked now.
        problem: What is wrong, in words; None if the kernel is trusted.
    """

    by: str
    problem: str | None

    @property
    def is_final(self) -> bool:
        """Tell whether it holds for the rest of the process."""
        return self.by != ""


def architecture(device: torch.device) -> str:
    """Name what code is compiled for: "sm_90", on AMD "gfx90a..."; elsewhere the device's type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def describe(
    family: str, version: Callable[[], str], device: torch.device, dtype: torch.dtype
) -> Kernel:
    """Name the kernel that would serve a dtype on a device."""
    found = ""
    with suppress(OSError, ImportError, SyntaxError):  # no source: then nothing vouches for it
        found = version()
    return Kernel(family, architecture(device), str(dtype).removeprefix("torch."), found)


def vouch(kernel: Kernel) -> Verdict | None:
    """Return what records and the cache say of a kernel; None if it must be checked."""
    if not kernel.version:
        return None
    cached = _recall(kernel)
    if cached is not None and not cached["passed"]:
        broke = f"an earlier check broke the GPU's context: {cached.get('problem')}"
        return Verdict("cache", broke) if cached.get("fatal") else None
    if kernel in records():
        return Verdict("record", None)
    return None if cached is None else Verdict("cache", None)


def triton_version(family: str) -> str:
    """Return the version of an op's Triton kernels.

    It covers the kernels' source and Triton, whose compiler brings its own assembler. torch is left
    out: a kernel's code does not depend on it, and what launchers call of it is tested elsewhere.

    Raises:
        ImportError: Triton cannot be imported.
        OSError: The source is not there.
    """
    import triton

    return f"triton-{triton.__version__}-{digest(sources(family))}"


def digest(files: list[Path]) -> str:
    """Hash the names and contents of files."""
    total = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        total.update(f"{path.name} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]


def sources(family: str) -> list[Path]:
    """List an op's Triton file, every kernel file it imports, and what these import of the ops."""
    found: set[Path] = set()
    waiting = [PACKAGE / "kernels" / f"{family}.py"]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.parent.name == "kernels":
            waiting += [p for p in _imported(path) if p.is_file()]
    return sorted(found)


def _imported(path: Path) -> Iterator[Path]:
    """Yield where the modules of `opensora.kernels` and `opensora.ops` that a file imports lie."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                top, *parts = name.split(".")
                if top == "opensora" and parts[:1] in (["kernels"], ["ops"]) and len(parts) == 2:
                    yield PACKAGE.joinpath(*parts).with_suffix(".py")


@cache
def records() -> frozenset[Kernel]:
    """Return the kernels that passed their bench, from a checkout or from the wheel's record."""
    checkout = PACKAGE.parent
    if (checkout / "CMakeLists.txt").is_file():
        files = sorted((checkout / "bench/baselines").glob("*.json"))
        documents = [read_json(path) for path in files]
        tables = [d.get("verified") for d in documents if isinstance(d, dict)]
    else:
        shipped = read_json(PACKAGE / "verified.json")
        tables = list(shipped.values()) if isinstance(shipped, dict) else []
    return frozenset(kernel for table in tables for kernel in _passed(table))


def _passed(table: Any) -> Iterator[Kernel]:
    """Yield the kernels of a record that passed; entries that are malformed vouch for nothing."""
    for family, entry in table.items() if isinstance(table, dict) else ():
        if isinstance(entry, dict) and entry.get("passed") is True:
            dtypes = entry.get("dtypes")
            for dtype in dtypes if isinstance(dtypes, list) else ():
                yield Kernel(
                    family, str(entry.get("architecture")), str(dtype), str(entry.get("version"))
                )


def cache_folder() -> Path | None:
    """Return where verdicts are kept; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "opensora/verified"
    with suppress(RuntimeError):
        return Path.home() / ".cache/opensora/verified"
    return None


def remember(kernel: Kernel, problem: str | None, *, is_fatal: bool = False) -> None:
    """Keep a verdict in the cache, if that can be written."""
    path = _path(kernel)
    if path is not None:
        entry: dict[str, Any] = {"passed": problem is None}
        if problem is not None:
            entry |= {"problem": problem, "fatal": is_fatal}
        with suppress(OpenSoraError):
            write_text(path, json.dumps(entry) + "\n")


def _recall(kernel: Kernel) -> dict[str, Any] | None:
    """Return the cache's entry; None if there is none that makes sense."""
    path = _path(kernel)
    entry = None if path is None else read_json(path)
    known = isinstance(entry, dict) and isinstance(entry.get("passed"), bool)
    return entry if known else None


def _path(kernel: Kernel) -> Path | None:
    folder = cache_folder()
    if folder is None or not kernel.version:
        return None
    return folder / (re.sub(r"[^\w.+-]", "_", "-".join(kernel)) + ".json")


def read_json(path: Path) -> Any:
    """Return the JSON value of a file; None if there is none."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text("utf-8"))
    return None
