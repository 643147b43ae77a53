"""Read frames of videos and images by exact index, decoding no more than they need.

A file's packets are read once, without decoding them: their timestamps in order are its frames. To
read frames, the last keyframe shown no later than the first of them is sought, and decoding goes
on from there to the last of them. Files whose packets are not their frames (no timestamps, or
hidden frames as in VP8) are decoded from the start and counted.
"""

from __future__ import annotations

import errno
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from opensora.data.batch import SampleError
from opensora.data.quarantine import UnreadableError

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]

#: Codecs with packets that show no frame.
_HIDDEN = ("vp8",)
#: What may be over the next time: network folders.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENOMEM)
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


def video_facts(path: Path) -> tuple[int, int, int, float]:
    """Return frames, height, width and frames per second of a video, as it is to be shown.

    The first frame is decoded: it tells the rotation, and whether this is a video at all.

    Raises:
        UnreadableError: it is none.
        SampleError: the storage failed.
    """
    with _opened(path) as file:
        count, rate = file.stream.frames, _rate(file.stream)
        first = next(file.frames(), None)
        if first is None:
            raise UnreadableError("no frame of it can be decoded")
        height, width = first.height, first.width
        if first.rotation % 180:
            height, width = width, height
    return count or index_of(path).count, height, width, rate


def index_of(path: Path) -> Index:
    """Return the index of a video; the last ones are remembered.

    Raises:
        UnreadableError: the file is missing, cut off, or no video.
        SampleError: the storage failed.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _failure(error) from error
    key = (str(path), status.st_size, status.st_mtime_ns)
    known = _memory.get(key)
    if known is None:
        with _opened(path) as file:
            known = _scan(file, status.st_size)
        _memory.put(key, known)
    return known


def read_frames(path: Path, wanted: Sequence[int]) -> Iterator[Pixels]:
    """Decode frames of a video.

    Args:
        path: of the video.
        wanted: indices in ascending order, as the frames are shown; one may come several times.

    Yields:
        uint8 [H, W, 3] for each, upright.

    Raises:
        UnreadableError: the file is missing, cut off, or no video.
        SampleError: a frame is damaged, or there are fewer than that.
    """
    index = index_of(path)
    if not wanted:
        return
    if wanted[-1] >= index.count:
        raise SampleError(f"frame {wanted[-1]} is wanted, the file holds {index.count}")
    with _opened(path) as file:
        file.failure = SampleError
        found = file.by_time(index, wanted) if index.exact else enumerate(file.frames())
        place, pixels = 0, None
        for number, frame in found:
            if number != wanted[place]:
                continue
            if frame.is_corrupt:
                raise SampleError(f"frame {number} is damaged")
            pixels = file.pixels(frame)
            while place < len(wanted) and wanted[place] == number:
                yield pixels
                place += 1
            if place == len(wanted):
                return
    raise SampleError(f"frame {wanted[place]} of {index.count} cannot be decoded")


def read_image(path: Path) -> Image.Image:
    """Return an image as RGB, upright.

    Raises:
        UnreadableError: the file is missing or no whole image.
        SampleError: the storage failed.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits, which RGB would clip
                grey = np.asarray(image).astype(np.float64) / 257
                return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise UnreadableError("no image, or of an unknown kind") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _failure(error) from error


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image, upright, without decoding it.

    Raises:
        UnreadableError: the file is missing or no image.
        SampleError: the storage failed.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            height, width = file.height, file.width
            turned = file.getexif().get(0x0112, 1) >= 5
    except Image.UnidentifiedImageError as error:
        raise UnreadableError("no image, or of an unknown kind") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _failure(error) from error
    return (width, height) if turned else (height, width)


