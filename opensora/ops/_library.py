"""Define ops once, in Python, and decide which implementation serves a call.

An `Op` owns one schema of the `opensora` library. Its implementations come from three places:
the compiled library registers CPU kernels for it (`csrc/cpu/`), Triton launchers are imported on
the first CUDA call (`kernels/`), and where neither serves, the op's file calls its PyTorch
reference directly, so that autograd and Inductor see plain tensor operations. A GPU kernel serves
once it is trusted (`opensora/trust.py`); one that fails its check gives its place in the dispatcher
to the reference.

define/impl with a `torch.autograd.Function` costs 2.5 us a call without gradients; `custom_op`
with `register_autograd` costs 14.5 us (torch 2.13, CPU). One transformer forward makes hundreds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from opensora import _extension, trust, verified
from opensora.errors import UsageError

Mode = Literal["auto", "reference", "require"]
Language = Literal["Triton", "C++"]

_LIBRARY = torch.library.Library("opensora", "FRAGMENT")
_DTYPES = dict[str, tuple[torch.dtype, ...]]


def _mode_of_environment() -> Mode:
    """Return the mode that `OPENSORA_KERNELS` asks for; "auto" where it is not set."""
    asked = os.environ.get("OPENSORA_KERNELS", "auto")
    for mode in get_args(Mode):
        if asked == mode:
            return mode  # type: ignore[no-any-return]
    names = ", ".join(get_args(Mode))
    raise UsageError(f"OPENSORA_KERNELS={asked!r} is unknown: unset it, or choose one of {names}")


# Process-wide: "auto" takes a kernel where one serves, "reference" never takes one, "require"
# raises where none serves. `opensora.testing` changes it for a block of code.
mode: Mode = _mode_of_environment()


def _language_of_environment() -> Language:
    """Return the language that `OPENSORA_CUDA` asks for; "Triton" where it is not set."""
    asked = os.environ.get("OPENSORA_CUDA", "triton").lower()
    languages: dict[str, Language] = {"triton": "Triton", "c++": "C++"}
    if asked not in languages:
        raise UsageError(f"OPENSORA_CUDA={asked!r} is unknown: unset it, or choose triton or c++")
    if asked == "c++" and _extension.cuda_path is None:
        raise UsageError(
            "OPENSORA_CUDA=c++, but no CUDA kernels in C++ are loaded: "
            f"{_extension.why_no_cuda()}. Unset it, or build them (csrc/README.md)"
        )
    return languages[asked]


# Process-wide: which kernels serve on a GPU where both are written. Triton's, until a GPU has timed
# the others; what C++ does not take, Triton does.
cuda_language: Language = _language_of_environment()

# Triton's interpreter, which must be chosen before Triton is imported, runs kernels on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

registry: list[Op] = []


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define an operator of the `opensora` library, which something else implements."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"opensora::{schema.partition('(')[0]}", fake, lib=_LIBRARY)


class Op:
    """Define one op of the `opensora` library and remember which device runs which kernel.

    Args:
        schema: `name(arguments) -> returns` in torch's schema language.
        fake: Returns empty tensors of the op's output shapes, dtypes and layouts.
        dtypes: Device type -> dtypes that the kernel of that device accepts.
        reference: The op in plain PyTorch, with the schema's arguments and the fake's layouts: what
            serves where a GPU kernel is not trusted.
        cuda: `module:function` of the Triton launcher, imported on its first call.
        version: Returns what tells this build of the CUDA kernel from every other; None: the hash
            of its Triton source.
        decides: The argument whose dtype a kernel is trusted for; by default the first tensor.
        onednn: The op on a CPU by calls of oneDNN, where torch was built with it.
        native: Returns the arguments of the kernel in `csrc/cuda`, which is the overload `native`,
            or None where it does not take them. It serves where `cuda_language` is "C++".
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable[..., Any],
        dtypes: _DTYPES,
        reference: Callable[..., Any],
        cuda: str | None = None,
        version: Callable[[], str] | None = None,
        decides: str | None = None,
        onednn: Callable[..., Any] | None = None,
        native: Callable[..., tuple[Any, ...] | None] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.dtypes = dtypes
        self.reference = reference
        define(schema, fake)
        self._native = native
        if native is not None:
            define(schema.replace("(", ".native(", 1), fake)
        self.overload = getattr(torch.ops.opensora, self.name).default
        self.launcher = None if cuda is None else _imported_on_first_call(cuda)
        self.family = (cuda or "").partition(":")[0].rpartition(".")[2]
        self._decides = decides
        self.version = version or partial(verified.triton_version, self.family)
        if cuda is not None:
            _LIBRARY.impl(self.name, self.guard(), "CUDA")
        self._call = self.overload
        # Found now, not on the first call: that one may be traced, and Dynamo cannot look it up.
        self._kernels: dict[str, str] = {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"opensora::{self.name}", "CPU"):
            self._kernels["cpu"] = "C++"
        elif onednn is not None and torch.backends.mkldnn.is_available():
            _LIBRARY.impl(self.name, onednn, "CPU")
            self._kernels["cpu"] = "oneDNN"
        if cuda is not None and find_spec("triton") is not None:
            self._kernels["cuda"] = "Triton"
            if INTERPRETED and self.launcher is not None:
                self._kernels["cpu"], self._call = "Triton, interpreted", self._interpret
                dtypes.setdefault("cpu", (torch.float32,))  # its bfloat16 products are wrong
        registry.append(self)

    def __call__(self, *args: Any) -> Any:
        """Run the op through torch's dispatcher."""
        return self._call(*args)

    def _interpret(self, *args: Any) -> Any:
        """Run the launcher on CPU tensors; a graph takes the op, for nothing can trace Triton."""
        assert self.launcher is not None
        call = self.overload if torch.compiler.is_compiling() else self.launcher
        return call(*args)

    def guard(self) -> Callable[..., Any]:
        """Return what the dispatcher calls: the launcher where it is trusted, or the reference.

        `trust.judge` is asked once for a device and a dtype; after that the question costs 0.13 us.
        """
        arguments = self.overload._schema.arguments
        tensors = [argument.name for argument in arguments if str(argument.type) == "Tensor"]
        position = [argument.name for argument in arguments].index(self._decides or tensors[0])
        chosen: dict[int, dict[torch.dtype, Callable[..., Any]]] = defaultdict(dict)

        def call(*args: Any) -> Any:
            x = args[position]
            try:
                run = chosen[x.get_device()][x.dtype]
            except KeyError:
                run, is_final = self._choose(x)
                if is_final:
                    chosen[x.get_device()][x.dtype] = run
            return run(*args)

        return call

    def _choose(self, x: Tensor) -> tuple[Callable[..., Any], bool]:
        """Return what serves tensors like `x`, and whether it will for the rest of the process."""
        assert self.launcher is not None
        native = cuda_language == "C++"
        if trust.is_checking():
            native = trust.checked() == f"{self.family}.native"
        native = native and self._native is not None
        if trust.is_suspended():
            return self._launch_native if native else self.launcher, False
        if x.dtype not in self.dtypes.get(x.device.type, ()):  # a direct call: nothing claims it
            return self._refer, True
        if native:
            version = _extension.cuda_version
            verdict = trust.judge(f"{self.family}.native", version, x.device, x.dtype)
            if verdict.problem is None:
                return self._launch_native, True
        verdict = trust.judge(self.family, self.version, x.device, x.dtype)
        if verdict.problem is None:
            return self.launcher, True
        return partial(self._replace, verdict.problem), verdict.is_final

    def native(self, *args: Any) -> Any:
        """Run the kernel in `csrc/cuda`.

        Raises:
            NotImplementedError: There is none, or it does not take these arguments.
        """
        taken = None if self._native is None else self._native(*args)
        if taken is None or not args[0].is_cuda or _extension.cuda_path is None:
            raise NotImplementedError(f"{self.name}: no CUDA kernel in C++ for these arguments")
        return getattr(torch.ops.opensora, self.name).native(*taken)

    def _launch_native(self, *args: Any) -> Any:
        """Run the kernel in C++, or Triton's where it does not take the arguments."""
        assert self.launcher is not None
        assert self._native is not None
        taken = self._native(*args)
        if taken is None:
            return self.launcher(*args)
        return getattr(torch.ops.opensora, self.name).native(*taken)

    def _replace(self, problem: str, *args: Any) -> Any:
        """Run the reference instead of a kernel that is not trusted.

        Raises:
            NotImplementedError: Kernels are required.
        """
        if trust.is_suspended() and self.launcher is not None:
            return self.launcher(*args)
        if mode == "require":
            raise NotImplementedError(
                f"{self.name}: kernels are required, but this one is not trusted: {problem}. Set "
                "OPENSORA_KERNELS=auto to let the PyTorch reference serve."
            )
        return self._refer(*args)

    def _refer(self, *args: Any) -> Any:
        with torch.no_grad():  # as a kernel: autograd is the business of the op's Function
            return self.reference(*args)

    @property
    def has_native(self) -> bool:
        """Tell whether `csrc/cuda` has a kernel for this op."""
        return self._native is not None

    def kernel(self, device_type: str) -> str | None:
        """Return the language of the kernel that serves a device type; None if there is none."""
        return self._kernels.get(device_type)

    def serves(self, x: Tensor) -> bool:
        """Tell whether a call on `x` goes to a kernel (True) or to the reference (False).

        Raises:
            NotImplementedError: Kernels are required and none takes `x`.
        """
        if mode == "reference" and not trust.is_checking():
            return False
        device_type = x.device.type
        # Compiled, C++ and Triton stay opaque ops: they are the fusions, and faster than
        # Inductor's. oneDNN it calls itself; interpreted Triton is for tests that ask for it.
        compiling = device_type == "cpu" and torch.compiler.is_compiling()
        if mode == "auto" and compiling and self.kernel(device_type) != "C++":
            return False
        dtypes = self.dtypes.get(device_type, ())
        if x.dtype in dtypes and self.kernel(device_type) is not None:
            return True
        if mode == "require" and not trust.is_checking():  # a check needs the reference too
            raise NotImplementedError(
                f"{self.name}: no kernel for {x.dtype} on {device_type!r}, and kernels are "
                f"required. Kernels here: {self.describe()}. Set OPENSORA_KERNELS=auto to let "
                "the PyTorch reference serve."
            )
        return False

    def describe(self) -> str:
        """Return the kernels of this installation in words, device by device."""
        words = []
        for device, dtypes in self.dtypes.items():
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            kernel = self.kernel(device)
            words.append(f"{device}: " + (f"{kernel} for {names}" if kernel else "none installed"))
        return "; ".join(words)


def _imported_on_first_call(target: str) -> Callable[..., Any]:
    """Return a function that imports `module:function` when called, so that importing is cheap."""
    module, _, name = target.partition(":")
    found: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal found
        if (
            found is None
        ):  # asked here: `import_module` costs 0.6 us even where it has nothing to do
            found = getattr(import_module(module), name)
        return found(*args)

    return call


def needs_grad(*tensors: Tensor | None) -> bool:
    """Tell whether autograd must record this call; if not, the `autograd.Function` is skipped."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
