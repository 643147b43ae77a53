"""Clips are written whole or not at all, with exact facts and their recipe inside and beside."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from opensora import media
from opensora.errors import DoesNotFitError, NonFiniteError, UsageError
from opensora.files import atomic, check_folder, write_text
from opensora.media import frame_rate, read_metadata, to_uint8, write_clip
from opensora.progress import Progress, silenced

ROOT = Path(__file__).parent.parent


def moving_square(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), (20, 40, 200), np.uint8)
    for t in range(frames):
        video[t, 16:32, 2 * t : 2 * t + 16] = (220, 180, 30)
    return video


def decode(path: Path) -> tuple[np.ndarray, av.video.stream.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (8, Fraction(8)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (7.5, Fraction(15, 2)),
    ],
)
def test_mp4_holds_the_frames_at_the_exact_rate(tmp_path: Path, fps: float, rate: Fraction) -> None:
    video = moving_square()
    saved = write_clip(tmp_path / "a.mp4", video, fps, {"seed": 3, "prompt": "é 🙂"})
    assert (saved.frames, saved.width, saved.height) == (9, 64, 48)
    assert saved.seconds == float(9 / rate)
    with av.open(str(saved.path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.pix_fmt == "yuv420p"
        assert stream.average_rate == rate
        assert stream.frames == 9
        assert stream.codec_context.colorspace == 1
    frames, _ = decode(saved.path)
    assert np.abs(frames.astype(int) - video).mean() < 4, "colours survive the round trip"
    head = saved.path.read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "the index comes first"


def test_recipe_is_inside_and_beside(tmp_path: Path) -> None:
    recipe = {"seed": 3, "prompt": "a\nb é 🙂", "config": {"a": [1, None]}, "long": "x" * 30_000}
    for name, frames in (("a.mp4", moving_square()), ("b.png", moving_square(1))):
        saved = write_clip(tmp_path / name, frames, 8, recipe)
        inside = read_metadata(saved.path)
        assert {key: inside[key] for key in recipe} == recipe
        assert inside["file"]["frames"] == len(frames)
        assert json.loads(saved.sidecar.read_text()) == inside
        assert saved.sidecar == saved.path.with_suffix(".json")
    assert read_metadata(tmp_path / "a.mp4")["file"]["fps"] == "8"


def test_png_holds_the_pixels(tmp_path: Path) -> None:
    from PIL import Image

    frames = moving_square(1, 33, 35)
    saved = write_clip(tmp_path / "a.png", frames, 8)
    with Image.open(saved.path) as image:
        assert np.array_equal(np.asarray(image), frames[0])


def test_odd_sizes_repeat_the_edge_and_say_so(tmp_path: Path) -> None:
    video = moving_square(3, 47, 63)
    saved = write_clip(tmp_path / "a.mp4", video, 8)
    assert (saved.height, saved.width) == (48, 64)
    frames, _ = decode(saved.path)
    assert np.abs(frames[:, :47, :63].astype(int) - video).mean() < 4
    facts = read_metadata(saved.path)["file"]
    assert (facts["repeated_rows"], facts["repeated_columns"]) == (1, 1)


def test_float_frames_follow_the_published_rule(tmp_path: Path) -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0])
    video = x.expand(3, 1, 1, 7)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert to_uint8(torch.zeros(2, 3, 4, 5, 6)).shape == (2, 4, 5, 6, 3)
    saved = write_clip(tmp_path / "a.mp4", torch.zeros(3, 2, 16, 16), 8)
    assert abs(int(decode(saved.path)[0].mean()) - 128) <= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_frames_are_never_written(tmp_path: Path, value: float) -> None:
    video = torch.zeros(3, 5, 16, 16)
    video[1, 3, 2, 2] = value
    with pytest.raises(NonFiniteError, match="frame 3 of 5"):
        write_clip(tmp_path / "a.mp4", video, 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates_are_refused(fps: float) -> None:
    with pytest.raises(UsageError, match="greater than 0"):
        frame_rate(fps)


def test_wrong_frames_and_names_are_refused(tmp_path: Path) -> None:
    for frames, name in (
        (np.zeros((2, 8, 8), np.uint8), "a.mp4"),
        (np.zeros((0, 8, 8, 3), np.uint8), "a.mp4"),
        (np.zeros((2, 8, 8, 3), np.float32), "a.mp4"),
        (np.zeros((2, 8, 8, 3), np.uint8), "a.png"),
        (np.zeros((2, 8, 8, 3), np.uint8), "a.avi"),
    ):
        with pytest.raises(UsageError):
            write_clip(tmp_path / name, frames, 8)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UsageError, match="it is a folder"):
        write_clip(tmp_path / "folder.mp4", moving_square(), 8)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DoesNotFitError),
        (OSError(errno.EACCES, "Permission denied"), UsageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("unforeseen"), RuntimeError),
    ],
)
def test_a_failure_on_the_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, expected: type
) -> None:
    write_clip(tmp_path / "a.mp4", moving_square(), 8, {"seed": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path: Path, *rest: object) -> None:
        path.write_bytes(b"half a clip")
        raise raised

    monkeypatch.setattr(media, "_encode_mp4", fail)
    with pytest.raises(expected):
        write_clip(tmp_path / "a.mp4", moving_square(), 8, {"seed": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_ends_in_one_sentence_and_no_file(tmp_path: Path) -> None:
    program = """
