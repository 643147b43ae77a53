"""Read batches ahead of the training loop, in order, in threads.

Decoding, resizing and copying leave Python's lock, so threads read in parallel; they need no copy
of the table, no shared memory and no pickling, and a process that ends leaves none of them behind.
Measured on 2 cores, clips of 51 frames: two threads read 9 a second for 0.10 s of CPU each, a pool
of two processes 6 for 0.16 s. What comes out does not depend on their number.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from opensora.data.batch import Batch, Dataset, Entry, Sample, SampleError, Size
from opensora.data.quarantine import Quarantine
from opensora.data.sampler import Sampler, Step, steps
from opensora.data.workers import Pending, Workers
from opensora.errors import UsageError


class Loader:
    """Yield the batches of one data-parallel process.

    Args:
        dataset: rows.
        sampler: order; its `replicas` is a multiple of this one's.
        rank: of this process among those that read different batches.
        replicas: how many these are.
        workers: threads that read; 0 reads when a batch is asked for.
        prefetch: batches read ahead; with the one in use, prefetch + 1 are in memory.
        seed: of what is random in a sample.
        quarantine: where rows are set aside that cannot be read.
        epochs: where to end; endless if None.

    Raises:
        UsageError: the numbers do not go together.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        *,
        rank: int = 0,
        replicas: int = 1,
        workers: int = 2,
        prefetch: int = 2,
        seed: int = 1024,
        quarantine: Quarantine | None = None,
        epochs: int | None = None,
    ) -> None:
        if not 0 <= rank < replicas:
            raise UsageError(f"rank must lie in 0 ... {replicas - 1}, got {rank}")
        if sampler.replicas % replicas:
            raise UsageError(
                f"the sampler plans for {sampler.replicas} replicas; that must be a multiple of "
                f"the {replicas} of the loader"
            )
        if workers < 0 or prefetch < 1:
            raise UsageError(
                f"num_workers must be at least 0 and prefetch at least 1, got {workers} and "
                f"{prefetch}"
            )
        self.dataset, self.sampler = dataset, sampler
        self.rank, self.replicas = rank, replicas
        self.workers, self.prefetch, self.seed = workers, prefetch, seed
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self.epochs = epochs
        self.entries: Sequence[Entry] = dataset.entries()

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Return the number of batches that this process takes in an epoch."""
        return self.sampler.length(epoch) // self.replicas

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yield this process's batches in order.

        Args:
            first: number of a batch, over all replicas and epochs; begins with the first one of
                this process that is not before it. `Batch.number` tells where a run is; a run that
                took number n everywhere goes on with `first` = the last step's last number + 1.

        Raises:
            UsageError: there is nothing to read: an epoch without batches, or one in which every
                row of this process failed.
        """
        mine = (
            step
            for step in steps(self.sampler, first, self.epochs)
            if step.number % self.replicas == self.rank
        )
        barren = 0
        read = self._read_ahead(mine) if self.workers else map(self.read, mine)
        try:
            for batch in read:
                barren = 0 if len(batch) else barren + 1
                if barren and barren >= max(1, self.steps_per_epoch(batch.epoch)):
                    name, reason = next(iter(batch.failed.items()))
                    raise UsageError(
                        f"no row of a whole epoch, {barren} batches, could be read; the last: "
                        f"{name}: {reason}"
                    )
                yield batch
        finally:
            if isinstance(read, Iterator) and hasattr(read, "close"):
                read.close()

    def read(self, step: Step) -> Batch:
        """Read a batch in the calling thread."""
        return self._collate(step, [self._row(step, index) for index in step.batch.indices])

    def _read_ahead(self, plan: Iterator[Step]) -> Iterator[Batch]:
        """Read batches in threads, at most `prefetch` ahead of the one that was asked for."""
        waiting: deque[tuple[Step, list[Pending[Sample | SampleError]]]] = deque()
        with Workers(self.workers, "opensora-data") as workers:
            for step in plan:
                rows = [workers.submit(partial(self._row, step, i)) for i in step.batch.indices]
                waiting.append((step, rows))
                if len(waiting) > self.prefetch:
                    step, rows = waiting.popleft()
                    yield self._collate(step, [row.result() for row in rows])
            for step, rows in waiting:
                yield self._collate(step, [row.result() for row in rows])

    def _row(self, step: Step, index: int) -> Sample | SampleError:
        """Read one row; a failure is returned."""
        known = self.quarantine.unreadable.get(self.entries[index].name)
        if known is not None:
            return SampleError(known)
        # Not the process's generator, nor a thread's: a row is cut alike wherever it is read.
        rng = random.Random(f"{self.seed}/{step.epoch}/{index}")
        try:
            return self.dataset.load(index, step.batch.size, rng)
        except SampleError as error:
            self.quarantine.add(self.entries[index].name, error)
            return error

    def _collate(self, step: Step, rows: Sequence[Sample | SampleError]) -> Batch:
        """Make a batch of the rows that could be read."""
        names = [self.entries[index].name for index in step.batch.indices]
        samples = [row for row in rows if isinstance(row, Sample)]
        size = step.batch.size
        batch = Batch(
            number=step.number,
            epoch=step.epoch,
            bucket=step.batch.bucket,
            names=[n for n, row in zip(names, rows, strict=True) if isinstance(row, Sample)],
            size=size,
            conditions=conditions(size, [sample.fps for sample in samples]),
            failed={
                name: str(row)
                for name, row in zip(names, rows, strict=True)
                if isinstance(row, SampleError)
            },
        )
        if samples:
            batch.video = _stack([sample.video for sample in samples])
            batch.latent = _stack([sample.latent for sample in samples])
            if all(sample.states is not None for sample in samples):
                batch.states, batch.mask = pad_states([s.states for s in samples])  # type: ignore[misc]
            else:
                batch.text = [sample.text or "" for sample in samples]
        return batch


def conditions(size: Size, fps: Sequence[float]) -> dict[str, Tensor]:
    """Return what the model is told of clips of one size: name -> float32 [B]."""
    count = len(fps)
    told = {
        "num_frames": float(size.frames),
        "height": float(size.height),
        "width": float(size.width),
        "ar": size.height / size.width,
    }
    return {name: torch.full((count,), value) for name, value in told.items()} | {
        "fps": torch.tensor(list(fps), dtype=torch.float32)
    }


def pad_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack text states of several lengths.

    Args:
        states: [L, D] each.

    Returns:
        [B, 1, L, D] padded with zeros to the longest, and int64 [B, L], 1 where a token counts.
    """
    longest = max(len(state) for state in states)
    padded = states[0].new_zeros(len(states), 1, longest, states[0].shape[1])
    mask = torch.zeros(len(states), longest, dtype=torch.int64)
    for row, state in enumerate(states):
        padded[row, 0, : len(state)] = state
        mask[row, : len(state)] = 1
    return padded, mask


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack tensors if every sample has one."""
    given = [part for part in parts if part is not None]
    return torch.stack(given) if given and len(given) == len(parts) else None
