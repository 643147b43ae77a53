"""Generate clips from the command line: the program behind `opensora generate`.

    opensora generate --prompt "a red circle moving right"
    opensora generate configs/opensora-v1-2/inference/sample.py --num-frames 4s --prompt "..."

stdout: one line a clip with its path, frames, pixels and seconds. Everything else is on stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opensora.config import Sources, parse_command_line
from opensora.errors import KernelWarning
from opensora.program import run_program, stop_if_requested
from opensora.progress import Progress, Report
from opensora.sample_config import SampleConfig

if TYPE_CHECKING:
    from opensora.distributed.mesh import World

DESCRIPTION = """\
Generate clips or images from text.

  %(prog)s --prompt "a red circle moving right"
  %(prog)s --prompt-path prompts.txt --num-sample 2 -o clips --size 64x64 --num-frames 17
  %(prog)s configs/opensora-v1-2/inference/sample.py --num-frames 4s --resolution 720p \\
      --aspect-ratio 9:16 --prompt "waves at sunset"

Keys inside model, vae, text_encoder and scheduler are set with dots:
  --model.from_pretrained FOLDER --scheduler.use_timestep_transform true
Environment: OPENSORA_CKPT_PATH, OPENSORA_DEVICE, OPENSORA_DTYPE, OPENSORA_OFFLINE,
OPENSORA_PROGRESS, OPENSORA_QUIET, OPENSORA_SAVE_DIR set the flag of the same name;
OPENSORA_TRACEBACK=1 shows where an unexpected error came from."""


def main(argv: Sequence[str] | None = None, program: str = "opensora generate") -> int:
    """Run the program and return its exit status; see `opensora.program`."""
    return run_program(lambda: generate(sys.argv[1:] if argv is None else argv, program))


def generate(argv: Sequence[str], program: str = "opensora generate") -> int:
    """Parse, check, load, sample and write.

    Raises:
        OpenSoraError: anything the user can act on.
    """
    started = time.monotonic()
    config, sources = parse_command_line(SampleConfig, argv, program, description=DESCRIPTION)
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    say = _quiet if config.quiet or config.verbose == 0 else _say
    if config.sp_size is None and "WORLD_SIZE" not in os.environ:
        return _generate(config, sources, say, started)

    from opensora.distributed.mesh import stop
    from opensora.sample_ranks import join

    try:
        world = join(config)
        config = dataclasses.replace(config, device=str(world.device))
        return _generate(config, sources, say if world.is_main else _quiet, started, world)
    finally:
        stop()


def _generate(
    config: SampleConfig,
    sources: Sources,
    say: Callable[[str], None],
    started: float,
    world: World | None = None,
) -> int:
    """Run what `generate` has parsed, in one process or as one of many."""
    # Imported after the flags are checked: a wrong flag should not wait for the models' code.
    from opensora.pipeline_loading import load_parts
    from opensora.recipe import describe_run, digests_in_background
    from opensora.sample_plan import Plan, describe_plan, make_plan, settings_of

    if world is not None:
        from opensora.sample_ranks import share_tokens

    stop_if_requested()
    plan: Plan = make_plan(config, sources)
    config = plan.config
    say("settings:\n" + sources.table(config, every=config.verbose > 1))
    for note in plan.notes:
        say(f"note: {note}")
    if config.dry_run or config.verbose > 1:
        main_rank = world is None or world.is_main
        (print if config.dry_run and main_rank else say)(describe_plan(plan))
    if config.dry_run:
        return 0

    writes = world is None or world.sp_rank == 0
    batches = plan.batches if world is None else plan.batches[world.dp_rank :: world.dp_size]
    shown = config.progress and say is not _quiet
    with _Bars(None if shown else False) as bars, _notes(say, plan.notes):
        pipe = load_parts(plan.parts, dtype=plan.dtype, device=plan.device, progress=bars)
        for path, weight in plan.loras:
            pipe.load_lora_weights(path, weight)
        if world is not None:
            share_tokens(pipe, world)
        stop_if_requested()
        digests = digests_in_background(pipe.sources)
        bars.close()
        say(f"models ready after {time.monotonic() - started:.1f} s")
        for number, batch in enumerate(batches):
            begun = time.monotonic()
            upstream_goes_on = config.noise == "upstream" and number > 0
            seeds = [clip.seed for clip in batch]
            made = pipe(
                [clip.prompt for clip in batch],
                negative_prompt=config.negative_prompt,
                num_frames=plan.request.num_frames,
                height=plan.request.height,
                width=plan.request.width,
                num_inference_steps=plan.request.num_inference_steps,
                guidance_scale=plan.request.guidance_scale,
                fps=plan.request.fps,
                seed=_seed(config, seeds, upstream_goes_on),
                batch_size=len(batch),
                noise=config.noise,
                aes=config.aes,
                flow=config.flow,
                camera_motion=config.camera_motion,
                output_type="np" if writes else "latent",
                progress=bars,
            )
            bars.close()
            stop_if_requested()
            if not writes:
                continue
            run = describe_run(
                settings_of(plan),
                plan.request,
                device=plan.device,
                dtype=plan.dtype,
                weights=digests(),
            )
            for clip, frames in zip(batch, made.frames, strict=True):
                own = {"prompt": clip.prompt, "text": clip.text, "seed": clip.seed}
                if config.noise == "upstream":
                    own["seed"] = config.seed
                _report(
                    clip.path, frames, plan.save_fps, {**own, "index": clip.index, **run}, config
                )
            say(f"{len(batch)} made in {time.monotonic() - begun:.1f} s")
    return 0


class _Bars(Progress):
    """Notice at every reported step that the program was asked to stop."""

    def stage(self, name: str, unit: str = "step") -> Report:
        """Begin a stage; its report function raises if Ctrl-C was pressed."""
        draw = super().stage(name, unit)

        def report(done: int, total: int) -> None:
            stop_if_requested()
            draw(done, total)

        return report


def _seed(config: SampleConfig, seeds: list[int], goes_on: bool) -> int | list[int] | None:
    """Return one seed per clip; with upstream's noise the run's seed, once."""
    if config.noise == "upstream":
        return None if goes_on else config.seed
    return seeds


def _report(path: Any, frames: Any, fps: float, recipe: dict[str, Any], config: Any) -> None:
    """Write one clip and print its line."""
    from opensora.media import write_clip

    saved = write_clip(path, frames, fps, recipe)
    if config.json:
        facts = {
            "path": str(saved.path),
            "frames": saved.frames,
            "width": saved.width,
            "height": saved.height,
            "seconds": saved.seconds,
            "seed": recipe["seed"],
            "prompt": recipe["prompt"],
        }
        print(json.dumps(facts, ensure_ascii=False), flush=True)
        return
    length = "1 frame" if saved.frames == 1 else f"{saved.frames} frames"
    print(
        f"{saved.path}  {length}  {saved.width}x{saved.height} pixels  {saved.seconds:.3f} seconds",
        flush=True,
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _quiet(message: str) -> None:
    """Say nothing."""


@contextmanager
def _notes(say: Callable[[str], None], said: list[str]) -> Iterator[None]:
    """Show warnings of the libraries as one-line notes, and none that were said before."""

    def show(message: Warning | str, *rest: Any) -> None:
        words = " ".join(str(message).split())
        if isinstance(message, KernelWarning):
            _say(f"warning: {words}")
        else:
            say(f"note: {words}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        for note in said:
            warnings.filterwarnings("ignore", message=re.escape(note))
        yield
