"""The `opensora` program: `opensora generate ...`; alone it shows versions, devices and kernels."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

import torch

import opensora
from opensora.config_file import suggest
from opensora.errors import UsageError
from opensora.program import run_program

COMMANDS = {
    "generate": "clips and images from text",
    "export": "a training checkpoint as safetensors that generate loads",
    "data": "tables of clips: opensora data table, opensora data explain",
    "doctor": "check this installation: every kernel against its reference",
}

USAGE = "usage: opensora [COMMAND] [--help] [--version]\n\ncommands:\n" + "\n".join(
    f"  {name:<10} {text}" for name, text in COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "generate":
        from opensora.sample import main as generate

        return generate(words[1:])
    return run_program(lambda: _main(words))


def _main(words: list[str]) -> int:
    if not words:
        print(describe_installation())
    elif words[0] in ("-h", "--help", "help"):
        print(USAGE)
    elif words[0] == "doctor":
        return _doctor(words[1:])
    elif words[0] == "export":
        from opensora.export import main as export

        return export(words[1:])
    elif words[0] == "data":
        from opensora.data.program import run

        return run(words[1:])
    elif words[0] in ("-V", "--version"):
        print(f"opensora {opensora.__version__}")
    else:
        kind = "flag" if words[0].startswith("-") else "command"
        hint = suggest(words[0], [*COMMANDS, "--help", "--version"])
        raise UsageError(f"unknown {kind} {words[0]!r}{hint} (commands: {', '.join(COMMANDS)})")
    return 0


def _doctor(words: list[str]) -> int:
    from opensora import doctor

    if words in (["-h"], ["--help"]):
        print("usage: opensora doctor\n\n" + (doctor.__doc__ or ""))
        return 0
    if words:
        raise UsageError(f"opensora doctor takes no arguments, got {words[0]!r}")
    return doctor.main()


def describe_installation() -> str:
    """Return versions, devices, and which kernel serves each op on each of them."""
    from opensora import _extension
    from opensora.recipe import describe_device, describe_kernels

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    lines = [
        f"opensora {opensora.__version__}  torch {torch.__version__}  "
        f"python {platform.python_version()}  {platform.system()}",
        f"compiled kernels: {_extension.describe()[0]}",
        *(f"device {device}  ({describe_device(device)})" for device in devices),
    ]
    tables = {device.type: describe_kernels(device) for device in devices}
    width = max((len(name) for name in tables["cpu"]), default=0) + 2
    lines.append("")
    lines.append(f"{'op':<{width}}" + "".join(f"{name:<20}" for name in tables))
    for op in tables["cpu"]:
        lines.append(f"{op:<{width}}" + "".join(f"{table[op]:<20}" for table in tables.values()))
    lines.append("")
    lines.append('next: opensora generate --prompt "a red circle moving right"')
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
