"""Test that batches come in order, alike for any number of threads, and survive bad rows."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from opensora.data.batch import Batch, Entry, Sample, SampleError, Size
from opensora.data.buckets import Buckets
from opensora.data.loader import Loader, pad_states
from opensora.data.quarantine import FILE_NAME, Quarantine, UnreadableError
from opensora.data.sampler import BatchSampler, FixedSampler
from opensora.errors import UsageError

CONFIG = {"144p": {1: (1.0, 3), 17: (0.7, 2)}}


class Rows:
    """Rows whose content says what was asked for; some fail, some take their time."""

    def __init__(self, count: int = 40, bad: dict[int, SampleError] | None = None) -> None:
        shapes = [(30, 144, 256), (1, 144, 256), (40, 192, 192)]
        self.rows = [Entry(f"row {i}", *shapes[i % 3]) for i in range(count)]
        self.bad = bad or {}
        self.loads: Counter[int] = Counter()
        self.slow = False

    def entries(self) -> list[Entry]:
        return self.rows

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        self.loads[index] += 1
        if self.slow:
            time.sleep(random.Random(index).random() / 200)
        if index in self.bad:
            raise self.bad[index]
        return Sample(
            video=torch.tensor([index, size.frames, rng.random()]),
            text=f"caption {index}",
            fps=24.0 + index,
        )


def loader(rows: Rows, *, shares: int = 1, **settings: object) -> Loader:
    sampler = BatchSampler(rows.entries(), Buckets(CONFIG), seed=3, replicas=shares)
    return Loader(rows, sampler, seed=3, **{"epochs": 3, **settings})  # type: ignore[arg-type]


def told(batch: Batch) -> tuple[object, ...]:
    """Return all that a batch holds in a form that can be compared."""
    video = None if batch.video is None else batch.video.tolist()
    conditions = {name: value.tolist() for name, value in batch.conditions.items()}
    head = batch.number, batch.epoch, batch.bucket, tuple(batch.names), batch.size
    return (*head, str(video), str(batch.text), str(conditions), str(batch.failed))


def test_batches_do_not_depend_on_the_number_of_threads() -> None:
    bad = {4: SampleError("torn"), 7: UnreadableError("gone")}
    runs = []
    for workers, prefetch in ((0, 1), (1, 1), (2, 3), (5, 2)):
        rows = Rows(bad=bad)
        rows.slow = workers > 0
        runs.append([told(b) for b in loader(rows, workers=workers, prefetch=prefetch).batches()])
    assert len(runs[0]) > 20
    assert all(run == runs[0] for run in runs[1:])


def test_any_cursor_gives_the_remaining_batches() -> None:
    whole = [told(batch) for batch in loader(Rows(), workers=0).batches()]
    for first in range(0, len(whole) + 1, 5):
        rest = [told(batch) for batch in loader(Rows(), workers=2).batches(first)]
        assert rest == whole[first:]


def test_two_processes_share_what_one_takes() -> None:
    one = [told(b) for b in loader(Rows(), shares=2, workers=0).batches()]
    first, second = (
        [told(b) for b in loader(Rows(), shares=2, rank=r, replicas=2, workers=0).batches()]
        for r in (0, 1)
    )
    assert one[0::2] == first
    assert one[1::2] == second
    both = loader(Rows(), shares=2, rank=1, replicas=2)
    assert sum(both.steps_per_epoch(epoch) for epoch in range(3)) == len(second)
    rest = [told(b) for b in loader(Rows(), shares=2, rank=1, replicas=2, workers=2).batches(6)]
    assert rest == second[3:]


def test_what_is_random_comes_from_seed_epoch_and_row() -> None:
    random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state()
    batch = next(iter(loader(Rows(), workers=2).batches()))
    assert random.getstate() == states[0]
    assert torch.get_rng_state().equal(states[1])
    row = int(batch.video[0, 0])
    assert batch.video[0, 2] == pytest.approx(random.Random(f"3/0/{row}").random())
    again = {}
    for other in loader(Rows(), workers=0).batches():
        for index, _, draw in other.video.tolist():
            again.setdefault(index, set()).add(draw)
    assert max(len(draws) for draws in again.values()) == 3  # anew every epoch


def test_batches_tell_the_model_sizes_and_rates() -> None:
    batch = next(b for b in loader(Rows(), workers=0).batches() if b.size.frames == 17)
    count = len(batch)
    assert {name: value.shape for name, value in batch.conditions.items()} == dict.fromkeys(
        ("num_frames", "height", "width", "ar", "fps"), (count,)
    )
    assert batch.conditions["num_frames"].tolist() == [17.0] * count
    assert batch.conditions["ar"][0] == pytest.approx(batch.size.height / batch.size.width)
    assert batch.conditions["fps"].tolist() == [24 + float(v[0]) for v in batch.video]
    assert all(value.dtype == torch.float32 for value in batch.conditions.values())


def test_bad_rows_are_dropped_named_and_written_down(tmp_path: Path) -> None:
    rows = Rows(bad={4: SampleError("torn at 5"), 7: UnreadableError("gone")})
    run = loader(rows, workers=2, quarantine=Quarantine(tmp_path))
    failed = [(b.number, b.failed) for b in run.batches() if b.failed]
    assert {name for _, named in failed for name in named} == {"row 4", "row 7"}
    for batch in loader(rows, workers=0).batches():
        assert "row 4" not in batch.names
        assert len(batch) == len(batch.video) == len(batch.conditions["fps"])
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert sorted((line["name"], line["reason"], line["unreadable"]) for line in lines) == [
        ("row 4", "torn at 5", False),
        ("row 7", "gone", True),
    ]


def test_unreadable_rows_are_read_once_even_over_restarts(tmp_path: Path) -> None:
    bad = {4: SampleError("torn"), 7: UnreadableError("gone")}
    rows = Rows(bad=bad)
    before = [told(b) for b in loader(rows, workers=2, quarantine=Quarantine(tmp_path)).batches()]
    assert rows.loads[7] == 1
    assert rows.loads[4] > 1
    rows = Rows(bad=bad)
    after = [told(b) for b in loader(rows, workers=2, quarantine=Quarantine(tmp_path)).batches()]
    assert rows.loads[7] == 0
    assert after == before
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"name": "row 9", "reas')  # a crash
    assert len(Quarantine(tmp_path)) == 2


def test_a_batch_that_failed_whole_keeps_the_step() -> None:
    rows = Rows(bad={i: SampleError("torn") for i in range(0, 40, 3)})
    batches = list(loader(rows, workers=2).batches())
    empty = [batch for batch in batches if len(batch) == 0]
    assert empty
    assert all(b.video is None and b.failed and b.conditions["fps"].shape == (0,) for b in empty)
    assert [batch.number for batch in batches] == list(range(len(batches)))


def test_an_epoch_that_failed_whole_is_an_error() -> None:
    rows = Rows(bad={i: SampleError("the disk is gone") for i in range(40)})
    with pytest.raises(UsageError, match=r"no row of .* could be read.*the disk is gone"):
        list(loader(rows, workers=2).batches())


def test_faults_of_a_dataset_are_not_hidden() -> None:
    class Broken(Rows):
        def load(self, index: int, size: Size, rng: random.Random) -> Sample:
            raise ZeroDivisionError("a fault")

    for workers in (0, 2):
        with pytest.raises(ZeroDivisionError):
            list(loader(Broken(), workers=workers).batches())


def test_reading_ahead_is_bounded_and_ends_with_its_user() -> None:
    threads = set(threading.enumerate())
    rows = Rows(count=200)
    inside = torch.get_num_threads()
    batches = loader(rows, workers=3, prefetch=2).batches()
    taken = [next(batches) for _ in range(3)]
    time.sleep(0.2)
    # Three batches were taken, two wait; a batch holds at most three rows.
    assert sum(rows.loads.values()) <= 5 * 3
    assert len(taken) == 3
    assert len(set(threading.enumerate()) - threads) == 3
    batches.close()
    assert set(threading.enumerate()) == threads
    assert torch.get_num_threads() == inside


def test_threads_work_alone() -> None:
    class Counting(Rows):
        def load(self, index: int, size: Size, rng: random.Random) -> Sample:
            return Sample(video=torch.tensor([torch.get_num_threads()]))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for batch in loader(Counting(), workers=2, epochs=1).batches():
            assert (batch.video == 1).all()
        assert torch.get_num_threads() == 2
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [2]
    finally:
        torch.set_num_threads(before)


INTERRUPTED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from opensora.data.batch import Entry, Sample, Size
from opensora.data.loader import Loader
from opensora.data.sampler import FixedSampler
import torch

class Slow:
    reads = 0
    def entries(self):
        return [Entry(str(i), 20, 64, 64) for i in range(1000)]
    def load(self, index, size, rng):
        Slow.reads += 1
        time.sleep(0.001 if Slow.reads <= 50 else 0.5)
        return Sample(video=torch.zeros(1))

rows = Slow()
for batch in Loader(rows, FixedSampler(rows.entries(), Size(16, 32, 32), 50), workers=2).batches():
    print("batch", flush=True)
"""


