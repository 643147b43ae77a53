"""Know the frames of a video by their timestamps, from its packets, without decoding them."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.data.media_file import VideoFile, failure, open_video
from opensora.data.quarantine import UnreadableError

#: Codecs with packets that show no frame.
_HIDDEN = ("vp8",)
#: Share of frames that a container may count too many; of the mp4 family none, see `_cut_off`.
_MISCOUNT = 0.02


@dataclass(frozen=True)
class Index:
    """Describe the frames of a file.

    Attributes:
        times: timestamp of every frame in the order they are shown, in the stream's unit.
        keys: places in `times` at which decoding can begin.
        exact: whether `times` names the frames; if not, only their number is known, about.
        fps: average rate, 0 if unknown.
    """

    times: Sequence[int]
    keys: Sequence[int]
    exact: bool
    fps: float

    @property
    def count(self) -> int:
        """Return the number of frames."""
        return len(self.times)


def index_of(path: Path) -> Index:
    """Return the index of a video; the last ones are remembered.

    Raises:
        UnreadableError: the file is missing, cut off, or no video.
        SampleError: the storage failed.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise failure(error) from error
    key = (str(path), status.st_size, status.st_mtime_ns)
    known = _memory.get(key)
    if known is None:
        with open_video(path) as file:
            known = _scan(file, status.st_size)
        _memory.put(key, known)
    return known


def _scan(file: VideoFile, size: int) -> Index:
    """Read all packets of a video of `size` bytes."""
    times: list[int] = []
    starts: list[int] = []
    unknown = damaged = 0
    for packet in file.container.demux(file.stream):
        if not packet.size or packet.is_discard:  # the last one is empty: it flushes the decoder
            continue
        if packet.is_corrupt:
            damaged += 1
        elif packet.pts is None:
            unknown += 1
        else:
            times.append(packet.pts)
            if packet.is_keyframe:
                starts.append(packet.pts)
    count = len(times) + unknown
    span = max(times) - min(times) if times else 0
    _cut_off(file, count, size, float(span * (file.stream.time_base or 0)))
    if count == 0:
        raise UnreadableError("it holds no frame" + (" that is whole" if damaged else ""))
    exact = (
        not unknown
        and not damaged
        and len(set(times)) == count
        and file.stream.codec_context.name not in _HIDDEN
    )
    if not exact:
        return Index(range(count), (0,), exact=False, fps=rate(file.stream))
    ordered = sorted(times)
    places = {time: place for place, time in enumerate(ordered)}
    return Index(
        ordered,
        sorted(places[start] for start in starts),
        exact=True,
        fps=rate(file.stream),
    )


def _cut_off(file: VideoFile, count: int, size: int, seconds: float) -> None:
    """Raise if a file ends before the frames that its own header or index promises."""
    promised = file.stream.frames
    if "mp4" in file.container.format.name:
        _check_end(file, size)
    elif count < promised * (1 - _MISCOUNT) - 1:
        raise UnreadableError(f"the file is cut off: {count} of {promised} frames are left")
    elif seconds and "matroska" in file.container.format.name:
        promise = _seconds(file)
        if seconds < 0.95 * promise - 0.1:
            raise UnreadableError(
                f"the file is cut off: {seconds:.2f} of {promise:.2f} seconds are left"
            )


def check_end(path: Path) -> None:
    """Check a video for its end without reading it; files of the mp4 family alone can tell.

    Raises:
        UnreadableError: it ends before the frames of its index, or it is no video.
        SampleError: the storage failed.
    """
    with open_video(path) as file:
        _check_end(file, path.stat().st_size)


def _check_end(file: VideoFile, size: int) -> None:
    """Raise if a file of `size` bytes ends before the frames of its index.

    An edit may hide frames that the header counts, so only the bytes prove it.
    """
    if "mp4" not in file.container.format.name:
        return
    entries = file.stream.index_entries
    if entries and max(e.pos + e.size for e in entries) > size:
        whole = sum(e.pos + e.size <= size for e in entries)
        raise UnreadableError(f"the file is cut off: {whole} of {len(entries)} frames are left")


def _seconds(file: VideoFile) -> float:
    """Return how long a Matroska header says that the video is, 0 if it does not."""
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", file.stream.metadata.get("DURATION", ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    alone = len(file.container.streams) == 1
    return (file.container.duration or 0) / 1e6 if alone else 0.0


def rate(stream: Any) -> float:
    """Return the average frames per second, 0 if the container does not say."""
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate and 0 < rate < 1000 else 0.0


class _Memory:
    """Remember the indices last used, up to a number of frames: threads share it."""

    def __init__(self, frames: int) -> None:
        self._room = frames
        self._known: OrderedDict[tuple[str, int, int], Index] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int]) -> Index | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, key: tuple[str, int, int], index: Index) -> None:
        with self._lock:
            if key in self._known:
                return
            self._known[key] = index
            self._room -= index.count
            while self._room < 0 and len(self._known) > 1:
                self._room += self._known.popitem(last=False)[1].count


# 40 bytes a frame: some ten megabytes.
_memory = _Memory(300_000)
