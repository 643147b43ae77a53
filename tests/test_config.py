"""Configuration files are parsed, never run; flags, files and environment give checked settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opensora.config import apply_overrides, load_config_file, parse_command_line, setting
from opensora.errors import UsageError
from opensora.extract_config import ExtractConfig
from opensora.sample_config import SampleConfig
from opensora.train_config import TrainConfig

ROOT = Path(__file__).parent.parent

# The form of upstream's published inference configuration: every key it uses, values of our own.
UPSTREAM_FORM = """
resolution = "240p"
aspect_ratio = "9:16"
num_frames = 51
fps = 24
frame_interval = 1
save_fps = 24
save_dir = "./samples/samples/"
seed = 42
batch_size = 1
multi_resolution = "STDiT2"
dtype = "bf16"
condition_frame_length = 5
align = 5
model = dict(
    type="STDiT3-XL/2",
    from_pretrained="org/model",
    qk_norm=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2", from_pretrained="org/vae", micro_frame_size=17, micro_batch_size=4
)
text_encoder = dict(type="t5", from_pretrained="org/t5", model_max_length=300)
scheduler = dict(type="rflow", use_timestep_transform=True, num_sampling_steps=30, cfg_scale=7.0)
aes = 6.5
flow = None
"""


def write(folder: Path, text: str, name: str = "config.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def parse(*argv: str, environ: dict[str, str] | None = None) -> tuple[SampleConfig, Any]:
    return parse_command_line(SampleConfig, argv, "program", environ=environ or {})


def test_values_of_the_allowed_form(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '"""Text."""\n'
        "_side = 8\na = b = [1, -2.5, (True, None)]\nc: int = 2**10 // _side + 1\n"
        'd = {"144p": {1: (1.0, 475)}, **dict(x="a" + "b")}\n'
        "f = dict(**d, y=[0] * 3)\ng = 1e-4 * (4 / 2)\n",
    )
    assert load_config_file(path) == {
        "a": [1, -2.5, (True, None)],
        "b": [1, -2.5, (True, None)],
        "c": 129,
        "d": {"144p": {1: (1.0, 475)}, "x": "ab"},
        "f": {"144p": {1: (1.0, 475)}, "x": "ab", "y": [0, 0, 0]},
        "g": 2e-4,
    }


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "x = open('/etc/passwd')",
        "x = __import__('os').system('true')",
        "x = ().__class__",
        "x = [i for i in (1, 2)]",
        "x = lambda: 1",
        "x = f'{1}'",
        "x = dict([(1, 2)])",
        "x = 1 if True else 2",
        "x = not True",
        "x = 9 ** 9 ** 9",
        "x = 'a' * 10 ** 9",
        "x = 1 / 0",
        "x = (-1) ** 0.5",
        "x = 1e999",
        "x = b'bytes'",
        "x = 1j",
        "x = y",
        "x += 1",
        "x.y = 1",
        "x, y = 1, 2",
        "if True:\n    x = 1",
        "def f(): pass",
        "x = {[1]: 2}",
        "x = {(1, [2]): 2}",
        "x = (",
    ],
)
def test_other_code_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, "a = 1\n" + line + "\n")
    with pytest.raises(UsageError, match=r"config\.py:2: "):
        load_config_file(path)


@pytest.mark.parametrize(
    "text", ["x = " + "(" * 5000 + ")" * 5000, "x = '\0'", "x = " + "-" * 9999 + "1"]
)
def test_hostile_files_end_in_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        load_config_file(write(tmp_path, text))


def test_unreadable_files_end_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "binary.py").write_bytes(b"x = '\xff\xfe'")
    (tmp_path / "large.py").write_bytes(b"#" * (1 << 21))
    for name, words in [
        ("missing.py", "does not exist"),
        (".", "is a folder"),
        ("binary.py", "not valid Python|not a configuration"),
        ("large.py", "larger than"),
        ("a\0b", "cannot read"),
    ]:
        with pytest.raises(UsageError, match=words):
            load_config_file(tmp_path / name)


def test_bases_merge_dicts_and_remember_lines(tmp_path: Path) -> None:
    write(tmp_path, "seed = 1\nmodel = dict(a=1, b=dict(c=2, d=3))\nsize = 8\n", "base/one.py")
    path = write(
        tmp_path,
        '_base_ = ["base/one.py"]\nmodel = dict(b=dict(c=5))\n'
        "wide = size * 2\nother = dict(_delete_=True)\n",
    )
    config = load_config_file(path)
    assert config["model"] == {"a": 1, "b": {"c": 5, "d": 3}}
    assert (config["seed"], config["wide"], config["other"]) == (1, 16, {})
    assert config.where("seed").endswith("one.py:1")
    assert config.where("wide").endswith("config.py:3")
    replaced = write(tmp_path, '_base_ = "base/one.py"\nmodel = dict(_delete_=True, z=1)\n', "r.py")
    assert load_config_file(replaced)["model"] == {"z": 1}


def test_bases_in_a_cycle_or_in_conflict_are_refused(tmp_path: Path) -> None:
    write(tmp_path, '_base_ = "b.py"', "a.py")
    write(tmp_path, '_base_ = "a.py"', "b.py")
    with pytest.raises(UsageError, match="_base_ leads back"):
        load_config_file(tmp_path / "a.py")
    write(tmp_path, "seed = 1", "x.py")
    write(tmp_path, "seed = 2", "y.py")
    both = write(tmp_path, '_base_ = ["x.py", "y.py"]')
    with pytest.raises(UsageError, match="seed is set by two bases"):
        load_config_file(both)
    with pytest.raises(UsageError, match="path or a list of paths"):
        load_config_file(write(tmp_path, "_base_ = 3"))


def test_overrides_reach_nested_keys_and_leave_the_input_alone() -> None:
    config = {"model": {"a": 1}, "seed": 2}
    changed = apply_overrides(config, {"model.b.c": 3, "seed": 4})
    assert changed == {"model": {"a": 1, "b": {"c": 3}}, "seed": 4}
    assert config == {"model": {"a": 1}, "seed": 2}
    with pytest.raises(UsageError, match="seed is 2"):
        apply_overrides(config, {"seed.x": 1})


def test_upstream_inference_form_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, UPSTREAM_FORM)
    config, sources = parse(str(path), "--num-frames", "4s", "--flash-attn", "False")
    assert config.num_frames == "4s"
    assert config.model is not None
    assert config.model["enable_flash_attn"] is True
    assert config.flow is None
    assert sources["num_frames"] == "command line"
    assert sources["seed"] == f"{path}:9"
    assert sources["num_sample"] == "default"
    assert any("flash_attn = False" in note for note in sources.notes)


@pytest.mark.parametrize("name", ["opensora-v1-2", "tiny"])
def test_shipped_configurations_are_accepted(name: str) -> None:
    config, _ = parse(str(ROOT / "configs" / name / "inference" / "sample.py"))
    assert config.seed == 42
    assert config.scheduler is not None


def test_precedence_is_file_environment_command_line(tmp_path: Path) -> None:
    path = str(write(tmp_path, 'device = "cuda"\nsave_dir = "a"\nseed = 5\n'))
    environ = {"OPENSORA_DEVICE": "mps", "OPENSORA_SAVE_DIR": "b", "OPENSORA_SEED": "9"}
    config, sources = parse(path, "--device", "cpu", environ=environ)
    assert (config.device, config.save_dir) == ("cpu", "b")
    assert config.seed == 5, "only settings that say so are read from the environment"
    assert (sources["device"], sources["save_dir"]) == ("command line", "environment")
    filled = sources.fill(config, {"seed": 1, "num_sample": 7}, "checkpoint")
    assert (filled.seed, filled.num_sample, sources["num_sample"]) == (5, 7, "checkpoint")
    table = sources.table(filled)
    assert "checkpoint" in table
    assert "batch_size" not in table
    assert "batch_size" in sources.table(filled, every=True)


def test_flag_spellings_agree() -> None:
    for words in (
        ["--num_frames", "5", "--no-progress", "-v", "--model.qk_norm=false"],
        ["--num-frames=5", "--progress", "False", "--verbose", "2", "--model.qk_norm", "False"],
        ["--num-frames", "5", "--progress=off", "-v", "2", "--model.qk-norm=0"],
    ):
        config, _ = parse(*words, "--prompt", "a cat", "two dogs")
        assert config.prompt == ("a cat", "two dogs")
        assert config.num_frames == 5
        assert config.progress is False
        assert config.verbose == 2
        assert config.model is not None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sed", "4"], "unknown flag --sed; did you mean --seed"),
        (["--promt=a"], "did you mean --prompt"),
        (["-z"], "unexpected flag '-z'"),
        (["--seed"], "--seed: expected one argument"),
        (["--seed", "x"], "--seed: expected a whole number, got 'x'"),
        (["--seed", "1.5"], "--seed: expected a whole number"),
        (["--seed", "-1"], "--seed: must be at least 0"),
        (["--seed", "9" * 400], "--seed: "),
        (["--cfg-scale", "nan"], "--cfg-scale: expected a number"),
        (["--cfg-scale=-inf"], "--cfg-scale: expected a number"),
        (["--image-size", "64"], "--image-size: expected 2 arguments"),
        (["--image-size", "64", "x"], "--image-size: expected a whole number"),
        (["--noise", "upsteam"], "--noise: 'upsteam' is not one of per-sample, upstream"),
        (["--json=maybe"], "--json: expected True or False"),
        (["--vae.x"], "--vae.x: expected a value"),
        (["--prompt"], "--prompt: expected at least one argument"),
        (["--num-sampling-steps", "0"], "must be at least 1"),
        (["a.py", "b.py"], "unexpected argument 'b.py'"),
        (["a.py", "--config", "b.py"], "two configuration files"),
        (["--loop", "2"], "not available yet"),
        (["--reference-path", "a.png"], "not available yet"),
        (["--mask-strategy", "0"], "not available yet"),
        (["--llm-refine", "True"], "not available yet"),
        (["--watermark", "1"], "not available yet"),
        (["--data-path", "x.csv"], "belongs to training"),
        (["--start-index", "3", "--end-index", "3"], "must be greater"),
    ],
)
def test_wrong_flags_are_refused(argv: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neutral_values_of_unavailable_settings_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, "loop = 1\nllm_refine = False\nreference_path = None\n")
    config, _ = parse(str(path))
    assert config.loop == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("num_frame = 5", "unknown key 'num_frame'; did you mean num_frames?"),
        ("seed = '5'", "seed: expected a whole number, got '5'"),
        ("seed = True", "seed: expected a whole number"),
        ("model = 'STDiT3'", "model: expected a dict or None"),
        ("image_size = (1, 2, 3)", "image_size: expected 2 values or None"),
        ("loop = 4", "loop: long videos"),
    ],
)
def test_wrong_keys_are_refused_with_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path, "\n" + line)
    with pytest.raises(UsageError) as caught:
        parse(str(path))
    assert f"{path}:2: " in str(caught.value)
    assert words in str(caught.value)


def test_any_frozen_dataclass_can_be_a_command_line() -> None:
    @dataclass(frozen=True)
    class Plain:
        steps: int
        lr: float = 1e-3
        model: dict[str, Any] = field(default_factory=lambda: {"width": 8})
        name: str = setting("x", "a name", flags=("-n",))

    Plain.__annotations__.update(steps=int, lr=float, model=dict[str, Any], name=str)
    config, sources = parse_command_line(
        Plain, ["--steps", "3", "--model.depth=2", "-n", "y"], "train", environ={}
    )
    assert config == Plain(3, 1e-3, {"width": 8, "depth": 2}, "y")
    assert sources["model.depth"] == "command line"
    with pytest.raises(UsageError, match="steps is not set: give --steps"):
        parse_command_line(Plain, [], "train", environ={})


def test_help_lists_available_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--num-frames" in shown
    assert "--mask-strategy" not in shown


def test_keys_of_sections_take_hyphens() -> None:
    config, _ = parse_command_line(TrainConfig, ["--model.from-pretrained", "x"], "train.py")
    assert config.model == {"from_pretrained": "x"}


def test_another_programs_files_are_taken_where_they_may_be(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    file.write_text("lr = 1e-4\nmax_steps = 3\n", "utf-8")
    with pytest.raises(UsageError, match="unknown key 'lr'"):
        parse_command_line(ExtractConfig, [str(file)], "x")
    parse_command_line(ExtractConfig, [str(file)], "x", others=TrainConfig)
    file.write_text("learning = 1e-4\n", "utf-8")
    with pytest.raises(UsageError, match="unknown key 'learning'"):
        parse_command_line(ExtractConfig, [str(file)], "x", others=TrainConfig)
