"""Test that a folder of clips becomes a table that training reads, and that bad files are told."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora.__main__ import main
from opensora.data import listing
from opensora.data.dataset import build_dataset
from opensora.data.table import read_table


@pytest.fixture
def clips(tmp_path: Path, videos: Callable[..., Path]) -> Path:
    """Make a folder of clips and images, some with captions, some bad."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    shutil.copy(videos("listed.mp4", 20), folder / "a_red-car.mp4")
    shutil.copy(videos("listed.mkv", 12, size=(64, 48), fps=12), folder / "more/b.mkv")
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "more/c.PNG")
    (folder / "more/b.txt").write_text('\ufeff a "big" dog,\nrunning \n', "utf-8")
    (folder / "more/c.txt").write_text(" \n", "utf-8")
    (folder / "words.md").write_text("no clip", "utf-8")
    (folder / ".hidden.mp4").write_bytes(b"no clip")
    (folder / "bad/empty.mp4").parent.mkdir()
    (folder / "bad/empty.mp4").write_bytes(b"")
    (folder / "bad/text.jpg").write_text("no image", "utf-8")
    # Its index first, so that only the missing end tells.
    fast = videos("listed-fast.mp4", 20, container={"movflags": "faststart"}).read_bytes()
    (folder / "cut.mp4").write_bytes(fast[: -len(fast) // 4])
    (folder / "latin.mp4").write_bytes(fast)
    (folder / "latin.txt").write_bytes("café".encode("latin1"))
    return folder


def test_a_folder_becomes_a_table_that_training_reads(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "meta.csv"
    assert main(["data", "table", str(clips), "-o", str(table)]) == 0
    assert table.read_text("utf-8").splitlines() == [
        "path,text,num_frames,height,width,fps",
        "clips/a_red-car.mp4,a red car,20,48,64,25",
        'clips/more/b.mkv,"a ""big"" dog, running",12,64,48,12',
        "clips/more/c.PNG,c,1,30,40,",
    ]
    printed = capsys.readouterr()
    assert "3 rows, 1 captions from .txt files, 2 from file names, 4 files left out" in printed.out
    reasons = dict(line.split(": ", 2)[1:] for line in printed.err.splitlines())
    assert {Path(name).name for name in reasons} == {
        "empty.mp4", "text.jpg", "cut.mp4", "latin.mp4"
    }  # fmt: skip
    assert "cut off" in reasons[str(clips / "cut.mp4")]
    assert "not UTF-8" in reasons[str(clips / "latin.mp4")]
    rows = read_table(table).rows
    assert [row.text for row in rows] == ["a red car", 'a "big" dog, running', "c"]
    entries = build_dataset({"data_path": table}).entries()
    assert [(e.num_frames, e.height, e.width, e.fps) for e in entries] == [
        (20, 48, 64, 25.0),
        (12, 64, 48, 12.0),
        (1, 30, 40, 0.0),
    ]


def test_a_table_elsewhere_names_whole_paths(clips: Path, tmp_path: Path) -> None:
    table = tmp_path / "tables/meta.csv"
    assert main(["data", "table", os.path.relpath(clips), "-o", str(table)]) == 0
    assert all(row.path.is_file() for row in read_table(table).rows)
    assert all(line.startswith("/") for line in table.read_text("utf-8").splitlines()[1:])


def test_a_table_that_is_there_stays(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "meta.csv"
    table.write_text("path\nmine.mp4\n", "utf-8")
    assert main(["data", "table", str(clips), "-o", str(table)]) == 2
    assert "--force" in capsys.readouterr().err
    assert table.read_text("utf-8") == "path\nmine.mp4\n"
    assert main(["data", "table", str(clips), "-o", str(table), "--force"]) == 0
    assert len(read_table(table).rows) == 3


def test_a_failure_while_writing_leaves_nothing(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing.Path, "as_posix", lambda self: 1 / 0)
    good, _ = listing.list_media(listing.find_media(clips))
    with pytest.raises(ZeroDivisionError):
        listing.write_listing(good, tmp_path / "meta.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_links_in_a_circle_are_followed_once(clips: Path) -> None:
    (clips / "more/up").symlink_to(clips, target_is_directory=True)
    assert len(listing.find_media(clips)) == 7


def test_progress_counts_every_file(clips: Path) -> None:
    told: list[tuple[int, int]] = []
    listing.list_media(listing.find_media(clips), lambda done, total: told.append((done, total)))
    assert told == [(done, 7) for done in range(1, 8)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "does not exist"),
        (["clips/words.md"], "is a file"),
        (["none"], "no video or image among its 1 files"),
        (["clips/bad"], "none of its 2 videos and images can be read"),
        (["clips", "-o", "meta.xlsx"], "name a .csv file"),
        (["clips", "--forc"], "did you mean --force"),
        ([], "the following arguments are required: FOLDER"),
    ],
)
def test_mistakes_are_told(
    clips: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(clips.parent)
    (clips.parent / "none").mkdir()
    (clips.parent / "none/a.md").write_text("words", "utf-8")
    assert main(["data", "table", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(clips.parent.glob("*.csv"))
