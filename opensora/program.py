"""Run a program so that a user sees one sentence for a failure, and never a traceback.

Exit status: 0 success, 1 a fault in this package, 2 usage, 3 weights, 4 does not fit,
5 non-finite values, 6 another process gone or late, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from opensora.errors import DoesNotFitError, OpenSoraError

INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141

_INTERRUPTION = "interrupted; nothing partial was left"
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def run_program(main: Callable[[], int]) -> int:
    """Call `main` and return its exit status, or the one of the failure that ended it.

    Failures are one line on stderr that begins with "error: ". OPENSORA_TRACEBACK=1 adds the
    traceback.
    """
    with _signals_raise():
        try:
            status = main()
            sys.stdout.flush()
            return status
        except BaseException as error:
            # A library may have turned the interruption into an error of its own.
            return _report(_requests[-1] if _requests else error)


def _report(error: BaseException) -> int:
    """Say what ended the program and return its exit status."""
    status = OpenSoraError.exit_code
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else 0
        case KeyboardInterrupt():
            _say(_INTERRUPTION, None)
            return INTERRUPTED
        case BrokenPipeError():
            # The reader has gone. Python would complain again when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        case OpenSoraError():
            status = error.exit_code
            message = str(error)
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            message = f"{where}{error.strerror or error}"
        case _ if _is_out_of_memory(error):
            status = DoesNotFitError.exit_code
            message = (
                "the machine ran out of memory; ask for fewer frames, a smaller size or a smaller "
                "--batch-size, or use --dtype bf16"
            )
        case _:
            message = (
                f"unexpected {type(error).__name__}: {error}; this is a fault of opensora. Run "
                "again with OPENSORA_TRACEBACK=1 and report what it prints"
            )
    _say(f"error: {message}", error)
    return status


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell Python's and torch's ways to say that there is no memory left."""
    known = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return known or isinstance(error, MemoryError)


def _say(message: str, error: BaseException | None) -> None:
    """Print one line to stderr, after the traceback if it was asked for."""
    if error is not None and os.environ.get("OPENSORA_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    print(" ".join(message.split()), file=sys.stderr)


def leave_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, while there is nothing to clean up: during imports.

    `run_program` takes over from there.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{_INTERRUPTION}\n".encode())
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def stop_if_requested() -> None:
    """Raise again what Ctrl-C or SIGTERM raised, if anything swallowed it.

    Some modules of torch and transformers catch every exception while they are imported. Programs
    call this between their steps.
    """
    if _requests:
        raise _requests[-1]


_requests: list[BaseException] = []


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise, so that temporary files are removed, and remember that."""

    def stop(number: int, frame: FrameType | None) -> None:
        interrupted = number == signal.SIGINT
        _requests.append(KeyboardInterrupt() if interrupted else SystemExit(TERMINATED))
        raise _requests[-1]

    _requests.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the business of whoever runs us in a thread
        return
    # A shell starts background jobs with Ctrl-C ignored; that stays so.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    report = sys.unraisablehook

    def hide_requests(event: sys.UnraisableHookArgs) -> None:
        # Raised inside a __del__ it cannot go on from there; `stop_if_requested` sees it.
        if event.exc_value not in _requests:
            report(event)

    sys.unraisablehook = hide_requests
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)
