"""Check what a run reports: values, resuming, crashes, trackers, the picture."""

from __future__ import annotations

import json
import math
import re
import sys
import time
import types
from xml.etree import ElementTree

import pytest
import torch

from opensora.errors import UsageError
from opensora.training.metrics import Metrics, read_metrics
from opensora.training.plot import smooth, thin, write_loss_plot
from opensora.training.trackers import open_trackers


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.logged, self.closed = [], False

    def log(self, step, values):
        self.logged.append((step, dict(values)))

    def close(self):
        self.closed = True


def take(metrics, first, last, loss=0.5, **values):
    for step in range(first, last):
        metrics.step(step, loss, **{"grad_norm": 1.0, "lr": 1e-4, "tokens": 100, **values})


def test_a_report_averages_its_steps(tmp_path, capsys):
    tracker = Recorder()
    metrics = Metrics(tmp_path, 4, log_every=2, peak=1e12, trackers=[tracker])
    for step, loss in enumerate((1.0, 2.0, math.nan, 4.0)):
        metrics.losses(torch.tensor([50.0, 999.0]), torch.tensor([loss, math.inf]))
        with metrics.waiting():
            time.sleep(0.02)
        time.sleep(0.02)
        metrics.step(
            step,
            loss,
            grad_norm=0.5,
            lr=1e-4,
            tokens=1000,
            flops=1e9,
            bucket=f"bucket {step % 2}",
            values={"kl": step},
        )
    first, second = read_metrics(metrics.path)
    assert (first["step"], first["loss"], first["kl"]) == (2, 1.5, 0.5)
    assert (second["loss"], second["skipped"], second["kl"]) == (4.0, 1, 2.5)
    assert first["bands"] == {"0-100": 1.5}
    assert first["tokens_per_second"] * first["step_seconds"] == pytest.approx(1000)
    assert first["mfu"] == pytest.approx(1e9 / first["step_seconds"] / 1e12)
    assert 0.3 < first["data_wait"] < 0.7
    assert set(first["buckets"]) == {"bucket 0", "bucket 1"}
    assert 0.01 < first["memory_gib"] < 100
    shown = capsys.readouterr().out
    for part in ("step 2/4", "loss 1.5000", "lr 0.0001", "tok/s", "skipped 1", "left 0:00:00"):
        assert part in shown
    step, values = tracker.logged[0]
    assert step == 2
    assert values["bands/0-100"] == 1.5
    metrics.close()
    assert tracker.closed


def test_the_time_left_follows_the_present_pace(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    metrics = Metrics(tmp_path, 1040, log_every=1)
    for step in range(40):
        now[0] += 3600.0 if step == 1 else 1.0
        take(metrics, step, step + 1)
    lines = capsys.readouterr().out.splitlines()
    assert "left 0:17:19" in lines[0]
    assert re.search(r"left 0:(1[6-9]|2[0-9]):", lines[-1])  # 1000 steps of a second
    metrics.close()


def test_pauses_are_no_step_time(tmp_path):
    metrics = Metrics(tmp_path, None, log_every=1)
    with metrics.paused():
        time.sleep(0.2)
    take(metrics, 0, 1, bucket="a")
    line = read_metrics(metrics.path)[0]
    assert line["step_seconds"] < 0.1
    assert line["buckets"]["a"] < 0.1
    assert line["seconds"] >= 0.2
    assert line["mfu"] is None


def test_a_resumed_run_continues_without_doubled_steps(tmp_path):
    whole = Metrics(tmp_path, 10, log_every=1)
    take(whole, 0, 6)
    whole.record(6, {"validation_loss": 0.4})
    with whole.path.open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    resumed = Metrics(tmp_path, 10, log_every=1, first_step=4)
    take(resumed, 4, 10)
    lines = read_metrics(resumed.path)
    assert [line["step"] for line in lines] == list(range(1, 11))
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_every_line_is_on_the_disk_at_once(tmp_path):
    metrics = Metrics(tmp_path, 3, log_every=1)
    for step in range(3):
        take(metrics, step, step + 1)
        assert len(metrics.path.read_text().splitlines()) == step + 1


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UsageError, match="line 2, is no JSON"):
        Metrics(tmp_path, 3, first_step=2)


