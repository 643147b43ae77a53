"""Check what happens to steps with NaN or infinity, alone and among several processes."""

from __future__ import annotations

import json
import math

import pytest

from opensora.errors import NonFiniteError
from opensora.training.watchdog import Verdict, Watchdog, starting_note


def test_good_steps_pass_and_leave_no_file(tmp_path):
    dog = Watchdog(tmp_path)
    assert dog.check(0.5, 1.0, ["a"], 0) is Verdict.OK
    assert not dog.path.exists()


@pytest.mark.parametrize("loss", [math.nan, math.inf, [0.5, -math.inf]])
def test_a_bad_loss_is_skipped_and_its_samples_are_named(tmp_path, loss):
    dog = Watchdog(tmp_path)
    details = {"batch": 17, "bucket": "240p 51"}
    assert dog.check(loss, math.nan, ["a.mp4", "b.mp4"], 3, details=details) is Verdict.SKIP
    line = json.loads(dog.path.read_text())
    assert (line["step"], line["samples"], line["batch"]) == (3, ["a.mp4", "b.mp4"], 17)
    assert line["grad_norm"] == "nan"
    assert dog.check(0.5, 1.0, ["a.mp4"], 4) is Verdict.OK
    assert dog.in_row == 0
    assert dog.total == 1


def test_a_bad_or_extreme_gradient_is_skipped(tmp_path):
    dog = Watchdog(tmp_path)
    assert dog.check(0.5, math.inf, ["a"], 0) is Verdict.SKIP
    assert dog.check(0.5, 900.0, ["a"], 1, extreme=True) is Verdict.SKIP
    lines = [json.loads(line) for line in dog.path.read_text().splitlines()]
    assert [line["grad_norm"] for line in lines] == ["inf", 900.0]


def test_bad_steps_in_a_row_rewind_and_then_end_the_run(tmp_path, capsys):
    dog = Watchdog(tmp_path, patience=3, rewinds=1)
    verdicts = [dog.check(math.nan, 1.0, ["a"], step) for step in range(5)]
    assert verdicts == [Verdict.SKIP, Verdict.SKIP, Verdict.REWIND, Verdict.SKIP, Verdict.SKIP]
    assert "back to the last good checkpoint (1 of at most 1 times)" in capsys.readouterr().out
    with pytest.raises(NonFiniteError, match=r"--load latest and half the --lr") as caught:
        dog.check(math.nan, 1.0, ["a"], 5)
    assert "bad_steps.jsonl" in str(caught.value)


def test_a_good_step_in_between_starts_the_count_anew(tmp_path):
    dog = Watchdog(tmp_path, patience=2, rewinds=0)
    for step in range(10):
        assert dog.check(math.nan if step % 2 else 0.5, 1.0, ["a"], step) is not Verdict.REWIND


def test_processes_agree_and_only_the_guilty_one_names_its_samples(tmp_path):
    dogs = [Watchdog(tmp_path, rank=rank, agree=lambda own: 2) for rank in range(2)]
    verdicts = [
        dog.check(loss, math.nan, [f"sample {dog.rank}"], 0)
        for dog, loss in zip(dogs, (0.5, math.nan), strict=True)
    ]
    assert verdicts == [Verdict.SKIP, Verdict.SKIP]
    lines = [json.loads(line) for line in dogs[0].path.read_text().splitlines()]
    assert [(line["rank"], line["samples"]) for line in lines] == [(1, ["sample 1"])]


def test_the_count_is_resumed(tmp_path):
    dog, other = Watchdog(tmp_path, patience=2), Watchdog(tmp_path, patience=2)
    dog.check(math.nan, 1.0, ["a"], 0)
    other.load_state_dict(dog.state_dict())
    assert other.check(math.nan, 1.0, ["a"], 1) is Verdict.REWIND


def test_the_first_loss_tells_trained_from_random_weights():
    assert "as expected of trained" in starting_note(0.45, pretrained=True)
    assert "as good as random" in starting_note(4.5, pretrained=True)
    assert "as expected of random" in starting_note(4.5, pretrained=False)
    assert "too good" in starting_note(0.45, pretrained=False)
    assert "NaN" in starting_note(math.nan, pretrained=True)
