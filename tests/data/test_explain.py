"""Test what is said of a table, and that the change it proposes makes a run do a step."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest

from opensora.__main__ import main
from opensora.config_file import load_config_file
from opensora.data.batch import Entry, Size
from opensora.data.explain import explain, require_steps
from opensora.data.plan import Plan
from opensora.data.program import dataset_settings
from opensora.data.remedy import find_remedy
from opensora.errors import UsageError


class Rows:
    """Rows of given (frames, height, width)."""

    def __init__(self, *shapes: tuple[int, int, int]) -> None:
        self.rows = [Entry(f"meta.csv:{i} {i}.mp4", *shape) for i, shape in enumerate(shapes, 2)]
        self.problems = {i: "no such file" for i, shape in enumerate(shapes) if not shape[0]}

    def entries(self) -> list[Entry]:
        return self.rows


CLIP, IMAGE, SHORT, BAD = (60, 240, 426), (1, 240, 426), (20, 240, 426), (0, 0, 0)

# What was asked, and the change that must come out.
CASES = [
    (
        Plan({"144p": {51: (1.0, 51)}}),
        [CLIP] * 12 + [SHORT] * 3,
        "batch_size of 144p/51 from 51 to 12",
    ),
    (
        Plan({"144p": {51: (1.0, 51)}}, replicas=4),
        [CLIP] * 12,
        "batch_size of 144p/51 from 51 to 3",
    ),
    (
        # The entry that loses the smallest share of its batch.
        Plan({"144p": {51: (1.0, 51), 17: (1.0, 5)}}),
        [CLIP] * 12 + [SHORT] * 3,
        "batch_size of 144p/17 from 5 to 3",
    ),
    (
        Plan({"144p": {51: (1.0, 2)}}),
        [(51, 240, 426)] * 4,
        "strict_buckets=False of dataset",
    ),
    (
        Plan({"144p": {51: (1.0, 8)}}, frame_interval=3),
        [(120, 240, 426)] * 4,
        "frame_interval from 3 to 2; batch_size of 144p/51 from 8 to 4",
    ),
    (
        Plan({"144p": {51: (0.0, None)}}),
        [CLIP] * 4,
        "keep probability of 144p/51 from 0.0 to 1.0 and its batch size from None to 1",
    ),
    (Plan({"144p": {51: (1.0, 8)}}), [SHORT] * 4, "add 17: (1.0, 4) to 144p of bucket_config"),
    (Plan({"144p": {51: (1.0, 8)}}), [IMAGE] * 4, "add 1: (1.0, 4) to 144p of bucket_config"),
    (
        Plan({"720p": {51: (1.0, 8)}}),
        [CLIP] * 4,
        'add "240p": {51: (1.0, 4)} to bucket_config',
    ),
    (
        Plan({"144p": {51: (1.0, 1)}}, replicas=8),
        [CLIP] * 3,
        "replicas (processes times accumulation steps) from 8 to 3",
    ),
    (Plan(size=Size(16, 64, 64), batch_size=8), [CLIP] * 3, "batch_size from 8 to 3"),
    (Plan(size=Size(32, 64, 64), batch_size=3), [SHORT] * 3, "num_frames of dataset from 32 to 20"),
]


@pytest.mark.parametrize(("plan", "shapes", "text"), CASES, ids=[case[2] for case in CASES])
def test_the_proposed_change_makes_a_step(
    plan: Plan, shapes: list[tuple[int, int, int]], text: str
) -> None:
    rows = Rows(*shapes)
    assert plan.sampler(rows.entries()).length(0) == 0
    remedy = find_remedy(rows.entries(), plan)
    assert remedy is not None
    assert remedy.text == text
    assert remedy.plan.sampler(rows.entries()).length(0) >= remedy.plan.replicas
    # No larger batch would do.
    for name, frames, size in re.findall(r"batch_size of (\w+)/(\d+) from \d+ to (\d+)", text):
        config = {k: dict(v) for k, v in (remedy.plan.bucket_config or {}).items()}
        config[name][int(frames)] = (1.0, int(size) + 1)
        larger = Plan(config, frame_interval=remedy.plan.frame_interval, replicas=plan.replicas)
        assert larger.sampler(rows.entries()).length(0) == 0


def test_every_table_with_a_readable_row_has_a_change() -> None:
    rng = random.Random(0)
    resolutions = ["144p", "256", "480p", "1080p"]
    found = 0
    for _ in range(150):
        rules = {
            name: {
                rng.choice([1, 17, 51]): (rng.choice([1.0, 0.5, (1.0, 0.3)]), rng.randint(2, 30))
                for _ in range(rng.randint(1, 2))
            }
            for name in rng.sample(resolutions, rng.randint(1, 3))
        }
        shapes = [
            (rng.choice([0, 1, 2, 9, 40, 200]), rng.choice([144, 300, 900]), 400)
            for _ in range(rng.randint(1, 9))
        ]
        rows = Rows(*shapes)
        plan = Plan(rules, frame_interval=rng.choice([1, 3]), replicas=rng.choice([1, 1, 2, 5]))
        if plan.sampler(rows.entries()).length(0):
            continue
        remedy = find_remedy(rows.entries(), plan)
        if remedy is None:
            assert all(frames == 0 for frames, _, _ in shapes), (plan, shapes)
            continue
        assert remedy.plan.sampler(rows.entries()).length(0) > 0
        found += 1
    assert found > 50


def test_report_counts_what_an_epoch_does() -> None:
    rows = Rows(*[CLIP] * 11, IMAGE, SHORT, BAD, (60, 100, 100))
    plan = Plan({"144p": {51: (1.0, 2), 1: (1.0, 4)}}, replicas=2)
    report = explain(rows, plan)  # type: ignore[arg-type]
    assert report.steps == 2
    assert report.remedy is None
    buckets = {b.name: (b.rows, b.batch_size, b.batches, b.left) for b in report.buckets}
    assert buckets == {"144p 51 0.56": (11, 2, 5, 1), "144p 1 0.56": (1, 4, 0, 1)}
    assert (report.dropped, report.unreadable) == (2, 1)
    text = "\n".join(report.lines())
    for line in (
        "meta.csv:2 2.mp4: 144p 51 0.56",
        "meta.csv:14 14.mp4: dropped: 144p: 20 frames are too few (at least 52 for 51)",
        "meta.csv:15 15.mp4: dropped: unreadable: no such file",
        "meta.csv:16 16.mp4: dropped: 100x100 is too small for 144p (at least 29491 pixels)",
        "15 rows: 12 in a bucket, 2 dropped, 1 unreadable",
        "steps per epoch: 2 (2 replicas take a batch each)",
    ):
        assert line in text.splitlines()
    assert "144p 51 0.56" not in "\n".join(report.lines(rows=False)).split("bucket")[0]


def test_a_run_of_no_steps_is_refused_with_the_change() -> None:
    rows = Rows(*[CLIP] * 3, BAD)
    good, bad = Plan({"144p": {51: (1.0, 3)}}), Plan({"144p": {51: (1.0, 9)}})
    assert require_steps(rows, good) == 1  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"0 steps: of 4 rows 1 are unreadable.* from 9 to 3"):
        require_steps(rows, bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"no change of the configuration helps.*no such file"):
        require_steps(Rows(BAD), bad)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path, videos) -> Path:  # type: ignore[no-untyped-def]
    clip = videos("explained.mp4", 40, size=(144, 256))
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
    (tmp_path / "meta.csv").write_text("path, text\na.mp4, one\nb.mp4, two\nc.mp4, three\n")
    (tmp_path / "c.py").write_text(
        'bucket_config = {"144p": {17: (1.0, 8)}, "240p": {17: (0.0, None)}}\n'
        'dataset = dict(type="VariableVideoTextDataset", transform_name="resize_crop")\n'
    )
    return tmp_path


def test_program_explains_and_its_change_works(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "explain", str(files / "meta.csv"), "--config", str(files / "c.py")]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "meta.csv:2 a.mp4: 144p 17 0.56" in output
    assert "meta.csv:4 c.mp4: dropped: unreadable: no such file or directory" in output
    assert "no training: smallest change: batch_size of 144p/17 from 8 to 2" in output
    config = (files / "c.py").read_text()
    (files / "c.py").write_text(config.replace("(1.0, 8)", "(1.0, 2)"))
    assert main([*words, "--summary"]) == 0
    output = capsys.readouterr().out
    assert "steps per epoch: 1" in output
    assert "a.mp4" not in output
    assert main([*words, "--replicas", "2"]) == 0
    assert "steps per epoch: 0 (2 replicas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explian"], "did you mean explain"),
        (["explain", "meta.csv"], "name the training configuration"),
        (["explain", "meta.csv", "--config", "none.py"], "none.py does not exist"),
        (["explain", "mta.csv", "--config", "c.py"], "did you mean meta.csv"),
        (["explain", "--config", "c.py"], "no table of clips"),
        (["explain", "meta.csv", "--confg", "c.py"], "did you mean --config"),
        (["explain", "meta.csv", "--config", "c.py", "--replicas", "x"], "invalid int value"),
        (["explain", "meta.csv", "--config", "c.py", "--replicas", "0"], "replicas must be"),
        (["explain", "meta.csv", "--config", "c.py", "--root", "nowhere"], "folder of clips"),
    ],
)
def test_program_says_what_is_wrong(
    words: list[str],
    message: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    assert main(["data", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_program_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    assert "explain" in capsys.readouterr().out
    assert main(["data", "explain", "--help"]) == 0
    assert "--replicas" in capsys.readouterr().out


def test_configurations_of_1_0_keep_their_data_outside(tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text(
        'num_frames = 16\nframe_interval = 3\nimage_size = (256, 256)\ndata_path = "CSV_PATH"\n'
        "use_image_transform = False\nbatch_size = 8\n"
    )
    assert dataset_settings(load_config_file(tmp_path / "c.py")) == {
        "type": "VideoTextDataset",
        "data_path": "CSV_PATH",
        "num_frames": 16,
        "image_size": (256, 256),
        "frame_interval": 3,
    }


def test_all_ids_of_cases_differ() -> None:
    assert all(a[2] != b[2] for a, b in itertools.combinations(CASES, 2))