import resource, sys, numpy as np
from opensora.errors import DoesNotFitError
from opensora.media import write_clip
noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    write_clip(sys.argv[1] + "/a.mp4", noise, 8)
except DoesNotFitError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "no space left" in result.stdout
    assert result.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folders_are_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_folder(tmp_path / "file" / "deeper", 1)
    with pytest.raises(UsageError, match=r"is a file|cannot write"):
        check_folder(Path("/dev/null"), 1)
    with pytest.raises(UsageError, match="cannot write"):
        check_folder(Path("/proc/nowhere/samples"), 1)
    with pytest.raises(UsageError, match="cannot write"):
        check_folder(Path("a\0b"), 1)
    with pytest.raises(DoesNotFitError, match="are needed and"):
        check_folder(tmp_path / "new", 1 << 60)
    check_folder(tmp_path / "new" / "folder", 1)
    assert os.listdir(tmp_path) == ["file"], "checking leaves nothing behind"


def test_atomic_text_replaces_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_text(path, "old")
    with pytest.raises(ValueError, match="stop"), atomic(path) as partial:  # noqa: PT012
        partial.write_text("half")
        assert path.read_text() == "old"
        raise ValueError("stop")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.json"]


def test_files_without_a_recipe_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    (tmp_path / "a.png").write_bytes(b"not an image")
    for name in ("a.mp4", "a.png", "missing.mp4"):
        with pytest.raises(UsageError, match="cannot read the recipe"):
            read_metadata(tmp_path / name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the time that progress goes by."""
    now = [100.0]
    monkeypatch.setattr("opensora.progress.time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


def test_short_stages_are_silent_without_a_terminal(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        report = progress.stage("sampling")
        report(1, 2)
        clock(9.9)
        report(2, 2)
    assert capsys.readouterr() == ("", "")


def test_long_stages_write_lines_without_a_terminal(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        report = progress.stage("encoding 17x64x64", "clip")
        for second in range(1, 2001):
            clock(second)
            report(16 * second, 64_000)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "encoding 17x64x64: 160/64000 clips, 16.0 clips/s, 66 min left"
    assert lines[1] == "encoding 17x64x64: 640/64000 clips, 16.0 clips/s, 66 min left"
    seconds = [int(line.split()[2].split("/")[0]) // 16 for line in lines]
    gaps = [after - before for before, after in itertools.pairwise(seconds)]
    assert min(gaps) >= 30
    assert gaps == sorted(gaps)
    assert max(gaps) <= 300
    assert len(lines) < 40


def test_lines_of_bytes_and_of_slow_steps(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress() as progress:
        report = progress.stage("loading the VAE", "B")
        clock(20)
        report(10**9, 4 * 10**9)
        report = progress.stage("sampling")
        clock(20 + 5 * 3600)
        report(0, 4)
        report(2, 4)
    assert capsys.readouterr().err.splitlines() == [
        "loading the VAE: 1000/4000 MB, 50.0 MB/s, 60 s left",
        "sampling: 2/4 steps, 9000.0 s/step, 5 h 0 min left",
    ]


@pytest.mark.parametrize(
    ("enabled", "rank", "quiet"), [(False, "0", False), (None, "1", False), (None, "0", True)]
)
def test_quiet_and_other_processes_write_no_lines(
    enabled: bool | None,
    rank: str,
    quiet: bool,
    clock: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", rank)
    with silenced(quiet), Progress(enabled) as progress:
        report = progress.stage("sampling")
        clock(60)
        report(1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_draws_on_a_terminal_of_unknown_size() -> None:
    program = """
from opensora.progress import Progress
with Progress() as progress:
    progress.stage("sampling", "step")(2, 2)
"""
    read, written = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], stderr=written, check=True, env=environment)
    os.close(written)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal whose writers have gone
        while piece := os.read(read, 4096):
            shown += piece
    os.close(read)
    assert b"2/2 [00:00<" in shown


def test_progress_draws_on_stderr_with_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True) as progress:
        progress.stage("loading", "tensor")(1, 1)
        report = progress.stage("sampling", "step")
        for step in range(1, 4):
            report(step, 3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loading" in shown.err
    assert "sampling" in shown.err
    assert "3/3 [00:00<" in shown.err