def test_other_processes_are_silent(tmp_path, capsys):
    metrics = Metrics(tmp_path / "run", 2, log_every=1, rank=1, sum_ranks=lambda own: own)
    take(metrics, 0, 2)
    metrics.record(2, {"validation_loss": 1.0})
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_skipped_steps_alone_have_no_loss(tmp_path, capsys):
    metrics = Metrics(tmp_path, 1, log_every=1)
    take(metrics, 0, 1, loss=math.nan, grad_norm=math.inf)
    line = json.loads(metrics.path.read_text(), parse_constant=pytest.fail)
    assert line["loss"] is line["grad_norm"] is None
    assert "loss n/a  grad not finite" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_tracker_says_what_to_type(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=f"pip install {name}"):
        open_trackers([name], tmp_path)
    with pytest.raises(UsageError, match=f"did you mean {name}"):
        open_trackers([name[:-1]], tmp_path)


def test_tensorboard_gets_scalars_and_drops_what_is_done_again(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (tracker,) = open_trackers(["tensorboard"], tmp_path, first_step=5)
    tracker.log(6, {"loss": 0.5})
    tracker.close()
    assert calls == [(str(tmp_path / "tensorboard"), 6), ("loss", 0.5, 6), "closed"]


@pytest.mark.parametrize(("account", "network"), [(False, False), (True, False), (True, True)])
def test_wandb_without_account_or_network_is_offline(
    tmp_path, monkeypatch, capsys, account, network
):
    modes, names = [], set()

    def init(mode, **settings):
        modes.append(mode)
        names.add(settings["id"])
        if mode == "online" and not network:
            raise ConnectionError("no route")
        return types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)

    api = types.SimpleNamespace(api_key="key" if account else None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(api=api, init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for _ in range(2):
        open_trackers(["wandb"], tmp_path)
    assert len(names) == 1  # a resumed run stays one run
    assert modes[-1] == ("online" if account and network else "offline")
    assert ("wandb sync" in capsys.readouterr().out) == (modes[-1] == "offline")


def test_the_picture_shows_loss_bands_and_validation(tmp_path):
    metrics = Metrics(tmp_path, 20, log_every=1)
    assert write_loss_plot(tmp_path) is None
    for step in range(20):
        metrics.losses(torch.tensor([50.0, 950.0]), torch.tensor([1.0, 2.0]))
        take(metrics, step, step + 1, loss=2 / (step + 1))
    values = {"validation_loss": 0.5, "validation_timesteps": {"50": 1.0, "150": 0.5}}
    metrics.record(10, values)
    metrics.record(20, values)
    for log_x in (False, True):
        path = write_loss_plot(tmp_path, log_x=log_x)
        root = ElementTree.parse(path).getroot()
        assert len(root.findall("{*}polyline")) == 2 + 2 + 1 + 2
        texts = [element.text for element in root.findall("{*}text")]
        titles = [text for text in texts if text and "loss" in text]
        assert titles[0] == "training loss"
        assert "validation loss by timestep" in titles
        assert texts.index("0-100") < texts.index("900-1000")
        points = re.findall(r"([\d.]+),([\d.]+)", root.find("{*}polyline").attrib["points"])
        assert len(points) == 20
        assert all(60 <= float(x) <= 780 and 40 <= float(y) <= 360 for x, y in points)


def test_smoothing_keeps_a_constant_and_begins_at_the_first_value():
    assert smooth([(i, 3.0) for i in range(100)]) == [(i, pytest.approx(3.0)) for i in range(100)]
    assert smooth([(i, float(i)) for i in range(100)])[0] == (0, 0.0)


def test_long_lines_are_thinned_to_their_means():
    line = [(float(i), float(i % 2)) for i in range(100_000)]
    short = thin(line)
    assert len(short) == 1000
    assert short[0] == (49.5, 0.5)
    assert short[-1][0] == 99_949.5
    assert thin(line[:10]) == line[:10]
