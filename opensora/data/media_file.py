"""Open video files and decode from any keyframe; say what a failure means for a row."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av  # here, not in a thread: several that import it at once see it half imported
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from opensora.data.batch import SampleError
from opensora.data.quarantine import UnreadableError

if TYPE_CHECKING:
    from opensora.data.video_index import Index

Pixels = npt.NDArray[np.uint8]

#: What may be over the next time: network folders.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENOMEM)


class VideoFile:
    """Hold an open video; one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.container = av.open(str(path))
        streams = self.container.streams.video
        if not streams:
            self.container.close()
            raise UnreadableError("it has no video stream, or its header is cut off")
        self.stream = streams[0]
        others: list[Any] = [s for s in self.container.streams if s.index != self.stream.index]
        for stream in others:
            if hasattr(stream, "discard"):  # av >= 16
                stream.discard = 48  # all: sound is skipped, not read
        # Many files are read at once; threads within one would multiply memory and wait for frames.
        self.stream.codec_context.thread_count = 1
        self._convert = VideoReformatter()
        #: What a failure means: for the row, until decoding begins; then for these frames alone.
        self.failure: type[SampleError] = UnreadableError

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.container.close()
        if error is not None and is_medium(error):
            raise failure(error, self.failure) from error

    def frames(self) -> Generator[Any, None, None]:
        """Decode from where the file stands; close it before the file."""
        with self._packets() as packets:
            for packet in packets:
                yield from packet.decode()

    def _packets(self) -> closing[Any]:
        """Return packets for a `with` block: av frees its own only if it is closed or ends."""
        return closing(self.container.demux(self.stream))

    def by_time(
        self, index: Index, wanted: Sequence[int]
    ) -> Generator[tuple[int, Any], None, None]:
        """Decode from the keyframe before the first wanted frame; yield (place, frame).

        Close it before the file.
        """
        places = {index.times[place]: place for place in wanted}
        last = index.times[wanted[-1]]
        # Should seeking land too late, or the keyframe prove to be none, earlier ones are tried.
        earlier = list(index.keys[: bisect_right(index.keys, wanted[0])])[-1:-4:-1]
        starts = [place for place in earlier if place > 0] + [0]
        for attempt, start in enumerate(starts):
            if attempt or start:
                self.container.seek(index.times[start], stream=self.stream, backward=True)
            with closing(self._from(places, last, index.times[start], retry=start > 0)) as got:
                first = next(got, None)
                if first is not None and first[0] == wanted[0]:
                    yield first
                    yield from got
                    return

    def _from(
        self, places: dict[int, int], last: int, start: int, *, retry: bool
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield wanted frames; end at once if the file stands behind `start` and may retry."""
        decoded = False
        with self._packets() as packets:
            for packet in packets:
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
        rgb: Any = self._convert.reformat(frame, format="rgb24", threads=1)
        array: Pixels = rgb.to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.rot90(array, turns) if turns else array


def open_video(path: Path) -> VideoFile:
    """Open a video; whatever the media library says against it becomes a SampleError."""
    try:
        if path.stat().st_size == 0:
            raise UnreadableError("the file is empty")
        return VideoFile(path)
    except SampleError:
        raise
    except Exception as error:
        if not is_medium(error):
            raise
        raise failure(error) from error


def is_medium(error: BaseException) -> bool:
    """Tell failures of the file or its storage from faults of this program."""
    return isinstance(error, FFmpegError | OSError)


def failure(error: BaseException, kind: type[SampleError] = UnreadableError) -> SampleError:
    """Return what a failure means for the row; storage may do better the next time."""
    number = getattr(error, "errno", None)
    reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
    if reason.startswith("Invalid data"):
        reason = "damaged or cut off, or no media file (invalid data found)"
    kind = SampleError if number in _PASSING else kind
    return kind(reason[0].lower() + reason[1:])
