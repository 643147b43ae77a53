"""Kill scripts/train.py at random moments, over and over: it must end as if nothing had been.

One process imports everything and forks the program from itself for every life, so that a life
costs a second. Fifty kills: `python tests/training/test_kills.py 50`.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import opensora.train  # noqa: F401  # once, for all forks
from opensora.distributed.run_folders import checkpoints
from opensora.progress import Progress
from opensora.train_config import TrainConfig
from opensora.training.metrics import read_metrics
from opensora.training.models import build_models

PROGRAM = Path(__file__).resolve().parents[2] / "scripts/train.py"
STEPS = 24
SETTINGS: dict[str, Any] = {
    "dataset": {"type": "ShapesDataset", "clips": [(17, 64, 64, 8), (1, 64, 64, 16)]},
    "bucket_config": {"64p": {1: (1.0, 4), 17: (0.8, 2)}},
    "mask_ratios": {"image_head": 0.3, "random": 0.3},
    "model": {
        "type": "STDiT3",
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "caption_channels": 32,
        "model_max_length": 120,
        "pred_sigma": False,
    },
    "vae": {"type": "VideoAutoencoderPipeline", "from_pretrained": "tiny"},
    "text_encoder": {
        "type": "byt5",
        "max_length": 120,
        "d_model": 32,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    },
    "scheduler": {"type": "rflow", "sample_method": "logit-normal"},
    "lr": 3e-3,
    "accumulation_steps": 2,
    "grad_clip": "adaptive",
    "ema_decay": 0.9,
    "dtype": "bf16",
    "device": "cpu",
    "max_steps": STEPS,
    "log_every": 1,
    "ckpt_every": 2,
    "keep_last": 2,
    "num_workers": 1,
    "quiet": True,
}


def life(config: Path, outputs: Path, seconds: float | None) -> bool:
    """Train in a fork, from the latest checkpoint if there is one; True if it ended by itself."""
    resume = any(checkpoints(run) for run in outputs.glob("*-STDiT3"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            load = ("--load", "latest") if resume else ()
            sys.argv = [str(PROGRAM), str(config), "--outputs", str(outputs), *load]
            runpy.run_path(str(PROGRAM), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # a fork must not go on into its parent's code
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    until = time.monotonic() + (60 if seconds is None else seconds)
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert seconds is not None, "training hangs"
    return False


def outcome(outputs: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of all steps and the last checkpoint's tensors."""
    run = max(outputs.glob("*-STDiT3"))
    losses = [x["loss"] for x in read_metrics(run / "metrics.jsonl") if "bands" in x]
    tensors: dict[str, Tensor] = {}
    for file in checkpoints(run)[-1].folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    # Generators are set anew for every batch: what they are between them means nothing.
    return losses, {k: v for k, v in tensors.items() if not k.startswith("rng.")}


def kill_loop(folder: Path, kills: int) -> dict[str, int]:
    """Kill that often, and compare every run that came to its end with one that never was."""
    torch.set_num_threads(1)
    # What is imported late is imported here; no gradient is computed before the last fork.
    build_models(TrainConfig(**SETTINGS), torch.device("cpu"))
    config = folder / "config.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in SETTINGS.items()))
    started = time.monotonic()
    assert life(config, folder / "whole", None)
    seconds = time.monotonic() - started
    losses, tensors = outcome(folder / "whole")
    assert len(losses) == STEPS
    rng = random.Random(kills)
    found = {"kills": 0, "ends": 0, "in_a_write": 0, "resumed": 0}
    report = Progress().stage("killing", "kill")
    while found["kills"] < kills or not found["ends"]:
        outputs = folder / f"killed-{found['ends']}"
        while True:
            found["resumed"] += any(checkpoints(run) for run in outputs.glob("*-STDiT3"))
            enough = found["kills"] >= kills
            if life(config, outputs, None if enough else rng.uniform(0.1, 0.5) * seconds):
                break
            found["kills"] += 1
            report(found["kills"], kills)
            found["in_a_write"] += bool(list(outputs.glob("*/.*.partial")))
        found["ends"] += 1
        mine, weights = outcome(outputs)
        assert mine == losses
        assert weights.keys() == tensors.keys()
        assert [name for name in weights if not torch.equal(weights[name], tensors[name])] == []
    return found


def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path,
) -> None:
    kills = int(os.environ.get("OPENSORA_KILLS", "10"))
    command = [sys.executable, __file__, str(kills), str(tmp_path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environ, timeout=60 + 5 * kills, check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= kills
    assert found["resumed"] >= kills // 3
    assert found["ends"] >= 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        target = Path(sys.argv[2] if len(sys.argv) > 2 else own)
        print(json.dumps(kill_loop(target, int(sys.argv[1]))))
