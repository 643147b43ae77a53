"""Let all ranks go on or fail together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")
_Outcome = tuple[T | None, Exception | None]


class Ranks:
    """Tell processes of each other's results and errors.

    Args:
        rank, world_size: of this process; 1 needs no `torch.distributed`.
        group: of all of them, for CPU objects; None makes one, which all must do at once.
    """

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world_size, self.group = rank, world_size, group
        if world_size > 1 and group is None:
            # Writing may take one rank far longer than another.
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def on_first(self, action: Callable[[], T]) -> T:
        """Return on all ranks what rank 0 found, or raise its error on all."""
        results = [_attempt(action) if self.rank == 0 else (None, None)]
        if self.world_size > 1:
            assert self.group is not None
            source = dist.get_global_rank(self.group, 0)
            dist.broadcast_object_list(results, source, group=self.group)
        return _result(results)

    def on_all(self, action: Callable[[], T]) -> T:
        """Return what this rank found, or raise on all ranks the first error of any."""
        mine = _attempt(action)
        others: list[_Outcome[T]] = []
        if self.world_size > 1:
            others = [(None, None)] * self.world_size
            dist.all_gather_object(others, (None, mine[1]), group=self.group)
        return _result([mine, *others])


def first_failure(error: BaseException) -> BaseException:
    """Return the error that a rank met, out of what torch.distributed.checkpoint wraps it in."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _attempt(action: Callable[[], T]) -> _Outcome[T]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _result(outcomes: list[_Outcome[T]]) -> T:
    for _, error in outcomes:
        if error is not None:
            raise error
    return cast(T, outcomes[0][0])
