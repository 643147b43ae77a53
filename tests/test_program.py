"""The generating program: what it writes and prints, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch

from opensora import request as request_module
from opensora.__main__ import main as opensora_main
from opensora.errors import OpenSoraError
from opensora.media import read_metadata
from opensora.program import run_program
from opensora.sample import main
from opensora.sample_config import SampleConfig
from opensora.sample_plan import make_plan

ROOT = Path(__file__).parent.parent

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run `opensora generate` in an empty folder on the untrained pipeline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in list(os.environ):
        if name.startswith("OPENSORA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENSORA_CKPT_PATH", str(pipeline_folder))
    monkeypatch.setenv("OPENSORA_DEVICE", "cpu")

    def call(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        return status, *capsys.readouterr()

    return call


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_clip_is_written_and_described(run: Run, tmp_path: Path) -> None:
    status, out, err = run("--prompt", "A red ball", "--seed", "5")
    assert status == 0
    assert out == "samples/sample_0000.mp4  9 frames  48x32 pixels  1.125 seconds\n"
    assert "seed" in err
    assert "command line" in err
    assert "checkpoint" in err
    assert files(tmp_path) == ["samples/sample_0000.json", "samples/sample_0000.mp4"]
    recipe = read_metadata("samples/sample_0000.mp4")
    assert recipe == json.loads(Path("samples/sample_0000.json").read_text())
    assert (recipe["prompt"], recipe["text"], recipe["seed"]) == ("A red ball", "a red ball", 5)
    assert recipe["settings"]["seed"] == 5
    assert recipe["request"]["num_inference_steps"] == 4
    assert recipe["weights"]["transformer"]["digest"].startswith("sha256:")
    assert recipe["versions"]["torch"] == torch.__version__
    assert "layernorm_modulate" in recipe["kernels"]
    with av.open("samples/sample_0000.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height) == (9, 48, 32)
        assert stream.average_rate == 8


def test_an_image_is_a_png(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("--prompt", "x", "--num-frames", "1", "-o", "pictures")
    assert status == 0
    assert out == "pictures/sample_0000.png  1 frame  48x32 pixels  0.000 seconds\n"
    assert read_metadata("pictures/sample_0000.png")["request"]["num_frames"] == 1


def test_json_lines_and_quiet_leave_nothing_else(run: Run) -> None:
    status, out, err = run("--prompt", "é", "b", "--json", "--quiet", "--num-sample", "2")
    assert (status, err) == (0, "")
    facts = [json.loads(line) for line in out.splitlines()]
    assert [fact["path"] for fact in facts] == [
        f"samples/sample_{i:04d}-{k}.mp4" for i in (0, 1) for k in (0, 1)
    ]
    assert [fact["seed"] for fact in facts] == [1024, 1025, 1026, 1027]
    assert facts[0]["prompt"] == "é"


def test_part_of_a_prompt_file_gives_the_same_clips(run: Run, tmp_path: Path) -> None:
    Path("prompts.txt").write_text("one\n\ntwo\nthree\n")
    common = ("--prompt-path", "prompts.txt", "-q", "--batch-size", "2")
    assert run(*common, "-o", "all")[0] == 0
    assert run(*common, "-o", "part", "--start-index", "1", "--end-index", "2")[0] == 0
    assert files(tmp_path / "part") == ["sample_0001.json", "sample_0001.mp4"]
    whole, part = (read_metadata(f"{name}/sample_0001.mp4") for name in ("all", "part"))
    assert (whole["prompt"], whole["seed"]) == (part["prompt"], part["seed"]) == ("two", 1025)


def test_files_can_be_named_after_prompts(run: Run, tmp_path: Path) -> None:
    assert run("--prompt", "../a b/c", "-q", "--prompt-as-path", "--sample-name", "x-")[0] == 0
    names = files(tmp_path)
    assert len(names) == 2
    assert all(name.startswith("samples/x-.._a b_c") for name in names)


def test_a_later_run_replaces_the_file(run: Run) -> None:
    for seed in ("1", "2"):
        assert run("--prompt", "x", "--seed", seed, "-q")[0] == 0
    assert read_metadata("samples/sample_0000.mp4")["seed"] == 2


def test_upstream_flags_and_config_work_together(
    run: Run, tmp_path: Path, pipeline_folder: Path
) -> None:
    Path("config.py").write_text(
        f"""
