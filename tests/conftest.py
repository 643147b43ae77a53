"""Build, once a session, a pipeline folder of untrained weights, smaller than the built-in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.models.text_encoder import T5TextEncoder
from opensora.models.vae import VideoAutoencoder, VideoAutoencoderConfig
from opensora.pipeline import OpenSoraPipeline
from opensora.schedulers.rflow import RFlow

VAE = {
    "vae_2d": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 4, 4, 4),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
    },
    "vae_temporal": {
        "in_out_channels": 4,
        "latent_embed_dim": 4,
        "embed_dim": 4,
        "filters": 4,
        "num_res_blocks": 1,
        "channel_multipliers": (1, 1, 1, 1),
        "temporal_downsample": (False, True, True),
        "num_groups": 2,
    },
    "micro_frame_size": 17,
    "micro_batch_size": 4,
}
MODEL = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 24,
    "model_max_length": 40,
    "input_sq_size": 64,
}
TEXT = {"max_length": 32, "d_model": 24, "d_ff": 32, "num_layers": 1, "num_heads": 2}
DEFAULTS = {"num_frames": 9, "height": 32, "width": 48, "fps": 8, "trained_sizes": [[9, 32, 48]]}


def build_pipeline() -> OpenSoraPipeline:
    """Return a pipeline in which every part changes the result, all weights random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = STDiT3(STDiT3Config.from_dict(MODEL)).eval()
        for weight in model.parameters():
            if not weight.any():  # temporal branches and biases start at zero
                torch.nn.init.normal_(weight, std=0.2)
        return OpenSoraPipeline(
            model,
            VideoAutoencoder(VideoAutoencoderConfig.from_dict(VAE)).eval(),
            T5TextEncoder.byt5(**TEXT).eval(),
            RFlow(num_sampling_steps=4, cfg_scale=3.0),
            defaults=DEFAULTS,
        )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder; tests that change files must copy it."""
    folder = tmp_path_factory.mktemp("pipeline") / "untrained"
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipe() -> OpenSoraPipeline:
    """A fresh pipeline that a test may break."""
    return build_pipeline()
