"""Record what a launcher would launch, and compile it for GPUs that need not be here.

A launcher called on meta tensors chooses grid, constants and warps as it would on a GPU; `record`
notes them instead of launching, and `Launch.compile` counts what the compiled kernel uses. Nothing
is timed and no device is asked.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

CAPABILITIES = (80, 90, 100)
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_POINTERS = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Resources:
    """Count what a compiled Triton kernel uses, per thread and per program.

    Attributes:
        registers: Of a thread.
        spills: Instructions that load from or store to local memory.
        shared: Bytes of shared memory.
        barriers: Block-wide barrier instructions.
        accesses: Kinds of global loads and stores: "LDG.E.128", ...
        matrix: Kinds of matrix instructions: "HMMA", "HGMMA", "UTCHMMA".
        macs: Multiply-accumulates of the products in the program's text, each counted once.
        instructions: Length of the assembly.
        seconds: Compile time, 0.0 if Triton had the kernel in its cache.
    """

    registers: int
    spills: int
    shared: int
    barriers: int
    accesses: frozenset[str]
    matrix: frozenset[str]
    macs: int
    instructions: int
    seconds: float

    @classmethod
    def of(
        cls, usage: str, assembly: str, shared: int = 0, macs: int = 0, seconds: float = 0.0
    ) -> Resources:
        """Count in what `cuobjdump -res-usage` and `nvdisasm` say of one kernel."""
        found = re.search(r"REG:(\d+) .*?SHARED:(\d+)", usage)
        assert found is not None, usage
        return cls(
            registers=int(found[1]),
            spills=len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
            shared=max(int(found[2]), shared),
            barriers=len(re.findall(r"\bBAR\.", assembly)),
            accesses=frozenset(re.findall(r"\b(?:LDG|STG|LDGSTS)\.E(?:\.\w+)*", assembly)),
            matrix=frozenset(re.findall(r"\b(?:UTC)?H[G]?MMA\b|\bUTCHMMA\b", assembly)),
            macs=macs,
            instructions=len(re.findall(r"^\s+/\*[0-9a-f]+\*/.*;", assembly, re.M)),
            seconds=round(seconds, 1),
        )


@dataclass(frozen=True)
class Launch:
    """Hold one launch: what Triton specialises on, and the grid."""

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the kernel's function."""
        return str(self.kernel.fn.__name__)

    def compile(self, capability: int) -> Resources:
        """Compile for compute capability 80, 90 or 100 and count; see `Resources`."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        source = ASTSource(
            self.kernel,
            self.signature,
            constexprs=self.constants,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned},
        )
        started = time.perf_counter()
        with mock.patch.object(triton.compiler.compiler, "driver", mock.MagicMock()):
            compiled = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options=self.options
            )
        seconds = time.perf_counter() - started
        usage, assembly = _disassemble(compiled.asm["cubin"])
        macs = _macs(compiled.asm["ttir"])
        return Resources.of(usage, assembly, compiled.metadata.shared, macs, seconds)


def record(launcher: Callable[[], object]) -> list[Launch]:
    """Call a function and return, in order, the Triton launches that it would have made.

    Args:
        launcher: Calls a launcher of `opensora.kernels` on meta tensors.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        bound = kernel.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        shape = grid(bound.arguments) if callable(grid) else grid
        launches.append(_specialise(kernel, tuple(shape), bound.arguments, options))

    with mock.patch.object(JITFunction, "run", note):
        launcher()
    return launches


def _specialise(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]
) -> Launch:
    """Sort arguments as Triton does: 1 and None are constants, multiples of 16 are marked."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        special = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (special and type(value) is int and value == 1)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            aligned.append(name)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    return Launch(kernel, grid, signature, constants, tuple(aligned), options)


def _macs(ttir: str) -> int:
    """Sum M * N * K over the `tt.dot` of a program."""
    total = 0
    for m, k, n in re.findall(r"tt\.dot .*?: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", ttir):
        total += int(m) * int(n) * int(k)
    return total


def disassemble(cubin: bytes) -> dict[str, Resources]:
    """Count what every kernel of a cubin uses; keys are its symbols."""
    usage, assembly = _disassemble(cubin)
    lines = dict(re.findall(r"^ Function (\w+):\n(.*)$", usage, re.M))
    _, *sections = re.split(r"^\.text\.(\w+):$", assembly, flags=re.M)
    texts = dict(zip(sections[::2], sections[1::2], strict=True))
    return {symbol: Resources.of(lines[symbol], text) for symbol, text in texts.items()}


def cubins(library: Path) -> dict[str, bytes]:
    """Extract the cubins of a compiled library; keys end in their architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(_tools() / "cuobjdump"), "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        return {path.stem: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return (
            _output(_tools() / "cuobjdump", "-res-usage", file.name),
            _output(_tools() / "nvdisasm", "--print-code", file.name),
        )


@cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