resolution = "144p"
aspect_ratio = "9:16"
num_frames = 51
fps = 24
frame_interval = 3
batch_size = 1
multi_resolution = "STDiT2"
align = 5
model = dict(type="STDiT3", from_pretrained="{pipeline_folder}", enable_flash_attn=True)
scheduler = dict(type="rflow", num_sampling_steps=7, cfg_scale=5.0)
"""
    )
    status, out, err = run(
        *("config.py", "--num_frames", "2x", "--resolution", "144p", "--aspect-ratio", "1:1"),
        *("--prompt", "waves", "--layernorm-kernel", "False", "--dry-run"),
    )
    assert status == 0
    assert "1 x clip of 102 frames, 192x192" in out
    assert "7 steps, guidance 5" in out
    assert "144p 1:1 (h:w) -> 192x192" in err
    assert "layernorm_kernel = False (command line): accepted" in err
    assert files(tmp_path) == ["config.py"], "a dry run writes nothing"


def test_ratio_strings_print_their_reading(run: Run) -> None:
    status, _, err = run(
        "--prompt", "x", "--resolution", "720p", "--aspect-ratio", "9:16", "--dry-run"
    )
    assert status == 0
    assert "9:16 (h:w) -> 1280x720" in err
    status, _, err = run(
        "--prompt", "x", "--resolution", "480p", "--aspect-ratio", "9:16", "--dry-run"
    )
    assert "files will be 848x480" in err


def test_flags_win_over_another_way_to_name_the_size(run: Run) -> None:
    Path("config.py").write_text("image_size = (32, 48)\nprompt_path = 'missing.txt'\n")
    status, out, _ = run("config.py", "--size", "64x16", "--prompt", "x", "--dry-run")
    assert status == 0
    assert "64x16 (width x height)" in out


def test_upstream_noise_batches_clips_of_different_prompts(run: Run) -> None:
    status, out, _ = run(
        *("--prompt", "a", "b", "c", "--num-sample", "2", "--batch-size", "2"),
        *("--noise", "upstream", "-q", "--num-sampling-steps", "1"),
    )
    assert status == 0
    order = [line.split()[0].removeprefix("samples/sample_") for line in out.splitlines()]
    assert order == [
        "0000-0.mp4", "0001-0.mp4", "0000-1.mp4", "0001-1.mp4", "0002-0.mp4", "0002-1.mp4",
    ]  # fmt: skip


def test_settings_table_shows_every_setting_when_asked(run: Run) -> None:
    _, _, err = run("--prompt", "x", "-v", "--dry-run")
    for name in SampleConfig.__dataclass_fields__:
        assert f"  {name} " in err


def damaged(source: Path, target: Path, change: Callable[[Path], None]) -> str:
    """Copy a pipeline and change its transformer's folder."""
    shutil.copytree(source, target)
    change(target / "transformer")
    return str(target)


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def put_nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["t_block.1.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def put_code(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, ("touch executed",)

    (folder / "model.safetensors").unlink()
    torch.save({"t_block.1.weight": Evil()}, folder / "model.pt")


def other_family(folder: Path) -> None:
    shutil.copytree(folder.parent / "vae", folder, dirs_exist_ok=True)


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


P = ("--prompt", "x")

WRONG: dict[str, tuple[tuple[str, ...], int, str]] = {
    "unknown flag": (("--promt", "x"), 2, "did you mean --prompt"),
    "unknown short flag": ((*P, "-z"), 2, "-z"),
    "no prompt": ((), 2, "no prompt"),
    "empty prompt": (("--prompt", ""), 2, "prompt is empty"),
    "blank prompt": (("--prompt", "   "), 2, "prompt is empty"),
    "one of two prompts empty": (("--prompt", "a", ""), 2, "prompt is empty"),
    "prompt in Chinese only": (("--prompt", "一只猫"), 2, "cleaning left nothing"),
    "empty negative prompt": ((*P, "--negative-prompt", ""), 2, "prompt is empty"),
    "prompt with broken json": (("--prompt", "a {b"), 2, "not JSON"),
    "prompt with a reference": (
        ("--prompt", 'a{"reference_path": "b.png"}'),
        2,
        "not available yet",
    ),
    "prompt of several parts": (("--prompt", "|0|a|1|b"), 2, "not available yet"),
    "two prompt sources": ((*P, "--prompt-path", "p.txt"), 2, "exclude each other"),
    "missing prompt file": (("--prompt-path", "p.txt"), 2, "does not exist"),
    "prompt file is a folder": (("--prompt-path", "."), 2, "cannot read the prompt file"),
    "empty prompt file": (("--prompt-path", "empty.txt"), 2, "holds no prompt"),
    "binary prompt file": (("--prompt-path", "binary.txt"), 2, "not UTF-8"),
    "prompt file without an end": (("--prompt-path", "/dev/zero"), 2, "larger than"),
    "config without an end": (("/dev/zero", *P), 2, "larger than"),
    "prompt that is no text": (("--prompt", "a \udcff"), 2, "not valid UTF-8"),
    "start index beyond the end": ((*P, "--start-index", "5"), 2, "leave none"),
    "end before start": ((*P, "--start-index", "5", "--end-index", "2"), 2, "greater"),
    "zero frames": ((*P, "--num-frames", "0"), 2, "number of frames"),
    "negative frames": ((*P, "--num-frames=-5"), 2, "number of frames"),
    "frames as words": ((*P, "--num-frames", "many"), 2, "number of frames"),
    "fractional frames": ((*P, "--num-frames", "2.5"), 2, "number of frames"),
    "unknown length": ((*P, "--num-frames", "3s"), 2, "number of frames"),
    "size of zero": ((*P, "--image-size", "0", "64"), 2, "height"),
    "negative size": ((*P, "--image-size", "-64", "64"), 2, "height"),
    "size between multiples": ((*P, "--image-size", "100", "64"), 2, "use 96 or 104"),
    "size beyond the limit": ((*P, "--size", "99992x64"), 2, "at most 16384"),
    "size in words": ((*P, "--size", "large"), 2, "WIDTHxHEIGHT"),
    "half a size": ((*P, "--image-size", "64"), 2, "expected 2 arguments"),
    "two sizes": ((*P, "--size", "64x64", "--image-size", "64", "64"), 2, "exclude"),
    "unknown resolution": (
        (*P, "--resolution", "721p", "--aspect-ratio", "1:1"),
        2,
        "did you mean 720p",
    ),
    "unknown ratio": ((*P, "--resolution", "240p", "--aspect-ratio", "7:5"), 2, "9:16"),
    "resolution alone": ((*P, "--resolution", "240p"), 2, "--aspect-ratio"),
    "ratio alone": ((*P, "--aspect-ratio", "1:1"), 2, "--resolution"),
    "zero steps": ((*P, "--num-sampling-steps", "0"), 2, "at least 1"),
    "zero steps in the scheduler": ((*P, "--scheduler.num_sampling_steps=0"), 2, "num_sampling_st"),
    "infinite guidance": ((*P, "--cfg-scale", "inf"), 2, "expected a number"),
    "absurd guidance": ((*P, "--cfg-scale", "1e30"), 2, "at most 1000"),
    "zero frame rate": ((*P, "--fps", "0"), 2, "at least 1"),
    "frame interval beyond the rate": ((*P, "--frame-interval", "50"), 2, "--save-fps"),
    "negative seed": ((*P, "--seed", "-1"), 2, "at least 0"),
    "seed beyond 64 bits": ((*P, "--seed", "9" * 30), 2, "at most"),
    "seed in words": ((*P, "--seed", "lucky"), 2, "whole number"),
    "zero samples": ((*P, "--num-sample", "0"), 2, "at least 1"),
    "zero batch": ((*P, "--batch-size", "0"), 2, "at least 1"),
    "unknown dtype": ((*P, "--dtype", "fp8"), 2, "fp32"),
    "unknown device": ((*P, "--device", "gpu"), 2, "unknown"),
    "absent device": ((*P, "--device", "cuda:9"), 2, "CUDA devices"),
    "unknown noise": ((*P, "--noise", "pink"), 2, "per-sample, upstream"),
    "loops": ((*P, "--loop", "3"), 2, "not available yet"),
    "reference": ((*P, "--reference-path", "a.png"), 2, "not available yet"),
    "missing config": (("none.py", *P), 2, "does not exist"),
    "config that runs code": (("code.py", *P), 2, "code.py:1"),
    "config with an unknown key": (("key.py", *P), 2, "did you mean num_frames"),
    "config of another family": (("family.py", *P), 2, "STDiT2-XL/2"),
    "name with a folder": ((*P, "--sample-name", "../x"), 2, "plain file name"),
    "two clips of one name": (("--prompt", "a", "a", "--prompt-as-path"), 2, "twice"),
    "output is a file": ((*P, "-o", "empty.txt"), 2, "is a file"),
    "output below a file": ((*P, "-o", "empty.txt/deep"), 2, "is a file"),
    "output in a read-only system": ((*P, "-o", "/proc/samples"), 2, "cannot write"),
    "file name taken by a folder": ((*P, "-o", "taken"), 2, "it is a folder"),
    "too large for memory": ((*P, "--num-frames", "900000", "--size", "4096x4096"), 4, "memory"),
    "too many samples": ((*P, "--num-sample", "99999999"), 2, "at most 1000000"),
    "too large for the disk": (
        (*P, "--num-sample", "999999", "--size", "4096x4096"),
        4,
        "are needed",
    ),
    "missing checkpoint": ((*P, "--ckpt-path", "none"), 3, "does not exist"),
    "missing weight file": ((*P, "--ckpt-path", "a/b.safetensors"), 3, "does not exist"),
    "hub without a network": ((*P, "--ckpt-path", "no-such-owner/no-such-model"), 3, "hub"),
    "text file as weights": ((*P, "--ckpt-path", "empty.txt"), 3, "empty.txt"),
    "truncated weights": ((*P, "--ckpt-path", "truncate"), 3, "cut short or damaged"),
    "weights with code": ((*P, "--ckpt-path", "put_code"), 3, "run code"),
    "weights with NaN": ((*P, "--ckpt-path", "put_nan"), 3, "NaN"),
    "weights of another family": ((*P, "--ckpt-path", "other_family"), 3, "VideoAutoencoder"),
    "broken config.json": ((*P, "--ckpt-path", "break_json"), 3, "config.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_end_in_one_sentence(
    name: str, run: Run, tmp_path: Path, pipeline_folder: Path
) -> None:
    argv, expected, words = WRONG[name]
    Path("empty.txt").write_text("\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00a")
    Path("code.py").write_text("import os")
    Path("key.py").write_text("num_frame = 3")
    Path("family.py").write_text('model = dict(type="STDiT2-XL/2", from_pretrained="x")')
    Path("taken/sample_0000.mp4").mkdir(parents=True)
    for change in (truncate, put_code, put_nan, other_family, break_json):
        if change.__name__ in argv:
            damaged(pipeline_folder, tmp_path / change.__name__, change)
    before = files(tmp_path)
    status, out, err = run(*argv)
    errors = [
        line for line in err.splitlines() if not line.startswith(("settings:", "  ", "note:"))
    ]
    assert status == expected, err
    assert len(errors) == 1, err
    assert errors[0].startswith("error: ")
    assert words in errors[0]
    assert "Traceback" not in err
    assert "fault of opensora" not in err
    assert out == ""
    assert files(tmp_path) == before, "nothing is left, and no code was run"


def test_non_finite_values_leave_no_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opensora.models.stdit import STDiT3

    forward = STDiT3.forward
    monkeypatch.setattr(STDiT3, "forward", lambda *a, **k: forward(*a, **k) * float("nan"))
    status, out, err = run("--prompt", "x")
    assert (status, out) == (5, "")
    assert "step 1 of 4" in err.splitlines()[-1]
    assert files(tmp_path) == []


def test_memory_is_checked_before_weights_are_opened(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opensora import pipeline_loading

    def opened(*arguments: object, **more: object) -> None:
        raise AssertionError("weights were opened")

    monkeypatch.setattr(pipeline_loading, "load_model", opened)
    monkeypatch.setattr(request_module, "available_memory", lambda device: 1 << 10)
    assert run("--prompt", "x")[0] == 4


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "a.mp4"), 1, "a.mp4: No space left"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), 4, "out of memory"),
        (RuntimeError("two\nlines"), 1, "OPENSORA_TRACEBACK=1"),
        (OpenSoraError("a\nb"), 1, "error: a b"),
    ],
)
def test_every_failure_is_one_line(
    raised: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise raised

    assert run_program(fail) == status
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_traceback_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENSORA_TRACEBACK", "1")

    def fail() -> int:
        raise RuntimeError("deep inside")

    assert run_program(fail) == 1
    assert "Traceback" in capsys.readouterr().err


def test_opensora_alone_shows_ops_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert opensora_main([]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "layernorm_modulate" in shown
    assert "device cpu" in shown
    assert opensora_main(["--version"]) == 0
    assert opensora_main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out


def test_unknown_commands_get_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert opensora_main(["genrate"]) == 2
    assert "did you mean generate?" in capsys.readouterr().err
    assert opensora_main(["--verison"]) == 2
    assert "did you mean --version?" in capsys.readouterr().err


def test_help_explains_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert opensora_main(["generate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--aspect-ratio" in shown
    assert "opensora generate --prompt" in shown


def start(arguments: list[str], folder: Path, **options: object) -> subprocess.Popen[str]:
    """Start a program of the checkout in a folder."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run started in the background inherits an ignored Ctrl-C; programs keep that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_leaves_nothing(
    tmp_path: Path, pipeline_folder: Path, number: int, status: int
) -> None:
    arguments = ["-m", "opensora", "generate", "--ckpt-path", str(pipeline_folder)]
    arguments += ["--prompt", "x", "--num-sampling-steps", "100000", "--device", "cpu"]
    process = start(arguments, tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("models ready"):
            break
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status
    assert (out, err.count("\n")) == ("", 1 if number == signal.SIGINT else 0), err
    assert "Traceback" not in err
    assert files(tmp_path) == []


def test_the_script_is_the_same_program(tmp_path: Path, pipeline_folder: Path) -> None:
    config = str(ROOT / "configs" / "tiny" / "inference" / "sample.py")
    script = str(ROOT / "scripts" / "inference.py")
    arguments = [script, config, "--ckpt-path", str(pipeline_folder), "--prompt", "x"]
    arguments += ["--num-frames", "1", "--num-sampling-steps", "1", "--device", "cpu"]
    process = start(arguments, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == "samples/sample_0000.png  1 frame  64x64 pixels  0.000 seconds\n"
    assert "\r" not in err, "no progress bar where stderr is no terminal"


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    process = start(["-m", "opensora", "generate", "--help"], tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(timeout=3000) in (0, 141)
    assert err == ""


def test_plans_check_everything_but_open_no_weights(
    run: Run, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opensora import checkpoint
    from opensora.config import parse_command_line

    def opened(*arguments: object) -> None:
        raise AssertionError("weights were opened")

    monkeypatch.setattr(checkpoint, "read_tensors", opened)
    config, sources = parse_command_line(SampleConfig, ["--prompt", "x"], "p")
    plan = make_plan(config, sources)
    assert plan.request.size == (9, 32, 48)
    assert plan.parts.latent_size(plan.request) == (3, 4, 6)
    assert plan.save_fps == 8
