"""Features read back are what the models gave; files of others are read, and run no code."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import pkgutil
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opensora.data.batch import Entry, Sample, SampleError, Size
from opensora.data.dataset import build_dataset
from opensora.data.feature_bins import BatchFeatureDataset
from opensora.data.feature_npz import NpzFeatures
from opensora.data.feature_sampler import StoredSampler
from opensora.data.feature_shards import FeatureRow, FeatureWriter, read_rows
from opensora.data.features import CachedFeatures, TextFeatures, WithTextFeatures, normal
from opensora.data.loader import Loader
from opensora.errors import NonFiniteError, UsageError
from opensora.extract_config import ExtractConfig
from opensora.extract_features import extract, main, run
from opensora.feature_encoders import Encoders, digests
from opensora.models.stdit import STDiT3
from opensora.pipeline import OpenSoraPipeline
from opensora.pipeline_parts import PipelineParts

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.usefixtures("one_thread"),
]

ROOT = Path(__file__).parents[2]
SIZE = Size(5, 16, 24)


def write_table(folder: Path, count: int) -> Path:
    """Write small pictures with captions; datasets repeat a to the length of a clip."""
    rng = np.random.default_rng(0)
    lines = ["path,text,num_frames,height,width"]
    for i in range(count):
        pixels = rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((54, 40)).save(folder / f"{i:02d}.png")
        lines.append(f"{i:02d}.png,{'a ' * (1 + i % 3)}of {i},1,40,54")
    (folder / "meta.csv").write_text("\n".join(lines) + "\n")
    return folder / "meta.csv"


def settings(table: Path, pipeline: Path, outputs: Path, **changes: Any) -> ExtractConfig:
    config = ExtractConfig(
        dataset={
            "type": "VideoTextDataset",
            "data_path": str(table),
            "num_frames": SIZE.frames,
            "image_size": (SIZE.height, SIZE.width),
            "transform_name": "resize_crop",
        },
        ckpt_path=str(pipeline),
        outputs=str(outputs),
        save_text_features=True,
        features_dtype="fp32",
        dtype="fp32",
        device="cpu",
        num_workers=2,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> ExtractConfig:
    """Extract six rows; returns the settings. Tests that write must copy the folder."""
    folder = tmp_path_factory.mktemp("table")
    config = settings(write_table(folder, 6), pipeline_folder, folder / "features", bin_size=4)
    assert run(config) == 6
    return config


def online(config: ExtractConfig, index: int) -> Sample:
    assert config.dataset is not None
    return build_dataset(config.dataset).load(index, SIZE, random.Random(f"1024/0/{index}"))


@torch.no_grad()
def test_features_are_what_the_models_give(extracted: ExtractConfig, pipeline_folder: Path) -> None:
    pipe = OpenSoraPipeline.from_pretrained(pipeline_folder, device="cpu", progress=False)
    features = CachedFeatures(extracted.outputs)
    means = CachedFeatures(extracted.outputs, random_latents=False)
    assert [entry.name for entry in features.entries()] == [f"{i:02d}.png" for i in range(6)]
    assert features.sizes() == [[SIZE]] * 6
    for index in range(6):
        sample = online(extracted, index)
        assert sample.video is not None
        video = sample.video[None]
        cached = means.load(index, SIZE, random.Random(0))
        assert cached.latent is not None
        assert cached.states is not None
        torch.testing.assert_close(cached.latent[None], pipe.vae.encode(video, sample=False))
        y, mask = pipe.text_encoder.encode([(sample.text or "").strip()])
        torch.testing.assert_close(cached.states, y[0, 0, mask[0] == 1])
        assert cached.text == sample.text
        assert cached.fps == sample.fps
        _, std = pipe.vae.encode_distribution(video)
        drawn = [features.load(index, SIZE, random.Random(s)).latent for s in (1, 1, 2)]
        assert drawn[0] is not None
        assert drawn[2] is not None
        noise = normal(cached.latent.shape, random.Random(1).getrandbits(63))
        torch.testing.assert_close(drawn[0], cached.latent + std[0] * noise)
        assert torch.equal(drawn[0], drawn[1])  # type: ignore[arg-type]
        assert not torch.equal(drawn[0], drawn[2])


def test_deviation_is_that_of_draws(pipeline_folder: Path) -> None:
    vae = OpenSoraPipeline.from_pretrained(pipeline_folder, progress=False).vae
    video = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        _, std = vae.encode_distribution(video)
        spatial = vae.spatial_encode(video)
        still = [torch.zeros_like(spatial.mean.transpose(1, 2).flatten(0, 1))[:n] for n in (4, 1)]
        draws = [
            vae.encode(video, noise=[*still, torch.full_like(std, value)]) for value in (0.0, 1.0)
        ]
    torch.testing.assert_close(draws[1] - draws[0], std, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_model_sees_the_same_with_stored_text(
    extracted: ExtractConfig, pipeline_folder: Path
) -> None:
    pipe = OpenSoraPipeline.from_pretrained(pipeline_folder, device="cpu", progress=False)
    model: STDiT3 = pipe.transformer
    features = CachedFeatures(extracted.outputs, random_latents=False)
    sampler = features.sampler(batch_size=3, shuffle=False)
    batch = next(Loader(features, sampler, workers=0).batches())
    assert batch.text is None
    assert batch.states is not None
    assert batch.mask is not None
    assert batch.latent is not None
    assert len(set(batch.mask.sum(1).tolist())) == 3
    texts = [(online(extracted, i).text or "").strip() for i in range(3)]
    y, mask = pipe.text_encoder.encode(texts)
    told = {name: batch.conditions[name] for name in ("fps", "height", "width")}

    def predict(states: Tensor, seen: Tensor, dropped: Sequence[int]) -> Tensor:
        length = model.config.model_max_length
        states = torch.nn.functional.pad(states, (0, 0, 0, length - states.shape[2]))
        seen = torch.nn.functional.pad(seen, (0, length - seen.shape[1]))
        t, drop = torch.full((3,), 500.0), torch.tensor(dropped)
        return model(batch.latent, t, states, seen, force_drop_ids=drop, **told)

    for dropped in ([0, 0, 0], [0, 1, 0], [1, 1, 1]):
        torch.testing.assert_close(
            predict(batch.states, batch.mask, dropped), predict(y, mask, dropped)
        )


EXTRACT = """
import sys, time
from opensora.data.feature_shards import FeatureWriter
from opensora.extract_features import main
flush = FeatureWriter.flush
FeatureWriter.flush = lambda self: (time.sleep(0.04), flush(self))  # so that there is time to kill
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_extraction_goes_on(tmp_path: Path, pipeline_folder: Path) -> None:
    table = write_table(tmp_path, 16)
    config = settings(table, pipeline_folder, tmp_path / "killed", bin_size=1)
    file = tmp_path / "config.py"
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in given.items()))
    process = subprocess.Popen(
        [sys.executable, "-c", EXTRACT, str(file)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = Path(config.outputs)
    try:
        until = time.monotonic() + 100
        while len(list(folder.glob("shard-*"))) < 3 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
    before = {p.name: p.read_bytes() for p in folder.glob("shard-*")}
    assert 3 <= len(before) < 16, said
    (folder / "index.jsonl").open("ab").write(b'{"shard": "shard-000')  # as a power cut leaves it
    assert run(config) == 16 - len(before)
    assert run(config) == 0
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    whole = dataclasses.replace(config, outputs=str(tmp_path / "whole"), bin_size=7)
    assert run(whole) == 16
    pair = [CachedFeatures(c.outputs, random_latents=False) for c in (config, whole)]
    rows = [{e.name: i for i, e in enumerate(c.entries())} for c in pair]
    assert len(rows[0]) == 16
    assert rows[0].keys() == rows[1].keys()
    for name in rows[0]:
        one, other = (
            c.load(r[name], SIZE, random.Random(0)) for c, r in zip(pair, rows, strict=True)
        )
        torch.testing.assert_close(one.latent, other.latent)
        torch.testing.assert_close(one.states, other.states)
        assert (one.text, one.fps) == (other.text, other.fps)
    index = folder / "index.jsonl"
    read = list(read_rows(folder))
    index.unlink()
    assert list(read_rows(folder)) == read


def test_other_models_and_settings_are_refused(
    extracted: ExtractConfig, pipeline_folder: Path
) -> None:
    features = CachedFeatures(extracted.outputs)
    own = digests(PipelineParts.find(pipeline_folder))
    features.check(**own)
    features.check(vae=own["vae"])
    tiny = digests(PipelineParts.find("tiny"))
    with pytest.raises(UsageError, match=r"another VAE \(.*extract them again"):
        features.check(**tiny)
    with pytest.raises(UsageError, match="another text encoder"):
        features.check(vae=own["vae"], text_encoder=tiny["text_encoder"])
    CachedFeatures(extracted.outputs, load_text_features=False).check(
        vae=own["vae"], text_encoder=tiny["text_encoder"]
    )
    for change in (
        {"ckpt_path": "tiny"},
        {"features_dtype": "bf16"},
        {"save_text_features": False},
    ):
        with pytest.raises(UsageError, match="holds features made with"):
            run(dataclasses.replace(extracted, **change))


def test_changed_captions_and_overwrite_encode_again(tmp_path: Path, pipeline_folder: Path) -> None:
    table = write_table(tmp_path, 3)
    config = settings(table, pipeline_folder, tmp_path / "features")
    assert run(config) == 3
    text = table.read_text().replace("of 1", "of one")
    header, rest = text.split("\n", 1)
    rows = rest.strip().split("\n")
    table.write_text("\n".join([header, *reversed(rows)]) + "\n")  # lines move, rows stay
    assert run(config) == 1
    features = CachedFeatures(config.outputs)
    assert [e.name for e in features.entries()] == ["00.png", "01.png", "02.png"]
    assert features.load(1, SIZE, random.Random(0)).text == "a a of one"
    assert run(dataclasses.replace(config, overwrite=True, start_index=1, end_index=3)) == 2
    assert run(config) == 0


def test_bad_rows_are_left_out_with_a_reason(tmp_path: Path, pipeline_folder: Path) -> None:
    table = write_table(tmp_path, 3)
    (tmp_path / "01.png").write_bytes((tmp_path / "01.png").read_bytes()[:60])
    config = settings(table, pipeline_folder, tmp_path / "features")
    said: list[str] = []
    assert run(config, said.append) == 2
    assert any("left out: 01.png" in line for line in said)
    assert any("3/3 rows" in line and "1 left out" in line for line in said)
    assert "01.png" in (tmp_path / "features/quarantine.jsonl").read_text()


def test_program_encodes_by_buckets_with_the_built_in_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path, 3)
    for name in ("00", "01"):
        Image.open(tmp_path / f"{name}.png").resize((256, 144)).save(tmp_path / f"{name}.png")
    lines = [line.replace("1,40,54", "1,144,256") for line in table.read_text().split("\n")]
    lines[3] = lines[3].replace("1,144,256", "1,40,54")  # too small for every bucket
    table.write_text("\n".join(lines))
    config = tmp_path / "extract.py"
    config.write_text(
        'dataset = dict(type="VariableVideoTextDataset", transform_name="resize_crop")\n'
        'bucket_config = {"144p": {1: (1.0, 2), 51: (1.0, 1)}}\n'
        'model = dict(type="STDiT3-XL/2", qk_norm=True)\nnum_bucket_build_workers = 16\n'
        "save_text_features = True\nsave_compressed_text_features = True\nwandb = False\n"
    )
    out = tmp_path / "features"
    arguments = [str(config), "--data-path", str(table), "--outputs", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "2 rows encoded" in printed.out
    assert "1 rows fit no bucket or cannot be read" in printed.err
    features = CachedFeatures(out)
    size = Size(1, 144, 256)
    assert features.sizes() == [[size]] * 2
    latent = features.load(0, size, random.Random(0)).latent
    assert latent is not None
    assert latent.shape[1:] == (1, 18, 32)
    sampler = features.sampler(bucket_config={"144p": {1: (0.5, 2)}})
    assert [(b.bucket, b.size) for b in sampler.epoch(0)] == [("144p 1 0.56", size)]
    assert main([*arguments, "--features-dtype", "fp32"]) == 2


def test_text_alone_is_stored_and_joined_to_other_datasets(
    tmp_path: Path, extracted: ExtractConfig, pipeline_folder: Path
) -> None:
    assert extracted.dataset is not None
    table = Path(extracted.dataset["data_path"])
    config = settings(table, pipeline_folder, tmp_path / "texts", save_latents=False)
    assert run(config) == 6
    assert run(config) == 0
    with pytest.raises(UsageError, match="holds no latents"):
        CachedFeatures(config.outputs)
    (tmp_path / "gone.csv").write_text("video,caption\nnowhere.mp4,a thing\n")
    gone = settings(tmp_path / "gone.csv", pipeline_folder, tmp_path / "gone", save_latents=False)
    assert run(gone) == 1
    assert TextFeatures(gone.outputs).states("a thing").shape[1] == 24
    joined: Any = build_dataset(
        {"type": "WithTextFeatures", "dataset": extracted.dataset, "features": config.outputs}
    )
    stored = CachedFeatures(extracted.outputs)
    assert joined.size == SIZE
    for index in range(6):
        sample = joined.load(index, SIZE, random.Random(0))
        assert sample.video is not None
        torch.testing.assert_close(sample.states, stored.load(index, SIZE, random.Random(0)).states)
    with pytest.raises(SampleError, match="no states of the text 'unknown'"):
        TextFeatures(config.outputs).states("unknown")
    latents = CachedFeatures(extracted.outputs, load_text_features=False)
    assert latents.load(0, SIZE, random.Random(0)).states is None
    both = WithTextFeatures(latents, config.outputs)
    both.check(**digests(PipelineParts.find(pipeline_folder)))
    with pytest.raises(UsageError, match="another text encoder"):
        both.check(text_encoder="sha256:other")


def test_values_that_do_not_fit_are_refused() -> None:
    class Huge:
        def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
            return torch.full((1, 1, 2, 3), 1e6), torch.ones(1, 2)

    with pytest.raises(NonFiniteError, match=r"beyond torch.float16; use --features-dtype fp32"):
        Encoders(text_encoder=Huge()).encode([Sample(text="")])


def test_a_clip_of_bad_values_is_left_out_alone(tmp_path: Path, pipeline_folder: Path) -> None:
    table = write_table(tmp_path, 4)
    config = settings(table, pipeline_folder, tmp_path / "features", batch_size=3, num_workers=1)
    dataset = build_dataset(config.dataset or {})

    class Brittle(Encoders):
        def encode(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
            if any("of 1" in (sample.text or "") for sample in samples):
                raise NonFiniteError("NaN")
            return [{"text": torch.ones(1, 1)} for _ in samples]

    writer = FeatureWriter(tmp_path / "features", {"text_encoder": "x"})
    assert extract(config, dataset, Brittle(), writer) == 3
    assert "01.png" in (tmp_path / "features/quarantine.jsonl").read_text()
    alone = dataclasses.replace(config, start_index=1, end_index=2)
    with pytest.raises(NonFiniteError):
        extract(alone, dataset, Brittle(), FeatureWriter(tmp_path / "other", {}))


def fill(folder: Path, rows: int, sizes: Sequence[Size], per_shard: int = 25) -> None:
    with FeatureWriter(folder, {"latent": "distribution"}, per_shard) as writer:
        for i in range(rows):
            for size in sizes:
                mean = torch.full((4, size.frames, size.height // 8, size.width // 8), float(i))
                text = torch.full((1 + i % 5, 8), float(i))
                writer.add(
                    FeatureRow(f"{i}", size, 24.0, f"text {i}"),
                    {"mean": mean, "std": torch.zeros_like(mean), "text": text},
                )


def test_a_size_is_drawn_for_every_row_and_epoch(tmp_path: Path) -> None:
    sizes = [Size(1, 64, 64), Size(1, 64, 128), Size(1, 128, 64)]
    fill(tmp_path, 40, sizes)
    features = CachedFeatures(tmp_path)
    sampler = features.sampler(batch_size=4, seed=3, drop_last=False)
    first = sampler.epoch(0)
    assert first == features.sampler(batch_size=4, seed=3, drop_last=False).epoch(0)
    drawn = [{i: b.size for b in sampler.epoch(epoch) for i in b.indices} for epoch in (0, 1)]
    assert drawn[0].keys() == drawn[1].keys() == set(range(40))
    assert 10 < sum(drawn[0][i] != drawn[1][i] for i in range(40)) < 40
    assert set(drawn[0].values()) == set(sizes)
    batches = list(Loader(features, sampler, workers=2, epochs=1).batches())
    assert len(batches) == sampler.length(0) == len(first)
    for batch, planned in zip(batches, first, strict=True):
        assert batch.names == [str(i) for i in planned.indices]
        assert batch.latent is not None
        assert batch.latent.shape[3:] == (planned.size.height // 8, planned.size.width // 8)
        assert batch.latent[:, 0, 0, 0, 0].tolist() == [float(i) for i in planned.indices]


def test_sizes_without_a_batch_size_are_left_out() -> None:
    known, other = Size(1, 144, 256), Size(1, 64, 64)
    rows = [[known], [other], [known, other], []]
    sampler = StoredSampler(rows, bucket_config={"144p": {1: (0.0, 1)}})
    assert {i for b in sampler.epoch(0) for i in b.indices} == {0, 2}
    assert sampler.left_out == {other: 2}
    with pytest.raises(UsageError, match=r"no entry for the sizes that are stored \(1x64x64"):
        StoredSampler([[other]], bucket_config={"144p": {1: (1.0, 1)}})
    with pytest.raises(UsageError, match="need bucket_config, or batch_size"):
        StoredSampler(rows)


def test_damage_sets_rows_aside(tmp_path: Path) -> None:
    size = Size(1, 64, 64)
    fill(tmp_path, 60, [size])
    features = CachedFeatures(tmp_path)
    shards = sorted(tmp_path.glob("shard-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    shards[1].unlink()
    for row in (0, 30):
        with pytest.raises(SampleError, match="cannot be read"):
            features.load(row, size, random.Random(0))
    assert features.load(55, size, random.Random(0)).text == "text 55"
    with pytest.raises(SampleError, match=r"stored at 1x64x64 .* not at 1x64x72"):
        features.load(55, Size(1, 64, 72), random.Random(0))
    (tmp_path / "index.jsonl").unlink()
    with pytest.raises(UsageError, match=r"shard-00000.safetensors is damaged .* remove it"):
        CachedFeatures(tmp_path)
    shards[0].unlink()
    assert len(CachedFeatures(tmp_path).entries()) == 10
    with pytest.raises(UsageError, match=r"holds no features.json"):
        CachedFeatures(tmp_path / "none")


FLAT = """
import random, sys
import torch
from opensora.data.features import CachedFeatures

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

features = CachedFeatures(sys.argv[1])
(size,) = features.sizes()[0]
rng = random.Random(0)
for i in range(12_000):
    features.load(rng.randrange(1000), size, rng)
    if i == 2_000:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_stays_flat_over_ten_thousand_loads(tmp_path: Path) -> None:
    fill(tmp_path, 1000, [Size(2, 64, 128)])
    run = subprocess.run(
        [sys.executable, "-c", FLAT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4 << 20


class Planted:
    """Leave a mark when it is unpickled by a reader that trusts the file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def clip(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "x": torch.full((4, 3, 4, 6), float(i), dtype=torch.bfloat16),
        "text": f"text {i}",
        "fps": torch.tensor(24.0),
        "height": torch.tensor(32),
        "width": torch.tensor(48),
        "num_frames": torch.tensor(9),
        "y": torch.arange(12.0).reshape(1, 4, 3),
        "mask": torch.tensor([1, 1, 1, 0]),
    } | changes


def test_bin_files_are_read_as_fixed_batches(tmp_path: Path) -> None:
    for number in range(4):
        clips = [clip(10 * number + i) for i in range(3)]
        torch.save(clips, tmp_path / f"{number:08}.bin", _use_new_zipfile_serialization=number > 0)
    packed = clip(40, y=torch.arange(9.0).reshape(3, 3), mask=torch.tensor(2), text=["text 40"])
    torch.save([packed], tmp_path / "00000004.bin")
    torch.save([clip(50), clip(51, height=64)], tmp_path / "00000005.bin")
    (tmp_path / "00000006.bin").write_bytes((tmp_path / "00000001.bin").read_bytes()[:900])
    features: Any = build_dataset({"type": "BatchFeatureDataset", "data_path": str(tmp_path)})
    size = Size(9, 32, 48)
    assert features.entries()[:3] == [Entry(f"00000000.bin:{i}", *size, 24.0) for i in range(3)]
    sample = features.load(4, size, random.Random(0))
    assert torch.equal(sample.latent, torch.full((4, 3, 4, 6), 11.0))
    assert torch.equal(sample.states, torch.arange(9.0).reshape(3, 3))
    assert (sample.text, sample.fps) == ("text 11", 24.0)
    sample = features.load(12, size, random.Random(0))
    assert torch.equal(sample.states, torch.arange(6.0).reshape(2, 3))
    assert sample.text == "text 40"
    assert ["2 sizes" in p or "damaged" in p for p in features.problems.values()] == [True] * 2
    sampler = features.sampler(seed=1, replicas=2)
    assert sampler.length(0) == 4
    planned = sampler.epoch(0)
    assert {b.indices for b in planned} <= {(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11), (12,)}
    assert planned != sampler.epoch(1)
    assert planned == sampler.epoch(0)
    batch = next(Loader(features, features.sampler(shuffle=False), workers=2).batches())
    assert batch.names == [f"00000000.bin:{i}" for i in range(3)]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[1, 1, 1]] * 3


def test_planted_code_is_never_run(tmp_path: Path) -> None:
    good, mark = tmp_path / "00000000.bin", tmp_path / "ran"
    torch.save([clip(0)], good)
    for number, new in ((1, True), (2, False)):
        planted = [clip(0, text=Planted(mark))]
        torch.save(planted, tmp_path / f"{number:08}.bin", _use_new_zipfile_serialization=new)
    (tmp_path / "00000003.bin").write_bytes(pickle.dumps([clip(0, text=Planted(mark))]))
    features = BatchFeatureDataset(tmp_path)
    assert [len(features.entries()), len(features.problems)] == [4, 3]
    assert all("never loaded" in problem for problem in features.problems.values())
    with pytest.raises(SampleError, match="never loaded"):
        features.load(1, Size(9, 32, 48), random.Random(0))
    good.unlink()
    with pytest.raises(UsageError, match=r"none of the .bin files can be read; .*never loaded"):
        BatchFeatureDataset(tmp_path)
    planted = np.array([Planted(mark)], dtype=object)
    (tmp_path / "v").mkdir()
    table = tmp_path / "table.csv"
    table.write_text("video,caption\na.mp4,one\nb.mp4,two\n")
    ones = np.ones((3, 4, 4, 6), np.float32)
    np.savez(tmp_path / "v/a.npz", latent_mean=ones, fps=planted)
    np.savez(tmp_path / "v/b.npz", latent_mean=ones, latent_std=planted)
    npz = NpzFeatures(table, tmp_path / "v")
    assert "cannot be read" in npz.problems[0]
    with pytest.raises(SampleError, match="allow_pickle"):
        npz.load(1, Size(3, 32, 48), random.Random(0))
    assert not mark.exists()


def test_npz_caches_are_scaled_and_cut(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(
        "video,caption\nclips/a.mp4,one\nclips/b.mp4,two\nclips/c.mp4,three\n"
    )
    for folder in ("latents/latent_32x48/clips", "latents/latent_64x64/clips", "texts/clips"):
        (tmp_path / folder).mkdir(parents=True)
    ramp = np.arange(7, dtype=np.float32)[:, None, None, None]
    for name, shape in (("latent_32x48/clips/a", (4, 6)), ("latent_64x64/clips/a", (8, 8)),
                        ("latent_64x64/clips/b", (8, 8))):  # fmt: skip
        mean = np.broadcast_to(ramp, (7, 4, *shape))
        np.savez(tmp_path / f"latents/{name}.npz", latent_mean=mean, fps=np.float32(30),
                 latent_std=np.full_like(mean, 2), ori_size=np.array([90, 120]))  # fmt: skip
    states = np.arange(20, dtype=np.float32).reshape(5, 4)
    for name in "abc":
        np.savez(tmp_path / f"texts/clips/{name}.npz", text_emb=states[None],
                 mask=np.array([[1, 1, 1, 0, 0]], np.uint8), tokens=np.zeros((1, 5)))  # fmt: skip
    features: Any = build_dataset(
        {
            "type": "NpzFeatures",
            "data_path": str(tmp_path / "table.csv"),
            "vae_latent_folder": str(tmp_path / "latents"),
            "text_embed_folder": str(tmp_path / "texts"),
            "num_frames": 3,
            "frame_interval": 2,
        }
    )
    small, large = Size(3, 32, 48), Size(3, 64, 64)
    assert features.sizes() == [[small, large], [large], []]
    assert features.entries()[2].num_frames == 0
    assert "no latents of clips/c.mp4" in features.problems[2]
    starts = set()
    for seed in range(20):
        rng, again = random.Random(seed), random.Random(seed)
        sample = features.load(0, small, rng)
        start = again.randint(0, 2)
        starts.add(start)
        assert sample.latent.shape == (4, 3, 4, 6)
        noise = normal(torch.Size((3, 4, 4, 6)), again.getrandbits(63)).transpose(0, 1)
        frames = torch.tensor([start, start + 2.0, start + 4.0])[:, None, None]
        torch.testing.assert_close(sample.latent, 0.18215 * (frames + 2 * noise))
    assert starts == {0, 1, 2}
    assert torch.equal(sample.states, torch.from_numpy(states[:3]))
    assert (sample.text, sample.fps) == ("one", 15.0)
    sampler = features.sampler(batch_size=1)
    drawn = {s for epoch in range(8) for s in [sampler.size(epoch, 0)]}
    assert drawn == {small, large}
    assert {i for b in sampler.epoch(0) for i in b.indices} == {0, 1}


MOMENTS = ("save_file", "flush", "os.link", "json.dumps", "os.getpid")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_moment_of_writing_costs_one_shard_at_most(
    tmp_path: Path, moment: str, after: bool
) -> None:
    size = Size(1, 8, 8)

    def add(writer: FeatureWriter, numbers: range) -> None:
        for i in numbers:
            row = FeatureRow(f"{i}", size, 24.0, f"text {i}")
            if row.key not in writer.known:
                writer.add(row, {"latent": torch.full((1, 1, 1, 1), i)})

    add(FeatureWriter(tmp_path, {}, 2), range(4))
    child = os.fork()
    if child == 0:  # ends within the third shard, with no chance to clean up
        patch = pytest.MonkeyPatch()
        name = f"opensora.data.feature_shards.{moment}"
        real = pkgutil.resolve_name(name)

        def die(*arguments: Any, **named: Any) -> None:
            if after:
                real(*arguments, **named)
            os._exit(9)

        try:
            writer = FeatureWriter(tmp_path, {}, 2)
            patch.setattr(name, die)
            add(writer, range(8))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    stored = {row.name for row in read_rows(tmp_path)}
    assert stored in ({"0", "1", "2", "3"}, {"0", "1", "2", "3", "4", "5"})
    with FeatureWriter(tmp_path, {}, 2) as writer:
        assert {name for name, _ in writer.known} == stored
        add(writer, range(8))
    features = CachedFeatures(tmp_path)
    loaded = [features.load(i, size, random.Random(0)) for i in range(8)]
    assert [sample.text for sample in loaded] == [f"text {i}" for i in range(8)]
    assert len(list(tmp_path.glob("shard-*"))) == 4


def test_several_writers_share_a_folder(tmp_path: Path) -> None:
    size = Size(1, 8, 8)
    settings = {"latent": "draw"}
    writers = [FeatureWriter(tmp_path, settings, 2) for _ in range(3)]
    for i in range(12):
        writers[i % 3].add(
            FeatureRow(f"{i}", size, 24.0, ""), {"latent": torch.full((1, 1, 1, 1), i)}
        )
    for writer in writers:
        writer.flush()
    names = [p.name for p in sorted(tmp_path.glob("shard-*"))]
    assert names == [f"shard-{n:05d}.safetensors" for n in range(6)]
    features = CachedFeatures(tmp_path)
    values = {
        entry.name: features.load(i, size, random.Random(0)).latent.item()  # type: ignore[union-attr]
        for i, entry in enumerate(features.entries())
    }
    assert values == {f"{i}": float(i) for i in range(12)}
    kept = json.loads((tmp_path / "features.json").read_text())
    assert kept == {"format": "opensora features 1", "latent": "draw"}
