"""Check that models load strictly from every kind of source, and that saving is atomic."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora import checkpoint, weight_saving
from opensora.checkpoint import load_model, read_config, save_model, weights_digest
from opensora.errors import DoesNotFitError, UsageError, WeightsError
from opensora.models.families import identify_family
from opensora.models.stdit import STDiT3, STDiT3Config

TINY = STDiT3Config(
    hidden_size=16,
    depth=2,
    num_heads=2,
    mlp_ratio=1.5,
    caption_channels=8,
    model_max_length=5,
    pred_sigma=False,
)
REPO = "hpcai-tech/OpenSora-STDiT-v3"


@pytest.fixture(autouse=True)
def hub_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo HF_HUB_OFFLINE: the client reads it once, and the user or a test may have set it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def model() -> STDiT3:
    torch.manual_seed(0)
    return STDiT3(TINY).eval()


@pytest.fixture
def folder(model: STDiT3, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def assert_same(a: nn.Module, b: nn.Module) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype
        assert torch.equal(x[name], y[name]), name


def without_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def test_saved_model_loads_as_it_was(model: STDiT3, folder: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = STDiT3.from_pretrained(folder)
    assert loaded.config == TINY
    assert not loaded.training
    assert not loaded.rope.freqs.requires_grad
    assert loaded.t_block[1].weight.requires_grad
    assert_same(loaded, model)
    assert_same(STDiT3.from_pretrained(str(folder.parent), subfolder="saved"), model)


def test_loading_again_after_saving_over_the_source(model: STDiT3, folder: Path) -> None:
    loaded = STDiT3.from_pretrained(folder)
    with torch.no_grad():
        loaded.t_block[1].bias += 1
    loaded.save_pretrained(folder)
    assert_same(STDiT3.from_pretrained(folder), loaded)


def test_dtype_is_kept_or_as_asked(model: STDiT3, tmp_path: Path) -> None:
    model.bfloat16().save_pretrained(tmp_path)
    kept, wide = (STDiT3.from_pretrained(tmp_path, dtype=d) for d in (None, torch.float32))
    assert_same(kept, model)
    assert_same(wide, model.float())


def test_shards_hold_what_one_file_holds(model: STDiT3, folder: Path, tmp_path: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    save_model(model, tmp_path / "parts", max_shard_bytes=size // 3)
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    assert len(shards) > 2
    assert all(p.stat().st_size < size / 3 + 10_000 for p in shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert_same(STDiT3.from_pretrained(tmp_path / "parts"), model)
    by_index = tmp_path / "parts/model.safetensors.index.json"
    assert_same(STDiT3.from_pretrained(by_index), model)
    # Saving once more in one file leaves no shard behind to be loaded instead.
    save_model(model, tmp_path / "parts")
    names = sorted(p.name for p in (tmp_path / "parts").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_lone_safetensors_tells_its_config(model: STDiT3, folder: Path) -> None:
    loaded = STDiT3.from_pretrained(without_config(folder) / "model.safetensors")
    assert loaded.config == TINY
    assert_same(loaded, model)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("pred_sigma", [False, True])
def test_config_is_read_off_the_shapes(qk_norm: bool, pred_sigma: bool) -> None:
    wanted = STDiT3Config(
        in_channels=3,
        patch_size=(2, 1, 3),
        hidden_size=48,
        depth=3,
        num_heads=6,
        mlp_ratio=2.5,
        pred_sigma=pred_sigma,
        qk_norm=qk_norm,
        caption_channels=7,
        model_max_length=9,
    )
    with torch.device("meta"):
        state = STDiT3(wanted).state_dict()
    assert STDiT3.infer_config({k: tuple(v.shape) for k, v in state.items()}) == wanted


def test_config_argument_wins(folder: Path) -> None:
    other = TINY.to_dict() | {"input_sq_size": 256}
    assert load_model(STDiT3, folder, config=other).config.input_sq_size == 256
    assert load_model(STDiT3, folder, config=TINY).config == TINY
    with pytest.raises(UsageError, match="did you mean 'depth'"):
        load_model(STDiT3, folder, config={"dept": 2})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s},
        lambda s: {"module": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
    ids=["plain", "state_dict", "ema", "data_parallel", "compiled"],
)
def test_torch_files_load_whatever_wraps_them(model: STDiT3, tmp_path: Path, wrap: Any) -> None:
    for zipped in (True, False):
        path = tmp_path / f"weights{zipped}.pth"
        torch.save(wrap(model.state_dict()), path, _use_new_zipfile_serialization=zipped)
        assert_same(STDiT3.from_pretrained(path), model)


def test_training_run_folder_loads(model: STDiT3, folder: Path) -> None:
    run = folder.parent / "epoch0-global_step10"
    run.mkdir()
    without_config(folder).rename(run / "model")
    (run / "running_states.json").write_text("{}")
    assert_same(STDiT3.from_pretrained(run), model)


def test_progress_ends_at_the_total(folder: Path, model: STDiT3) -> None:
    calls: list[tuple[int, int]] = []
    load_model(STDiT3, folder, progress=lambda done, total: calls.append((done, total)))
    total = sum(t.nbytes for t in model.state_dict().values())
    assert len(calls) == len(model.state_dict())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_mismatch_counts_and_names_what_differs(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["t_block.1.bias"]
        for i in range(5):
            tensors[f"extra.{i}"] = torch.zeros(1)
        tensors["final_layer.linear.bias"] = torch.zeros(7)

    rewrite(folder, change)
    with pytest.raises(WeightsError) as raised:
        STDiT3.from_pretrained(folder)
    message = str(raised.value)
    assert "1 missing (t_block.1.bias)" in message
    assert "5 unexpected (extra.0, extra.1, extra.2, ...)" in message
    assert "1 wrong shape (final_layer.linear.bias is [7], expected [16])" in message
    assert "\n" not in message


def test_another_family_is_named(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("temporal_blocks."):
                del tensors[name]
            elif name.startswith("spatial_blocks."):
                tensors[name.removeprefix("spatial_")] = tensors.pop(name)
        tensors["blocks.0.attn_temp.qkv.weight"] = torch.zeros(1)
        tensors["t_block_temp.1.weight"] = torch.zeros(1)

    rewrite(folder, change)
    with pytest.raises(WeightsError, match=r"this is STDiT2; you asked for STDiT3 \(.* missing"):
        STDiT3.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("STDiT3", ["spatial_blocks.0.a", "temporal_blocks.0.a", "t_block.1.weight"]),
        ("STDiT2", ["blocks.0.attn_temp.qkv.weight", "t_block_temp.1.weight"]),
        ("STDiT", ["blocks.0.attn_temp.qkv.weight", "t_block.1.weight"]),
        ("DiT or Latte", ["blocks.0.adaLN_modulation.1.weight"]),
        ("PixArt", ["blocks.0.cross_attn.q_linear.weight", "blocks.0.scale_shift_table"]),
        ("VideoAutoencoderPipeline", ["spatial_vae.module.encoder.x", "temporal_vae.encoder.x"]),
        ("AutoencoderKL", ["encoder.down_blocks.0.a", "decoder.up_blocks.0.a"]),
        ("VAE_Temporal", ["encoder.block_res_blocks.0.0.a", "decoder.block_res_blocks.0.0.a"]),
        ("T5", ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"]),
        ("Open-Sora Plan", ["transformer_blocks.0.a", "caption_projection.a"]),
        ("Open-Sora Plan LatteT2V", ["transformer_blocks.0.a", "temporal_transformer_blocks.0.a"]),
        ("unknown", ["weight"]),
        ("unknown", []),
    ],
)  # fmt: skip
def test_families_are_told_by_names(family: str, names: list[str]) -> None:
    assert identify_family(names) == family


def test_weights_of_no_known_model_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"\(a, ...\) are of no known model"):
        STDiT3.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(folder: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["spatial_blocks.1.mlp.fc1.bias"][3] = value

    rewrite(folder, change)
    message = r"spatial_blocks.1.mlp.fc1.bias holds 1 NaN or infinite of 24 values"
    with pytest.raises(WeightsError, match=message):
        STDiT3.from_pretrained(folder)


def test_truncated_safetensors_is_reported(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for kept in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match=rf"cut short or damaged \({kept} bytes.*again"):
            STDiT3.from_pretrained(folder)


def test_truncated_torch_file_is_reported(model: STDiT3, tmp_path: Path) -> None:
    for zipped in (True, False):
        path = tmp_path / "weights.pt"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for kept in (0, 1, 50, len(whole) // 2, len(whole) - 100):
            path.write_bytes(whole[:kept])
            with pytest.raises(WeightsError, match="cut short or damaged"):
                STDiT3.from_pretrained(path)


def test_lfs_pointer_is_recognised(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(WeightsError, match="git lfs pull"):
        STDiT3.from_pretrained(folder)


class _Attack:
    """Write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "ran"))


