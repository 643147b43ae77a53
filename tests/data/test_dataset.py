"""Test datasets of tables on real and generated files."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.data.batch import SampleError, Size
from opensora.data.dataset import DATASETS, VariableVideoTextDataset, build_dataset
from opensora.data.loader import Loader
from opensora.data.plan import make_plan
from opensora.data.quarantine import UnreadableError
from opensora.errors import UsageError

from .conftest import decode_all, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 40)
    write_video(folder / "fast.mp4", 40, fps=30)
    write_video(folder / "short.mp4", 8)
    whole = write_video(folder / "whole.mp4", 40, container={"movflags": "+faststart"})
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[:6000])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(
        folder / "image.png"
    )
    (folder / "meta.csv").write_text(
        "path,text,num_frames,height,width,fps\n"
        "a.mp4,a clip,40,48,64,25\n"
        "fast.mp4,fast,,,,\n"
        "image.png,an image,,,,\n"
        "cut.mp4,cut off,,,,\n"
        "none.mp4,missing,,,,\n"
        "short.mp4,short,40,48,64,25\n"
        "fast.mp4,no rate,41,48,64,\n"
    )
    return folder


def load(dataset: VariableVideoTextDataset, index: int, size: Size, seed: int = 0):  # type: ignore[no-untyped-def]
    return dataset.load(index, size, random.Random(seed))


def test_entries_say_what_files_hold(folder: Path) -> None:
    dataset = VariableVideoTextDataset(folder / "meta.csv")
    facts = [(e.num_frames, e.height, e.width, e.fps) for e in dataset.entries()]
    assert facts == [
        (40, 48, 64, 25.0),
        (40, 48, 64, 30.0),
        (1, 60, 80, 0.0),
        (40, 48, 64, 25.0),  # its header is whole
        (0, 0, 0, 0.0),
        (40, 48, 64, 25.0),
        (41, 48, 64, 0.0),  # the rate can wait
    ]
    assert dataset.problems == {4: "no such file or directory"}
    assert dataset.entries()[0].name == "meta.csv:2 a.mp4"


def test_clips_begin_anywhere_and_are_what_a_full_decode_holds(folder: Path) -> None:
    dataset = VariableVideoTextDataset(folder / "meta.csv", frame_interval=2)
    whole = torch.from_numpy(np.stack(decode_all(folder / "a.mp4"))).permute(3, 0, 1, 2)
    whole = whole / 255 * 2 - 1
    starts = set()
    for seed in range(32):
        sample = load(dataset, 0, Size(17, 48, 64), seed)
        assert sample.video.shape == (3, 17, 48, 64)
        start = next(i for i in range(7) if torch.allclose(whole[:, i], sample.video[:, 0]))
        starts.add(start)
        # 17 frames are spread over 34.
        wanted = np.linspace(start, start + 33, 17).astype(int)
        torch.testing.assert_close(sample.video, whole[:, wanted])
    assert starts == set(range(7))
    assert (sample.text, sample.fps) == ("a clip", 12.0)


def test_rates(folder: Path) -> None:
    dataset = VariableVideoTextDataset(folder / "meta.csv", frame_interval=4)
    assert load(dataset, 1, Size(5, 48, 64)).fps == 7.0  # 30 // 4
    assert load(dataset, 6, Size(5, 48, 64)).fps == 7.0
    image = load(dataset, 2, Size(1, 30, 40))
    assert (image.fps, image.video.shape) == (120.0, (3, 1, 30, 40))


def test_rows_that_cannot_be_read_say_why(folder: Path) -> None:
    dataset = VariableVideoTextDataset(folder / "meta.csv")
    with pytest.raises(UnreadableError, match="cut off"):
        load(dataset, 3, Size(5, 48, 64))
    with pytest.raises(UnreadableError, match="no such file"):
        load(dataset, 4, Size(5, 48, 64))
    with pytest.raises(UnreadableError, match="the table says 40 frames, the file holds 8"):
        load(dataset, 5, Size(5, 48, 64))
    with pytest.raises(SampleError, match="41 frames are wanted, the file holds 40"):
        load(dataset, 6, Size(41, 48, 64))


def test_fixed_size_repeats_images_and_crops(folder: Path) -> None:
    dataset = build_dataset(
        {
            "type": "VideoTextDataset",
            "data_path": str(folder / "meta.csv"),
            "num_frames": 9,
            "image_size": (32, 32),
            "frame_interval": 3,
        }
    )
    assert dataset.size == (9, 32, 32)  # type: ignore[attr-defined]
    image = dataset.load(2, dataset.size, random.Random(0))  # type: ignore[attr-defined]
    assert image.video.shape == (3, 9, 32, 32)
    assert (image.video == image.video[:, :1]).all()
    assert dataset.load(0, dataset.size, random.Random(0)).fps == 8.0  # type: ignore[attr-defined]


def test_probing_is_remembered_until_files_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import opensora.data.probe as probe

    cache, seen = tmp_path / "probe.json", []
    original = probe.probe
    monkeypatch.setattr(probe, "probe", lambda path: seen.append(path.name) or original(path))
    first = VariableVideoTextDataset(folder / "meta.csv", probe_cache=cache)
    assert sorted(seen) == ["cut.mp4", "fast.mp4", "image.png", "none.mp4"]
    seen.clear()
    second = VariableVideoTextDataset(folder / "meta.csv", probe_cache=cache)
    assert seen == ["none.mp4"]
    assert second.entries() == first.entries()
    cache.write_text("{broken")
    assert VariableVideoTextDataset(folder / "meta.csv", probe_cache=cache).entries()


def test_a_run_over_a_table_with_bad_rows(folder: Path) -> None:
    dataset = build_dataset({"type": "VariableVideoTextDataset", "data_path": folder / "meta.csv"})
    config = {"144p": {17: (1.0, 3), 1: (1.0, 1)}}
    large = [
        row.__class__(row.name, row.num_frames, row.height * 4, row.width * 4, row.fps)
        for row in dataset.entries()
    ]
    sampler = make_plan(dataset, bucket_config=config, seed=1).sampler(large)
    runs = []
    for workers in (0, 2):
        run = Loader(dataset, sampler, workers=workers, epochs=2)
        runs.append(list(run.batches()))
    assert [b.names for b in runs[0]] == [b.names for b in runs[1]]
    assert any(batch.failed for batch in runs[0])
    for one, two in zip(*runs, strict=True):
        assert one.failed == two.failed
        if len(one):
            assert one.video.equal(two.video)
            assert one.video.shape == (len(one), 3, *one.size)
            assert one.video.abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "VideoTextDatset"}, "did you mean VideoTextDataset"),
        ({"type": None}, "unknown dataset type None"),
        ({"frame_intervall": 2}, "'frame_intervall'; did you mean frame_interval"),
        ({"frame_interval": 0}, "frame_interval must be a whole number"),
        ({"frame_interval": "3"}, "frame_interval must be a whole number"),
        ({"transform_name": "center"}, "unknown transform_name 'center'"),
        ({"data_path": None}, "no table of clips"),
        ({"type": "VideoTextDataset"}, "needs num_frames and image_size"),
        ({"type": "VideoTextDataset", "num_frames": 9, "image_size": (32,)}, "height, width"),
        ({"type": "VideoTextDataset", "num_frames": 9, "image_size": (32, 48)}, "makes squares"),
        ({"type": "VideoTextDataset", "num_frames": 0, "image_size": 32}, "number of frames"),
    ],
)
def test_rejects_what_cannot_be(folder: Path, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_dataset({"data_path": folder / "meta.csv", **settings})


def test_other_types_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "Mine", lambda path=None: ["mine", path])
    assert build_dataset({"type": "Mine", "path": 3}) == ["mine", 3]
