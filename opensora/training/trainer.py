"""Run training steps: batches in, weights out, everything that guards and records them around it.

A step takes `accumulation_steps` batches on every replica. Where a run is, is one number: the
number of the next batch. Checkpoints are taken between steps and hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from opensora.data.batch import Batch
from opensora.data.loader import Loader
from opensora.distributed.checkpoint import Checkpointer, Progress
from opensora.distributed.collectives import all_gather_object, all_reduce, watched
from opensora.errors import DoesNotFitError, NonFiniteError, UsageError
from opensora.training.ema import EMA
from opensora.training.learner import Learner
from opensora.training.metrics import Metrics
from opensora.training.objective import Losses
from opensora.training.place import find_place, place
from opensora.training.schedule import Schedule
from opensora.training.stopping import Stopping
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
        digest: of the plan of batches.
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
    digest: str = ""
    hooks: Sequence[tuple[int, Hook]] = ()
    #: Set once it is known at which step the run goes on.
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        """Begin at the beginning."""
        self.progress = Progress()
        self._stopping = Stopping(self._say)
        self._saved = -1  # step of the checkpoint that a rewind goes to
        self._good = "latest"  # and where it is: not always the newest of the folder
        self._noted = False  # whether the first loss was judged
        self._late = False  # whether one is due since a bad step
        self._rates = [group["initial_lr"] for group in self.learner.optimizer.param_groups]

    def resume(self, which: str) -> None:
        """Go on from a checkpoint: "latest" or a folder."""
        found = self.checkpointer.load(
            which, self.learner.modules, self.learner.optimizer, self.ema
        )
        if found is None:
            raise UsageError(f"{self.checkpointer.folder} holds no checkpoint to go on from")
        self.progress, self._saved, self._good = found, found.global_step, which
        self._noted = True
        # The configuration's rates, which may have been changed.
        for group, rate in zip(self.learner.optimizer.param_groups, self._rates, strict=True):
            group["initial_lr"] = rate
        extra = self.progress.extra
        self.learner.clip.load_state_dict(extra.get("clip", {}))
        self.watchdog.load_state_dict(extra["watchdog"])
        self.progress.batch, note = find_place(
            self.loader.sampler, found.batch, extra.get("place", {}), self.digest
        )
        if note is not None and self.learner.world.is_main:
            print(note, flush=True)

    def save(self, *, wait: bool = False) -> None:
        """Save where the run is.

        Raises:
            DoesNotFitError: no space is left, twice in a row.
        """
        self.progress.extra = {
            "clip": self.learner.clip.state_dict(),
            "watchdog": self.watchdog.state_dict(),
            "place": place(
                self.loader.sampler, self.progress.batch, self.loader.epochs, self.digest
            ),
        }
        learner = self.learner
        state = self.progress, learner.modules, learner.optimizer, self.ema
        try:
            self.checkpointer.save(*state, wait=wait)
        except DoesNotFitError:  # told when it happened; by now there may be room
            self.checkpointer.save(*state, wait=True)
        self._saved, self._good, self._late = self.progress.global_step, "latest", False

    def run(self) -> bool:
        """Take the remaining steps; False if a signal ended the run early, its state saved."""
        if self.progress.global_step >= self.total:
            self._say(f"all {self.total} steps are taken; raise --max-steps or --epochs for more")
        batches = self.loader.batches(self.progress.batch)
        self.metrics.start()
        with self._stopping.listening():
            while self.progress.global_step < self.total:
                with self.metrics.waiting():
                    taken = self._take(batches)
                if not taken:
                    self._end()
                    break
                with watched(f"step {self.progress.global_step}"):
                    verdict = self.step(taken)
                done = self.progress.global_step
                if verdict is Verdict.REWIND:
                    self._rewind()
                    continue
                stopping = self._stopping.agreed()
                self._late |= bool(self.ckpt_every) and done % self.ckpt_every == 0
                last = done == self.total
                # In a row of bad steps the weights are suspect: the next good one is waited for.
                if stopping or last or (self._late and self.watchdog.in_row == 0):
                    with self.metrics.paused():
                        self.save(wait=stopping or last)
                if stopping:
                    return False
                self._call(hook for every, hook in self.hooks if done % every == 0 or last)
        return True

    def _end(self) -> None:
        """Do at the end of the data, earlier than was reckoned, what the last step would have."""
        done = self.progress.global_step
        self._say(
            f"the data ended after step {done} of {self.total}: all epochs are over; raise "
            "--epochs for more"
        )
        if self._saved != done:
            self.save(wait=True)
        self._call(hook for every, hook in self.hooks if done % every)

    def _say(self, text: str) -> None:
        if self.learner.world.is_main:
            print(text, flush=True)

    def _call(self, hooks: Iterable[Hook]) -> None:
        for hook in hooks:
            with self.metrics.paused():
                hook(self.progress.global_step)

    def step(self, batches: list[Batch]) -> Verdict:
        """Take one step: gradients of all batches, then, if they are sound, the weights."""
        step = self.progress.global_step
        rate = self.schedule.set(self.learner.optimizer, step)
        self.learner.optimizer.zero_grad(set_to_none=True)
        means: list[float] = []
        tokens = flops = 0.0
        for number, batch in enumerate(batches, 1):
            self._sync_gradients(number == len(batches))
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
        # None of the step's rows could be read anywhere: momentum alone must not move the weights.
        empty = clipped.before == 0
        if verdict is Verdict.OK and not empty:
            self.learner.optimizer.step()
            self.ema.update()
        self.progress.batch = self._after(batches)
        if batches[-1].epoch != self.progress.epoch:
            self.progress.epoch, self.progress.step = batches[-1].epoch, 0
        self.progress.step += 1
        self.progress.global_step += 1
        loss = sum(means) / len(means) if means else float("nan")
        if means and not self._noted:
            self._noted = True
            if self.learner.world.is_main:
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
        return self._agree_on_rows(taken)

    def _agree_on_rows(self, batches: list[Batch]) -> list[Batch]:
        """Leave out rows that some process of a sequence group could not read.

        They share the tokens of a batch, which each of them read for itself.
        """
        group = self.learner.world.sequence_group
        if group is None:
            return batches
        failed = torch.tensor(float(sum(len(batch.failed) for batch in batches)))
        if not float(all_reduce(failed, "the rows that failed", "max", group)):
            return batches
        read = all_gather_object([batch.names for batch in batches], "the rows read", group)
        return [
            batch.keep(set.intersection(*(set(names[number]) for names in read)))
            for number, batch in enumerate(batches)
        ]

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
        if self._saved < 0:
            raise NonFiniteError(
                f"no checkpoint to go back to: losses were not finite from the first steps on, up "
                f"to step {self.progress.global_step}. The samples are in {self.watchdog.path}: "
                "take them out of the table if they are bad, else start again with half the --lr, "
                "a --warmup-steps, or --dtype fp32; --ckpt-every 100 saves places to go back to"
            )
        self.resume(self._good)
        self.progress.batch = batch
        self.watchdog.load_state_dict(watchdog)