def test_pickled_code_never_runs(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"x": torch.zeros(1), "y": _Attack(trace)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Attack(trace), protocol=2))
    torch.save({"y": _Attack(trace)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "raw.pt", "old.pt"):
        with pytest.raises(WeightsError, match=r"can run code|damaged") as raised:
            STDiT3.from_pretrained(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert not trace.exists()
    with pytest.raises(
        WeightsError, match=r"zip.pt holds Python objects besides tensors \(getattr\).*convert"
    ):
        STDiT3.from_pretrained(tmp_path / "zip.pt")


def test_missing_parts_of_a_folder_are_named(model: STDiT3, folder: Path, tmp_path: Path) -> None:
    save_model(model, tmp_path / "parts", max_shard_bytes=20_000)
    first = min((tmp_path / "parts").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(WeightsError, match=f"lacks 1 of [0-9]+ shards .{first.name}"):
        STDiT3.from_pretrained(tmp_path / "parts")
    with pytest.raises(WeightsError, match=r"saved has no config\.json"):
        STDiT3.from_pretrained(without_config(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="saved has no weights"):
        STDiT3.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"cannot read .*config\.json"):
        read_config(folder)


def test_several_files_without_index_are_not_guessed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"several weight files and no index \(a.safetensors"):
        STDiT3.from_pretrained(folder)


def test_pipeline_folder_asks_for_the_part(folder: Path) -> None:
    root = folder.parent / "pipe"
    root.mkdir()
    folder.rename(root / "transformer")
    (root / "model_index.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"whole pipeline.*subfolder= 'transformer'"):
        STDiT3.from_pretrained(root)
    STDiT3.from_pretrained(root, subfolder="transformer")
    with pytest.raises(WeightsError, match="folder not found: vae in"):
        STDiT3.from_pretrained(root, subfolder="vae")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let no request leave, and list those that were tried."""
    tried: list[str] = []

    def refuse(self: Any, repo: str, **_: Any) -> None:
        tried.append(repo)
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return tried


@pytest.mark.parametrize(
    "source", ["./x", "/nowhere/x", "a/b/c", "x.pth", "owner/x.safetensors", "../x/y", "~/x", "x"]
)
def test_paths_that_do_not_exist_never_reach_the_hub(source: str, no_hub: list[str]) -> None:
    with pytest.raises(WeightsError, match=f"^file not found: {re.escape(source)}"):
        STDiT3.from_pretrained(source)
    assert no_hub == []


def test_unreachable_hub_is_one_clear_sentence(no_hub: list[str], tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as raised:
        STDiT3.from_pretrained(REPO)
    assert no_hub == [REPO]
    message = str(raised.value)
    assert "not a local path and the hub cannot be reached (no route to host)" in message
    assert f"hf download {REPO} --local-dir FOLDER" in message
    assert "\n" not in message


def cache(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a folder out as the hub client's cache does, with one file of the listing missing."""
    snapshot = root / f"models--{REPO.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    real = huggingface_hub.snapshot_download

    def download(repo: str, **options: Any) -> str:
        return str(real(repo, cache_dir=root, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_cached_hub_model_loads_without_a_network(
    model: STDiT3,
    folder: Path,
    tmp_path: Path,
    no_hub: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache(tmp_path / "cache", folder, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(STDiT3.from_pretrained(REPO), model)
    assert no_hub == []
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        STDiT3.from_pretrained("someone/else")
    assert no_hub == []


def test_hub_download_takes_weights_and_small_files_only(
    model: STDiT3, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Info:
        def __init__(self, names: list[str]) -> None:
            self.siblings = [type("File", (), {"rfilename": name}) for name in names]

    def info(self: Any, repo: str, timeout: float) -> Info:
        return Info(["README.md", "transformer/config.json", "transformer/model.safetensors"])

    def download(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError("not cached")
        asked.append({"repo": repo, **options})
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder.rename(folder.parent / "transformer")
    assert_same(STDiT3.from_pretrained(REPO, subfolder="transformer"), model)
    (call,) = asked
    assert call["repo"] == REPO
    assert "transformer/*.safetensors" in call["allow_patterns"]
    assert all(pattern.startswith("transformer/") for pattern in call["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in call["allow_patterns"])


def test_failed_save_leaves_the_earlier_model(
    model: STDiT3, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with torch.no_grad():
        model.t_block[1].bias += 1

    def interrupted(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_saving, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, folder)

    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_saving, "save_file", full)
    with pytest.raises(WeightsError, match=r"cannot write the model to .*No space left"):
        save_model(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_full_disk_is_seen_before_writing(
    model: STDiT3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(weight_saving.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DoesNotFitError, match="are free"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_reported(model: STDiT3, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot write the model to"):
        save_model(model, tmp_path / "file" / "folder")


def test_digest_is_that_of_the_file_and_covers_all_files(model: STDiT3, folder: Path) -> None:
    plain = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights_digest(folder) == weights_digest(folder / "model.safetensors")
    assert weights_digest(folder) == f"sha256:{plain}"
    root = folder.parent / "pipe"
    save_model(model, root / "a")
    save_model(model, root / "b")
    (root / "model_index.json").write_text("{}")
    both = weights_digest(root)
    with torch.no_grad():
        model.t_block[1].bias += 1
    save_model(model, root / "b", max_shard_bytes=20_000)
    assert weights_digest(root) != both
    assert weights_digest(root, "b").startswith("sha256:")
    assert weights_digest(root, "a") == f"sha256:{plain}"


class _Buffered(checkpoint.PretrainedMixin, nn.Module):
    """Have a buffer that is not saved and a name that was another one once."""

    family = "Buffered"

    class config_class:  # noqa: N801
        @classmethod
        def from_dict(cls, data: dict[str, Any]) -> dict[str, Any]:
            return data

        def to_dict(self) -> dict[str, Any]:
            return {}

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = self.config_class()
        self.inner = nn.Module()
        self.inner.register_buffer("table", torch.arange(3), persistent=False)
        self.inner.weight = nn.Parameter(torch.ones(2))
        self.inner.register_buffer("count", torch.tensor(7))
        self.inner.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}old")


def test_buffers_that_are_not_saved_are_computed(tmp_path: Path) -> None:
    _Buffered(None).save_pretrained(tmp_path)
    loaded = _Buffered.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.inner.table.tolist() == [0, 1, 2]
    assert loaded.inner.count == 7
    assert loaded.inner.count.dtype == torch.int64
    assert loaded.inner.weight.dtype == torch.bfloat16
    assert "inner.table" not in loaded.state_dict()


def test_older_names_that_a_module_knows_are_accepted(tmp_path: Path) -> None:
    save_file(
        {"inner.old": torch.ones(2), "inner.count": torch.tensor(1)}, tmp_path / "m.safetensors"
    )
    (tmp_path / "config.json").write_text("{}")
    assert _Buffered.from_pretrained(tmp_path).inner.weight.tolist() == [1, 1]
