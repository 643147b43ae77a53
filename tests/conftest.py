"""Build what tests share, once a session: an untrained pipeline, the emulated CUDA kernels."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.models.text_encoder import T5TextEncoder
from opensora.models.vae import VideoAutoencoder, VideoAutoencoderConfig
from opensora.pipeline import OpenSoraPipeline
from opensora.schedulers.rflow import RFlow
from tests.forks import Forks

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


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def emulator() -> Callable[[int], None]:
    """Load the CUDA kernels, compiled for the CPU; returns what chooses the order of threads."""
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    if shutil.which("c++") is None or not Path(cmake).is_file():
        pytest.skip("no C++ compiler or no CMake")
    folder = ROOT / "build/emulated"
    root = f"-DTORCH_ROOT={Path(torch.__file__).parent}"
    for command in (
        [cmake, "-S", ROOT, "-B", folder, root],
        [cmake, "--build", folder, "--parallel", "--target", "_C_emulated"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    library = folder / "_C_emulated.abi3.so"
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library)).opensora_emulator_order


# Orders of csrc/cuda/emulator.h: lanes in turn, copies late; backwards, warps drift apart;
# shuffled, warps drift apart, copies early.
ORDERS = [0, 4, 11]


@pytest.fixture(
    params=[*ORDERS, *(["cuda"] if torch.cuda.is_available() else [])],
    ids=lambda order: f"order {order}" if isinstance(order, int) else order,
)
def native_device(request: pytest.FixtureRequest) -> str:
    """Return the device of the CUDA C++ kernels: the emulator, in one of its orders, or a GPU."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("emulator")(request.param)
    return "cpu"


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Return what starts processes that need not import anything."""
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, as forked processes do: sums round alike then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