class _Video:
    """Hold an open video; one thread at a time."""

    def __init__(self, path: Path) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self.container = av.open(str(path))
        streams = self.container.streams.video
        if not streams:
            self.container.close()
            raise UnreadableError("it has no video stream")
        self.stream = streams[0]
        for stream in self.container.streams:
            if stream.index != self.stream.index and hasattr(stream, "discard"):  # av >= 16
                stream.discard = 48  # all: sound is skipped, not read
        # Many files are read at once; threads within one would multiply memory and wait for frames.
        self.stream.codec_context.thread_count = 1
        self._convert = VideoReformatter()
        #: What a failure means: for the row, until decoding begins; then for these frames alone.
        self.failure: type[SampleError] = UnreadableError

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.container.close()
        if error is not None and _is_medium(error):
            raise _failure(error, self.failure) from error

    def frames(self) -> Iterator[Any]:
        """Decode from where the file stands."""
        return iter(self.container.decode(self.stream))

    def by_time(self, index: Index, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Decode from the keyframe before the first wanted frame; yield (place, frame)."""
        places = {index.times[place]: place for place in wanted}
        last = index.times[wanted[-1]]
        # Should seeking land too late, or the keyframe prove to be none, earlier ones are tried.
        earlier = list(index.keys[: bisect_right(index.keys, wanted[0])])[-1:-4:-1]
        starts = [place for place in earlier if place > 0] + [0]
        for attempt, start in enumerate(starts):
            if attempt or start:
                self.container.seek(index.times[start], stream=self.stream, backward=True)
            got = self._from(places, last, index.times[start], retry=start > 0)
            first = next(got, None)
            if first is not None and first[0] == wanted[0]:
                yield first
                yield from got
                return
            got.close()

    def _from(
        self, places: dict[int, int], last: int, start: int, *, retry: bool
    ) -> Iterator[tuple[int, Any]]:
        """Yield wanted frames; end at once if the file stands behind `start` and may retry."""
        decoded = False
        for packet in self.container.demux(self.stream):
            if not decoded and retry and packet.pts is not None and packet.pts > start:
                return
            decoded = True
            for frame in packet.decode():
                if frame.pts in places:
                    yield places[frame.pts], frame
                if frame.pts is not None and frame.pts >= last:
                    return

    def pixels(self, frame: Any) -> Pixels:
        """Return a frame as uint8 [H, W, 3], upright."""
        array: Pixels = self._convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.rot90(array, turns) if turns else array


def _opened(path: Path) -> _Video:
    """Open a video; whatever the media library says against it becomes a SampleError."""
    try:
        if path.stat().st_size == 0:
            raise UnreadableError("the file is empty")
        return _Video(path)
    except SampleError:
        raise
    except Exception as error:
        if not _is_medium(error):
            raise
        raise _failure(error) from error


def _scan(file: _Video, size: int) -> Index:
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
    _cut_off(file, count, size, float(span * file.stream.time_base))
    if count == 0:
        raise UnreadableError("it holds no frame" + (" that is whole" if damaged else ""))
    exact = (
        not unknown
        and not damaged
        and len(set(times)) == count
        and file.stream.codec_context.name not in _HIDDEN
    )
    if not exact:
        return Index(range(count), (0,), exact=False, fps=_rate(file.stream))
    ordered = sorted(times)
    places = {time: place for place, time in enumerate(ordered)}
    return Index(
        np.array(ordered).tolist(),
        sorted(places[start] for start in starts),
        exact=True,
        fps=_rate(file.stream),
    )


def _cut_off(file: _Video, count: int, size: int, seconds: float) -> None:
    """Raise if a file ends before the frames that its own header or index promises."""
    promised = file.stream.frames
    if "mp4" in file.container.format.name:
        # An edit may hide frames that the header counts, so only the bytes prove it.
        entries = file.stream.index_entries
        if entries and max(e.pos + e.size for e in entries) > size:
            whole = sum(e.pos + e.size <= size for e in entries)
            raise UnreadableError(f"the file is cut off: {whole} of {len(entries)} frames are left")
    elif count < promised * (1 - _MISCOUNT) - 1:
        raise UnreadableError(f"the file is cut off: {count} of {promised} frames are left")
    elif seconds and "matroska" in file.container.format.name:
        promise = _seconds(file)
        if seconds < 0.95 * promise - 0.1:
            raise UnreadableError(
                f"the file is cut off: {seconds:.2f} of {promise:.2f} seconds are left"
            )


def _seconds(file: _Video) -> float:
    """Return how long a Matroska header says that the video is, 0 if it does not."""
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", file.stream.metadata.get("DURATION", ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    alone = len(file.container.streams) == 1 and file.container.duration
    return float(file.container.duration) / 1e6 if alone else 0.0


def _rate(stream: Any) -> float:
    """Return the average frames per second, 0 if the container does not say."""
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate and 0 < rate < 1000 else 0.0


def _is_medium(error: BaseException) -> bool:
    """Tell failures of the file or its storage from faults of this program."""
    from av.error import FFmpegError

    return isinstance(error, FFmpegError | OSError)


def _failure(error: BaseException, kind: type[SampleError] = UnreadableError) -> SampleError:
    """Return what a failure means for the row; storage may do better the next time."""
    number = getattr(error, "errno", None)
    reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
    if reason.startswith("Invalid data"):
        reason = "damaged or cut off, or no media file (invalid data found)"
    kind = SampleError if number in _PASSING else kind
    return kind(reason[0].lower() + reason[1:])


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
