"""Name every failure a user can reach, with the exit status the programs return for it.

A message says what failed, where, why, and what to type next. Programs print it as one line and
never show a traceback for it. Standard statuses: 0 success, 2 usage, 3 weights, 4 does not fit,
5 non-finite values, 6 another process is gone or late, 130 interrupted.
"""

from __future__ import annotations


class OpenSoraError(Exception):
    """Report a failure that the user can act on."""

    exit_code = 1


class KernelWarning(RuntimeWarning):
    """Say that a kernel is wrong on this machine, and what serves instead; no program hides it."""


class UsageError(OpenSoraError, ValueError):
    """Report a wrong flag, configuration key, prompt, size or path."""

    exit_code = 2


class WeightsError(OpenSoraError):
    """Report weights that are missing, unreadable, unsafe or of another model."""

    exit_code = 3


class DoesNotFitError(OpenSoraError):
    """Report a request that exceeds the memory or disk at hand."""

    exit_code = 4


class NonFiniteError(OpenSoraError):
    """Report NaN or infinity in a latent or a frame, with the step and layer it came from."""

    exit_code = 5


class CollectiveError(OpenSoraError):
    """Report that processes of one run lost each other, with the call and the ranks missed."""

    exit_code = 6