def test_an_interrupt_ends_the_process_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, Path(__file__).parents[2]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "batch\n"
        asked = time.monotonic()
        while process.poll() is None and time.monotonic() - asked < 20:
            # Again: Python swallows an interrupt that comes while it clears an object away.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        # A hundred rows wait at 0.5 s each in two threads; none of them is read any more.
        assert process.poll() is not None
        assert time.monotonic() - asked < 15
        assert "KeyboardInterrupt" in process.stderr.read()
    finally:
        process.kill()


def test_states_are_padded() -> None:
    states, mask = pad_states([torch.ones(2, 4), torch.full((5, 4), 2.0)])
    assert states.shape == (2, 1, 5, 4)
    assert states[0, 0].sum() == 8
    assert mask.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 1}, r"rank must lie in 0 \.\.\. 0"),
        ({"replicas": 2}, "multiple of the 2"),
        ({"workers": -1}, "num_workers"),
        ({"prefetch": 0}, "prefetch"),
    ],
)
def test_rejects_what_does_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loader(Rows(), **settings)


def test_an_empty_epoch_is_an_error() -> None:
    rows = Rows(count=2)
    run = Loader(rows, FixedSampler(rows.entries(), Size(16, 32, 32), 5))
    assert run.steps_per_epoch() == 0
    with pytest.raises(UsageError, match="hold no batch"):
        next(run.batches())
