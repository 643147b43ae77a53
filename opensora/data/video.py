"""Read frames of videos and images by exact index, decoding no more than they need.

A file's packets are read once, without decoding them: their timestamps in order are its frames. To
read frames, the last keyframe shown no later than the first of them is sought, and decoding goes
on from there to the last of them. Files whose packets are not their frames (no timestamps, or
hidden frames as in VP8) are decoded from the start and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from opensora.data.batch import SampleError
from opensora.data.media_file import Pixels, open_video
from opensora.data.quarantine import UnreadableError
from opensora.data.video_index import index_of, rate


def video_facts(path: Path) -> tuple[int, int, int, float]:
    """Return frames, height, width and frames per second of a video, as it is to be shown.

    The first frame is decoded: it tells the rotation, and whether this is a video at all.

    Raises:
        UnreadableError: it is none.
        SampleError: the storage failed.
    """
    with open_video(path) as file:
        count, fps = file.stream.frames, rate(file.stream)
        with closing(file.frames()) as frames:
            first = next(frames, None)
        if first is None:
            raise UnreadableError("no frame of it can be decoded")
        height, width = first.height, first.width
        if first.rotation % 180:
            height, width = width, height
    return count or index_of(path).count, height, width, fps


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
    with open_video(path) as file:
        file.failure = SampleError
        place, pixels = 0, None
        with closing(file.by_time(index, wanted) if index.exact else file.frames()) as frames:
            for number, frame in frames if index.exact else enumerate(frames):
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
