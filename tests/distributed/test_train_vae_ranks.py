"""Check that VAE training does the same on two processes as on one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from opensora.train_vae import train_vae
from opensora.train_vae_config import TrainVAEConfig

MODEL = {
    "type": "VideoAutoencoderPipeline",
    "vae_2d": {
        "block_out_channels": (4, 4, 4, 4),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
    },
    "vae_temporal": {
        "filters": 4,
        "num_res_blocks": 1,
        "channel_multipliers": (1, 1, 1, 2),
        "num_groups": 2,
    },
}


def config(folder: Path, **changes: Any) -> TrainVAEConfig:
    return TrainVAEConfig(
        **{
            "data_path": str(folder / "meta.csv"),
            "model": MODEL,
            "outputs": str(folder / "runs"),
            "num_frames": 5,
            "image_size": (16, 16),
            "num_workers": 1,
            "dtype": "fp32",
            "use_real_rec_loss": True,
            "perceptual_loss_weight": 0.0,
            "mixed_strategy": "mixed_video_random",
            # It takes six frames: for shorter clips no gradient comes from a process, or from any.
            "discriminator": {"type": "NLayerDiscriminator3D", "ndf": 4, "n_layers": 1},
            "discriminator_start": 1,
            "lecam_loss_weight": 0.1,
            "lr": 1e-3,
            "grad_clip": 1.0,
            "epochs": 2,
            "ckpt_every": 2,
            **changes,
        }
    )


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Write eight short clips and their table; the last one is damaged."""
    rng = np.random.default_rng(0)
    lines = ["path,text,num_frames,height,width,fps"]
    for index in range(8):
        path = tmp_path / f"{index}.mp4"
        noise = rng.integers(0, 255, (8, 4, 4, 3), dtype=np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            for frame in noise.repeat(4, 1).repeat(4, 2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{path.name},a clip,8,16,16,8")
    # The table says it is a clip, so a process finds itself with an empty batch.
    (tmp_path / "7.mp4").write_bytes(b"damaged")
    (tmp_path / "meta.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def losses(run: Path) -> list[dict[str, float]]:
    keys = ("step", "loss", "nll", "disc", "adaptive", "grad_norm", "frames")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in keys if key in row} for row in rows]


def test_two_processes_train_as_one(clips: Path, ranks: Callable[..., list[Any]]) -> None:
    shape = {"num_frames": 6}
    alone = losses(train_vae(config(clips, accumulation_steps=2, **shape)).parent)
    folders = ranks(__file__, 2, str(clips), json.dumps(shape))
    assert folders[0] == folders[1]
    both = losses(Path(folders[0]))
    assert len(both) == len(alone) == 8
    assert any("disc" in row for row in both)
    assert not all("disc" in row for row in both[1:])
    for one, two in zip(alone, both, strict=True):
        assert two == pytest.approx(one, rel=2e-4)
    # What two processes saved goes on on one.
    checkpoint = next(Path(folders[0]).glob("epoch*-global_step4"))
    again = config(clips, accumulation_steps=2, load=str(checkpoint), **shape)
    for one, two in zip(losses(train_vae(again).parent)[-4:], both[-4:], strict=True):
        assert one == pytest.approx(two, rel=2e-4)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps(str(train_vae(config(folder, **json.loads(sys.argv[2]))).parent)))
