"""Test exact frames of whole videos and reasons of damaged ones."""

from __future__ import annotations

import ctypes
import gc
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from opensora.data.batch import SampleError
from opensora.data.image import image_size, read_image
from opensora.data.probe import probe
from opensora.data.quarantine import UnreadableError
from opensora.data.transforms import frame_indices, last_start
from opensora.data.video import read_frames, video_facts
from opensora.data.video_index import index_of

from .conftest import MakeVideo, decode_all

VIDEOS = {
    "b_frames.mp4": {"options": {"bf": "3", "g": "12", "b-pyramid": "normal"}},
    "open_gop.mp4": {
        "options": {"x264-params": "keyint=10:bframes=4:open-gop=1:b-adapt=0:scenecut=0"}
    },
    "odd_gop.mkv": {"options": {"g": "7", "bf": "2"}},
    "all_keys.mp4": {"options": {"g": "1"}},
    "one_key.mp4": {"options": {"g": "1000", "bf": "2"}},
    "packed.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "9"}},
    "transport.ts": {"options": {"g": "9", "bf": "2"}},
    "program.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "9"}},
    "hidden.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "15"}},
}


def check_exact(path: Path, draws: int) -> None:
    """Compare random clips with a full decode."""
    frames = decode_all(path)
    assert index_of(path).count == len(frames)
    rng = random.Random(0)
    for _ in range(draws):
        count, interval = rng.choice([(1, 1), (5, 1), (9, 3), (17, 2)])
        start = rng.randint(0, last_start(len(frames), count, interval))
        wanted = frame_indices(len(frames), count, interval, start)
        got = list(read_frames(path, wanted))
        assert len(got) == count
        for index, pixels in zip(wanted, got, strict=True):
            assert np.array_equal(pixels, frames[index]), (path.name, wanted)


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_a_full_decode(name: str, videos: MakeVideo) -> None:
    check_exact(videos(name, 50, **VIDEOS[name]), 25)


def test_frames_of_real_clips_are_those_of_a_full_decode(real_clips: list[Path]) -> None:
    for path in real_clips:
        check_exact(path, 3 if path.stat().st_size > 1e6 else 8)


def test_frames_may_repeat_and_be_none(videos: MakeVideo) -> None:
    path = videos("b_frames.mp4", 50, **VIDEOS["b_frames.mp4"])
    frames = decode_all(path)
    got = list(read_frames(path, [3, 3, 14]))
    assert [np.array_equal(a, frames[i]) for a, i in zip(got, (3, 3, 14), strict=True)] == [
        True
    ] * 3
    assert list(read_frames(path, [])) == []
    with pytest.raises(SampleError, match="frame 50 is wanted, the file holds 50"):
        next(read_frames(path, [50]))


