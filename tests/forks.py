"""Run scripts in processes forked from one that has imported everything: seconds of start saved.

As a program it is that process: it reads one JSON order a line and answers each with one line.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Fork:
    """A process that runs a script; what it prints is in a file.

    Attributes:
        pid: of the process.
        status: exit status once `wait` or `poll` has seen its end; below 0 for a signal.
    """

    def __init__(self, server: Forks, pid: int, path: Path) -> None:
        self.server, self.pid, self.path = server, pid, path
        self.status: int | None = None

    @property
    def printed(self) -> str:
        """Return what it has printed so far."""
        return self.path.read_text("utf-8", "replace")

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        if self.status is None:
            self.status = self.server.ask({"poll": self.pid})
        return self.status

    def wait(self, timeout: float = 100.0, until: str | None = None) -> int | None:
        """Wait for its end, or for it to print something; returns the exit status."""
        end = time.monotonic() + timeout
        while self.poll() is None and not (until and until in self.printed):
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout:g} s:\n{self.printed}")
            time.sleep(0.01)
        return self.status

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Forks:
    """Start processes; use it in a with block, or close it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, order: dict[str, Any]) -> Any:
        """Send an order and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script: Path, *argv: str, environ: dict[str, str] | None = None) -> Fork:
        """Run a script in a process of its own."""
        self.count += 1
        path = self.folder / f"{self.count}.txt"
        path.touch()
        order = {"script": str(script), "argv": argv, "environ": environ or {}, "out": str(path)}
        return Fork(self, self.ask(order), path)

    def ranks(self, size: int, script: Path, *argv: str, timeout: float = 100.0) -> list[str]:
        """Run a script on every rank, as torchrun would; returns what they printed."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environ = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = [
            self.start(script, *argv, environ={**environ, "RANK": rank, "LOCAL_RANK": rank})
            for rank in map(str, range(size))
        ]
        try:
            statuses = [fork.wait(timeout) for fork in started]
        finally:
            for fork in started:
                fork.send(signal.SIGKILL)
        printed = [fork.printed for fork in started]
        assert statuses == [0] * size, "\n\n".join(printed)
        return printed

    def close(self) -> None:
        """End the server and all it started."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def fork(order: dict[str, Any]) -> int:
    """Run a script in a fork; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        out = os.open(order["out"], os.O_WRONLY | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        os.environ.update(order["environ"])
        sys.argv = [order["script"], *order["argv"]]
        sys.path.insert(0, str(Path(order["script"]).parent))
        runpy.run_path(order["script"], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # a fork must not go on into its parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Import what training needs, then fork as ordered. No gradient is ever computed here."""
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import transformers

    import opensora.train
    import opensora.train_vae  # noqa: F401
    from opensora.models.text_encoder import T5TextEncoder

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    T5TextEncoder.byt5(max_length=8, d_model=8, d_ff=8, num_layers=1, num_heads=1)
    running: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            ended, status = os.waitpid(order["poll"], os.WNOHANG)
            running.discard(ended)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = fork(order)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
