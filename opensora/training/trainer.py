"""Run training steps: batches in, weights out, everything that guards and records them around it.

A step takes `accumulation_steps` batches on every replica. Where a run is, is one number: the
number of the next batch. Checkpoints are taken between steps and hold it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from opensora.data.batch import Batch
from opensora.data.loader import Loader
from opensora.distributed.checkpoint import Checkpointer, Progress
from opensora.distributed.collectives import all_reduce, watched
from opensora.errors import UsageError
from opensora.training.ema import EMA
from opensora.training.learner import Learner
from opensora.training.metrics import Metrics
from opensora.training.objective import Losses
from opensora.training.schedule import Schedule
from opensora.training.watchdog import Verdict, Watchdog, starting_note

#: Called between steps with the number of steps taken.
Hook = Callable[[int], None]


@dataclass
class Trainer:
    """Hold the parts of a run and take its steps.

    Attributes:
        learner: what takes a step.
        loader: of this process's batches.
        schedule: the learning rate's.
        ema: averages.
        watchdog: judges steps.
        checkpointer: saves.
        total: steps of the run.
        accumulation: batches a step.
        pretrained: it starts from trained weights.
        ckpt_every: steps between checkpoints; 0 saves at the end alone.
        flops: training FLOPs of a batch, for MFU.
        hooks: (every how many steps, function), such as validation.
        metrics: records steps.
    """

    learner: Learner
    loader: Loader
    schedule: Schedule
    ema: EMA
    watchdog: Watchdog
    checkpointer: Checkpointer
    total: int
    accumulation: int = 1
    pretrained: bool = False
    ckpt_every: int = 0
    flops: Callable[[Batch], float] = lambda batch: 0.0
    hooks: Sequence[tuple[int, Hook]] = ()
    #: Set once it is known at which step the run goes on.
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        """Begin at the beginning."""
        self.progress = Progress()
        self._stopping = threading.Event()
        self._rates = [group["initial_lr"] for group in self.learner.optimizer.param_groups]

    def resume(self, which: str) -> None:
        """Go on from a checkpoint: "latest" or a folder."""
        found = self.checkpointer.load(
            which, self.learner.modules, self.learner.optimizer, self.ema
        )
        if found is None:
            raise UsageError(f"{self.checkpointer.folder} holds no checkpoint to go on from")
        self.progress = found
        # The configuration's rates, which may have been changed.
        for group, rate in zip(self.learner.optimizer.param_groups, self._rates, strict=True):
            group["initial_lr"] = rate
        extra = self.progress.extra
        self.learner.clip.load_state_dict(extra.get("clip", {}))
        self.watchdog.load_state_dict(extra["watchdog"])

    def save(self, *, wait: bool = False) -> None:
        """Save where the run is."""
        self.progress.extra = {
            "clip": self.learner.clip.state_dict(),
            "watchdog": self.watchdog.state_dict(),
        }
        self.checkpointer.save(
            self.progress, self.learner.modules, self.learner.optimizer, self.ema, wait=wait
        )

    def run(self) -> bool:
        """Take the remaining steps; False if a signal ended the run early, its state saved."""
        first = self.progress.global_step
        if first >= self.total:
            self._say(f"all {self.total} steps are taken; raise --max-steps or --epochs for more")
        batches = self.loader.batches(self.progress.batch)
        self.metrics.start()
        with self._interruptible():
            while self.progress.global_step < self.total:
                with self.metrics.waiting():
                    taken = self._take(batches)
                if not taken:
                    self._finish(first)
                    break
                with watched(f"step {self.progress.global_step}"):
                    verdict = self.step(taken)
                done = self.progress.global_step
                if verdict is Verdict.REWIND:
                    self._rewind()
                    continue
                stopping = self._agree_to_stop()
                due = bool(self.ckpt_every) and done % self.ckpt_every == 0
                last = done == self.total
                if (due or stopping or last) and self.watchdog.in_row == 0:
                    with self.metrics.paused():
                        self.save(wait=stopping or last)
                if stopping:
                    return False
                for every, hook in self.hooks:
                    if done % every == 0 or last:
                        with self.metrics.paused():
                            hook(done)
        return True

    def _finish(self, first: int) -> None:
        """Save at the end of the data, before the last step that was reckoned with."""
        done = self.progress.global_step
        self._say(
            f"the data ended after step {done} of {self.total}: all epochs are over; raise "
            "--epochs for more"
        )
        if done == first:
            return
        if self.watchdog.in_row == 0:
            self.save(wait=True)
        for every, hook in self.hooks:
            if done % every:
                hook(done)

    def _say(self, text: str) -> None:
        if self.learner.world.is_main:
            print(text, flush=True)

    def step(self, batches: list[Batch]) -> Verdict:
        """Take one step: gradients of all batches, then, if they are sound, the weights."""
        step = self.progress.global_step
        rate = self.schedule.set(self.learner.optimizer, step)
        self.learner.optimizer.zero_grad(set_to_none=True)
        means: list[float] = []
        tokens = flops = 0.0
        for place, batch in enumerate(batches):
            self._sync_gradients(place + 1 == len(batches))
            losses = self._losses(batch)
            # The mean over batches and replicas, as one process with all of them would take it.
            (losses.loss.mean() / len(batches)).backward()
            if len(batch):
                means.append(float(losses.loss.detach().mean()))
                self.metrics.losses(losses.t, losses.loss)
                tokens += losses.tokens
                flops += self.flops(batch)
        clipped = self.learner.clip(
            p for m in self.learner.modules.values() for p in m.parameters()
        )
        verdict = self.watchdog.check(
            means,
            clipped.before,
            [name for batch in batches for name in batch.names],
            step,
            extreme=clipped.extreme,
            details={"batches": [batch.number for batch in batches], "bucket": batches[0].bucket},
        )
        if verdict is Verdict.OK:
            self.learner.optimizer.step()
            self.ema.update()
        self.progress.batch = self._after(batches)
        if batches[-1].epoch != self.progress.epoch:
            self.progress.epoch, self.progress.step = batches[-1].epoch, 0
        self.progress.step += 1
        self.progress.global_step += 1
        loss = sum(means) / len(means) if means else float("nan")
        if step == 0 and self.learner.world.is_main:
            print(starting_note(loss, pretrained=self.pretrained), flush=True)
        self.metrics.step(
            step,
            loss,
            grad_norm=clipped.before,
            lr=rate,
            tokens=tokens,
            flops=flops,
            bucket=batches[0].bucket,
        )
        return verdict

    def _losses(self, batch: Batch) -> Losses:
        """Return the losses of a batch; an empty one takes part with a weight of zero."""
        if len(batch):
            return self.learner.objective(batch)
        losses = self.learner.objective(self.learner.objective.stand_in(batch))
        return Losses(losses.loss * 0, losses.t, 0)

    def _take(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return the batches of a step, [] at the end of the data."""
        taken = []
        for _ in range(self.accumulation):
            batch = next(batches, None)
            if batch is None:
                return []
            taken.append(batch)
        return taken

    def _after(self, batches: list[Batch]) -> int:
        """Return the number of the batch that follows a step on all replicas."""
        replicas = self.learner.world.dp_size
        return (batches[-1].number // replicas + 1) * replicas

    def _sync_gradients(self, last: bool) -> None:
        """Leave gradients unreduced until the last batch of a step."""
        for module in self.learner.modules.values():
            switch = getattr(module, "set_requires_gradient_sync", None)
            if switch is not None:
                switch(last)

    def _rewind(self) -> None:
        """Go back to the last good weights, and on with the data."""
        batch, watchdog = self.progress.batch, self.watchdog.state_dict()
        self.checkpointer.wait()
        self.resume("latest")
        self.progress.batch = batch
        self.watchdog.load_state_dict(watchdog)

    def _agree_to_stop(self) -> bool:
        """Tell whether any process was asked to stop."""
        own = torch.tensor(float(self._stopping.is_set()))
        return bool(all_reduce(own, "the wish to stop", "max") > 0)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Save and end after this step on SIGTERM or SIGINT; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            self._stopping.set()
            self._say("stopping after this step; once more to stop at once")

        before: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, ask)
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
