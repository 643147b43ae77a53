"""Run a program so that a user sees one sentence for a failure, and never a traceback.

Exit status: 0 success, 1 a fault in this package, 2 usage, 3 weights, 4 does not fit,
5 non-finite values, 130 interrupted, 143 terminated.
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

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def run_program(main: Callable[[], int]) -> int:
    """Call `main` and return its exit status, or the one of the failure that ended it.

    Failures are one line on stderr that begins with "error: ". OPENSORA_TRACEBACK=1 adds the
    traceback.
    """
    with _unwinding_when_terminated():
        return _status(main)


def _status(main: Callable[[], int]) -> int:
    try:
        status = main()
        sys.stdout.flush()
        return status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        _say("interrupted; nothing partial was left", None)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OpenSoraError as error:
        _say(f"error: {error}", error)
        return error.exit_code
    except MemoryError as error:
        return _no_memory(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror or error}", error)
        return OpenSoraError.exit_code
    except Exception as error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY):
            return _no_memory(error)
        _say(
            f"error: unexpected {type(error).__name__}: {error}; this is a fault of opensora. Run "
            "again with OPENSORA_TRACEBACK=1 and report what it prints",
            error,
        )
        return OpenSoraError.exit_code


def _no_memory(error: BaseException) -> int:
    _say(
        "error: the machine ran out of memory; ask for fewer frames, a smaller size or a smaller "
        "--batch-size, or use --dtype bf16",
        error,
    )
    return DoesNotFitError.exit_code


def _say(message: str, error: BaseException | None) -> None:
    """Print one line to stderr, after the traceback if it was asked for."""
    if error is not None and os.environ.get("OPENSORA_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    print(" ".join(message.split()), file=sys.stderr)


@contextmanager
def _unwinding_when_terminated() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that temporary files are removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the business of whoever runs us in a thread
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