def test_only_what_is_needed_is_decoded(videos: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    import opensora.data.media_file as media_file

    path = videos("b_frames.mp4", 50, **VIDEOS["b_frames.mp4"])
    seen = []
    original = media_file.VideoFile._from

    def watched(self, *args, **settings):  # type: ignore[no-untyped-def]
        for packet in self.container.demux(self.stream):
            seen.append(packet.pts)
            for frame in packet.decode():
                if frame.pts in args[0]:
                    yield args[0][frame.pts], frame
                if frame.pts >= args[1]:
                    return

    monkeypatch.setattr(media_file.VideoFile, "_from", watched)
    list(read_frames(path, [38, 39]))
    assert original is not watched
    # The group of pictures begins at 36; the decoder holds a few frames back.
    assert 3 <= len(seen) <= 12


def test_turned_videos_are_upright(videos: MakeVideo) -> None:
    path = videos("turned.mp4", 5, rotation=90)
    assert video_facts(path)[:3] == (5, 64, 48)
    assert np.array_equal(next(read_frames(path, [2])), np.rot90(decode_all(path)[2]))


def test_facts(videos: MakeVideo, tmp_path: Path) -> None:
    assert tuple(probe(videos("odd_gop.mkv", 50, **VIDEOS["odd_gop.mkv"]))) == (50, 48, 64, 25.0)
    image = Image.fromarray(np.zeros((30, 50, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # lying on its side
    image.save(tmp_path / "side.jpg", exif=exif)
    image.save(tmp_path / "plain.png")
    assert tuple(probe(tmp_path / "side.jpg")) == (1, 50, 30, 0.0)
    assert tuple(probe(tmp_path / "plain.png")) == (1, 30, 50, 0.0)
    assert read_image(tmp_path / "side.jpg").size == (30, 50)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1", "CMYK"])
def test_images_of_any_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((8, 9), 128 * 257, np.uint16)).save(path)
    else:
        Image.new("RGB", (9, 8), (128, 128, 128)).convert(mode).save(path)
    image = read_image(path)
    assert (image.mode, image.size, image_size(path)) == ("RGB", (9, 8), (8, 9))
    if mode not in ("1", "P"):
        assert abs(image.getpixel((4, 4))[0] - 128) <= 1


@pytest.mark.parametrize("name", ["cut.mp4", "front.mp4", "cut.mkv", "cut.avi", "cut.webm"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 0.75, 0.9])
def test_cut_off_files_say_so(name: str, share: float, videos: MakeVideo, tmp_path: Path) -> None:
    settings = {
        "front.mp4": {"container": {"movflags": "+faststart"}},
        "cut.avi": {"codec": "mpeg4"},
        "cut.webm": {"codec": "libvpx-vp9"},
    }.get(name, {})
    data = videos(name, 50, **settings).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    # Whatever is drawn of it, and more than once: the reason must not depend on the draw.
    reasons = set()
    for wanted in ([0], [5, 6], [49]):
        with pytest.raises(SampleError) as failure:
            list(read_frames(path, wanted))
        reasons.add(str(failure.value))
    assert len(reasons) == 1
    known = ("cut off", "the file is empty", "input/output error")
    assert any(words in reason for reason in reasons for words in known), reasons


@pytest.mark.parametrize("name", ["flip.mp4", "flip.mkv", "flip.ts", "flip.webm"])
def test_damaged_files_give_a_reason_or_frames(
    name: str, videos: MakeVideo, tmp_path: Path
) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    data = videos(name, 50, codec=codec).read_bytes()
    rng, failed = np.random.default_rng(0), 0
    for count in (1, 5, 20, 100, 400, 2000):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), count):
            damaged[place] ^= int(rng.integers(1, 256))
        path = tmp_path / f"{count}{name}"
        path.write_bytes(damaged)
        try:
            assert len(list(read_frames(path, list(range(10, 40))))) == 30
        except SampleError:
            failed += 1
    assert failed >= 3


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.mp4", None, "no such file"),
        ("none.png", None, "no such file"),
        ("empty.mp4", b"", "the file is empty"),
        ("page.mp4", b"<html>404</html>" * 50, "no media file"),
        ("page.jpg", b"<html>404</html>", "no image"),
        ("half.png", b"half", "truncated"),
        ("folder", "folder", "directory"),
    ],
)
def test_what_is_no_clip_is_unreadable(
    name: str, content: bytes | str | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content == b"half":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    read = read_image if path.suffix in (".png", ".jpg") else index_of
    with pytest.raises(UnreadableError, match=reason):
        read(path)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        for packet in [*stream.encode(sound), *stream.encode()]:
            file.mux(packet)
    with pytest.raises(UnreadableError, match="no video stream"):
        probe(path)


def test_a_file_that_changes_is_read_anew(videos: MakeVideo, tmp_path: Path) -> None:
    path = tmp_path / "changing.mp4"
    path.write_bytes(videos("short.mp4", 10).read_bytes())
    assert index_of(path).count == 10
    path.write_bytes(videos("long.mp4", 20).read_bytes())
    assert index_of(path).count == 20


MEMORY = """
import random, sys
from pathlib import Path
from opensora.data.batch import SampleError
from opensora.data.video import read_frames

def fetch(times):
    for i in range(times):
        path = Path(sys.argv[1 + i % (len(sys.argv) - 1)])
        start = rng.randrange(20)
        try:
            frames = list(read_frames(path, [start, start + 3]))
            assert len(frames) == 2
        except SampleError:
            pass

def resident():
    # Not the pages of libraries, which come and go with the system's memory.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

rng = random.Random(0)
sizes = []
for _ in range(6):
    fetch(300)
    sizes.append(resident())
# The allocator takes and keeps some megabytes now and then; a leak grows every time.
print(min(after - before for before, after in zip(sizes, sizes[1:])) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_over_fetches(videos: MakeVideo, tmp_path: Path) -> None:
    whole = videos("flat.mp4", 50, options={"g": "7"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[:5000])
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, whole, videos("flat.mkv", 50, options={"g": "7"}), cut],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.5  # MiB; one picture kept a fetch would be 3


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc")
def test_files_that_are_not_read_to_their_end_lose_nothing(videos: MakeVideo) -> None:
    """What av's generators hold is freed only if they are closed: 150 bytes a file."""
    path = videos("left_early.mp4", 40)

    def leave() -> None:
        frames = read_frames(path, range(17))
        next(frames)

    uses: list[Callable[[], object]] = [
        lambda: list(read_frames(path, range(17))),
        lambda: list(read_frames(path, [30, 35])),
        lambda: video_facts(path),
        leave,
    ]
    for use in uses:
        for _ in range(20):
            use()
        before = allocated()
        for _ in range(200):
            use()
        assert allocated() - before < 200 * 50


def allocated() -> int:
    """Return the bytes that malloc has given out in this thread's arena."""

    class Facts(ctypes.Structure):
        _fields_ = tuple(
            (name, ctypes.c_size_t)
            for name in (
                *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
                *("uordblks", "fordblks", "keepcost"),
            )
        )

    gc.collect()
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Facts
    found = ask()
    return int(found.uordblks + found.hblkhd)
