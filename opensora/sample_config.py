"""Name every setting of the generating program: configuration keys, flags, defaults, limits.

The names are those of Open-Sora 1.2's inference configurations and flags, plus a few of our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opensora.config import setting
from opensora.errors import UsageError
from opensora.schedulers.noise import NOISE_MODES

#: Seeds stay below this so that seed + index is still one that torch accepts.
MAX_SEED = 2**62

DTYPE_WORDS = ("fp32", "bf16", "fp16", "float32", "bfloat16", "float16")

#: A dict of the configuration file, set on the command line by dotted flags.
Section = dict[str, Any] | None

_AUTOMATIC = "accepted; the fastest exact kernel is chosen automatically here"
_CONDITIONING = "image and video conditioning is not available yet; generate from text alone"
_LONG = "long videos made of several parts are not available yet; use loop 1"
_TRAINING = "belongs to training; generating reads --prompt-path and writes to --save-dir"
_LONG_ONLY = "accepted; it only matters for long or conditioned videos"

PROMPT, CLIP, SAMPLING, MODELS, OUTPUT = "prompts", "clip", "sampling", "models", "output"


@dataclass(frozen=True)
class SampleConfig:
    """Hold the settings of one generating run; see `opensora generate --help`."""

    prompt: tuple[str, ...] | None = setting(
        None, "what to show; several quoted prompts make several clips", group=PROMPT
    )
    prompt_path: str | None = setting(
        None, "text file with one prompt a line", group=PROMPT, metavar="FILE"
    )
    negative_prompt: str | None = setting(
        None, "what to steer away from (default: the learned empty prompt)", group=PROMPT
    )
    start_index: int = setting(0, "first line of the prompts to use", group=PROMPT, minimum=0)
    end_index: int | None = setting(
        None, "line of the prompts to stop before", group=PROMPT, minimum=0
    )
    aes: float | None = setting(None, "aesthetic score added to the prompt", group=PROMPT)
    flow: float | None = setting(None, "motion score added to the prompt", group=PROMPT)
    camera_motion: str | None = setting(None, "camera motion added to the prompt", group=PROMPT)

    num_frames: int | str | None = setting(
        None, "frames, or a length such as 4s or 2x", group=CLIP, metavar="N|4s|2x"
    )
    size: str | None = setting(None, "width x height in pixels", group=CLIP, metavar="WxH")
    image_size: tuple[int, int] | None = setting(
        None, "height and width in pixels", group=CLIP, metavar="PIXELS"
    )
    resolution: str | None = setting(
        None, "size class such as 240p or 720p, with --aspect-ratio", group=CLIP
    )
    aspect_ratio: str | None = setting(
        None, "height:width, so 9:16 is landscape", group=CLIP, metavar="H:W"
    )
    fps: int | float | None = setting(
        None, "frames per second that the model is told", group=CLIP, minimum=1, maximum=1000
    )
    frame_interval: int = setting(
        1, "every how many frames the model sees one", group=CLIP, minimum=1
    )
    save_fps: int | float | None = setting(
        None,
        "frames per second of the file (default: fps // frame_interval)",
        group=CLIP,
        minimum=1,
        maximum=1000,
    )

    seed: int = setting(
        1024, "seed of the first sample; the next has seed + 1",
        group=SAMPLING, minimum=0, maximum=MAX_SEED,
    )  # fmt: skip
    num_sample: int = setting(1, "clips per prompt", group=SAMPLING, minimum=1, maximum=1_000_000)
    batch_size: int = setting(1, "prompts sampled together", group=SAMPLING, minimum=1)
    num_sampling_steps: int | None = setting(
        None, "steps from noise to clip", group=SAMPLING, minimum=1, maximum=100_000
    )
    cfg_scale: float | None = setting(
        None, "guidance: how strictly to follow the prompt; 1 turns it off", group=SAMPLING
    )
    noise: str = setting(
        "per-sample",
        "per-sample: a clip depends on its seed alone; upstream: Open-Sora's draw per batch",
        group=SAMPLING,
        choices=NOISE_MODES,
    )

    ckpt_path: str | None = setting(
        None,
        "transformer weights or pipeline folder (default: the small built-in model)",
        group=MODELS,
        env=True,
        metavar="PATH",
    )
    lora: tuple[str, ...] | None = setting(
        None,
        "low-rank updates of the transformer, each with its weight (default: 1)",
        group=MODELS,
        metavar="PATH[:WEIGHT]",
    )
    # Dicts with `type` and `from_pretrained`; ruff takes a dict default for a mutable one.
    model: Section = setting(None, "transformer")  # noqa: RUF009
    vae: Section = setting(None, "video autoencoder")  # noqa: RUF009
    text_encoder: Section = setting(None, "text encoder")  # noqa: RUF009
    scheduler: Section = setting(None, "sampler")  # noqa: RUF009
    dtype: str | None = setting(
        None,
        "precision of transformer and VAE (default: bf16 on a GPU, fp32 on a CPU)",
        group=MODELS,
        choices=DTYPE_WORDS,
        metavar="fp32|bf16|fp16",
        env=True,
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps", group=MODELS, env=True)
    sp_size: int | None = setting(
        None,
        "processes that share one clip, under torchrun (default: all that it started)",
        group=MODELS,
        minimum=1,
    )
    offline: bool = setting(False, "never reach for a model hub", group=MODELS, env=True)

    save_dir: str = setting(
        "samples", "folder of the results", group=OUTPUT, flags=("-o", "--output"), env=True
    )
    sample_name: str | None = setting(
        None, "first part of the file names (default: sample)", group=OUTPUT
    )
    prompt_as_path: bool = setting(False, "name the files after their prompts", group=OUTPUT)
    dry_run: bool = setting(False, "print the plan and stop", group=OUTPUT)
    json: bool = setting(False, "print one JSON object a clip", group=OUTPUT)
    quiet: bool = setting(False, "print the results only", group=OUTPUT, flags=("-q",), env=True)
    progress: bool = setting(True, "show progress: bars, or lines in a log", group=OUTPUT, env=True)
    verbose: int = setting(
        1, "0: like --quiet; 2: all settings", group=OUTPUT, flags=("-v",), bare="2", minimum=0
    )

    multi_resolution: str | None = setting(
        None, "conditions given to the model", group=OUTPUT, choices=("STDiT2", "OpenSora"),
        note="accepted; STDiT3 is always told height, width and fps",
    )  # fmt: skip
    flash_attn: bool | None = setting(None, "no effect", group=MODELS, note=_AUTOMATIC)
    layernorm_kernel: bool | None = setting(None, "no effect", group=MODELS, note=_AUTOMATIC)
    num_workers: int | None = setting(
        None, "no effect", group=MODELS, note="accepted; nothing is read in the background"
    )
    condition_frame_length: int = setting(5, "no effect yet", group=CLIP, note=_LONG_ONLY)
    condition_frame_edit: float = setting(0.0, "no effect yet", group=CLIP, note=_LONG_ONLY)
    align: int | None = setting(None, "no effect yet", group=CLIP, note=_LONG_ONLY)
    loop: int = setting(1, "", unavailable=_LONG)
    reference_path: tuple[str | None, ...] | None = setting(None, "", unavailable=_CONDITIONING)
    mask_strategy: tuple[str | None, ...] | None = setting(None, "", unavailable=_CONDITIONING)
    llm_refine: bool = setting(
        False, "", unavailable="rewriting prompts by a language model is not available yet"
    )
    prompt_generator: str | None = setting(
        None, "", unavailable="random prompts are not available yet; give --prompt"
    )
    watermark: bool = setting(False, "", unavailable="watermarks are not available yet")
    data_path: str | None = setting(None, "", unavailable=_TRAINING)
    outputs: str | None = setting(None, "", unavailable=_TRAINING)

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            UsageError: an empty range of prompts.
        """
        if self.end_index is not None and self.end_index <= self.start_index:
            raise UsageError(
                f"--end-index {self.end_index} must be greater than "
                f"--start-index {self.start_index}"
            )
