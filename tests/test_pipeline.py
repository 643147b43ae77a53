"""The pipeline makes what is asked for, the same in every batch, and nothing from bad numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import opensora
from opensora import request as request_module
from opensora.diagnosis import find_bad_layer
from opensora.errors import DoesNotFitError, NonFiniteError, UsageError, WeightsError
from opensora.models.text_encoder import T5TextEncoder
from opensora.pipeline import OpenSoraPipeline
from opensora.pipeline_loading import load_parts
from opensora.pipeline_parts import PipelineParts
from opensora.progress import Progress
from opensora.request import Request, estimate_memory, training_note, validate_request
from opensora.schedulers.rflow import RFlow

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is not a size that the model was trained for", "ignore:.* tokens long"
)


def latent(pipe: OpenSoraPipeline, prompt: Any = "a red ball", **arguments: Any) -> Tensor:
    return pipe(prompt, output_type="latent", progress=False, **arguments).frames


class Spy(nn.Module):
    """Record the calls of the transformer it stands for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor, timestep: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append({"x": x, "timestep": timestep, **kwargs})
        return self.inner(x, timestep, **kwargs)


def spied(pipe: OpenSoraPipeline) -> Spy:
    spy = Spy(pipe.transformer)
    pipe.transformer = spy
    return spy


def test_output_types_hold_the_same_clip(pipe: OpenSoraPipeline) -> None:
    made = pipe("a red ball", seed=3, progress=False)
    assert made.frames.shape == (1, 9, 32, 48, 3)
    assert made.frames.dtype == np.uint8
    assert made.seeds == [3]
    assert made.texts == ["a red ball"]
    assert made.request.size == (9, 32, 48)
    assert made.request.num_inference_steps == 4
    tensor = pipe("a red ball", seed=3, output_type="pt", progress=False).frames
    assert tensor.shape == (1, 9, 3, 32, 48)
    as_pixels = (tensor * 255 + 0.5).byte().movedim(2, -1).numpy()
    assert np.abs(as_pixels.astype(int) - made.frames).max() <= 1
    images = pipe("a red ball", seed=3, output_type="pil", progress=False).frames
    assert np.array_equal(np.stack([np.asarray(image) for image in images[0]]), made.frames[0])
    assert latent(pipe, seed=3).shape == (1, 4, 3, 4, 6)


def test_a_clip_depends_on_its_own_seed_alone(pipe: OpenSoraPipeline) -> None:
    prompts = ["one ball", "two dogs and a cat", "three"]
    together = latent(pipe, prompts, seed=5, batch_size=3)
    for index, prompt in enumerate(prompts):
        alone = latent(pipe, prompt, seed=5 + index)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)
    pairs = latent(pipe, prompts, seed=[7, 6, 5], batch_size=2)
    assert not torch.allclose(pairs[0], together[0], atol=1e-2)
    repeated = latent(pipe, "one ball", seed=4, num_videos_per_prompt=2)
    torch.testing.assert_close(repeated[1], together[0], rtol=1e-4, atol=1e-5)


def test_upstream_noise_gives_the_same_frames_from_the_same_start(pipe: OpenSoraPipeline) -> None:
    prompts = ["one ball", "two dogs"]
    upstream = latent(pipe, prompts, seed=11, batch_size=2, noise="upstream")
    spent = torch.rand(3)
    generator = torch.Generator().manual_seed(11)
    own = latent(pipe, prompts, generator=generator, batch_size=2)
    torch.testing.assert_close(upstream, own, rtol=1e-4, atol=1e-5)
    torch.manual_seed(11)
    for _ in range(1 + 4):  # the start, and one draw a step
        torch.randn(2, 4, 3, 4, 6)
    assert torch.equal(torch.rand(3), spent), "the global stream stands where upstream's would"
    torch.manual_seed(11)
    torch.testing.assert_close(
        latent(pipe, prompts, batch_size=2, noise="upstream"), upstream, rtol=0, atol=0
    )


def test_guidance_contrasts_with_the_null_text_under_the_prompts_mask(
    pipe: OpenSoraPipeline,
) -> None:
    spy = spied(pipe)
    latent(pipe, ["a b", "a longer prompt"], seed=1, batch_size=2, num_inference_steps=1)
    call = spy.calls[0]
    y, mask = pipe.text_encoder.encode(["a b", "a longer prompt"])
    assert torch.equal(call["y"][:2], y)
    table = spy.y_embedder.y_embedding
    assert torch.equal(call["y"][2], table[None, : y.shape[2]])
    assert torch.equal(call["y"][3], call["y"][2])
    assert torch.equal(call["mask"], mask)
    assert mask.sum(1).tolist() == [4, 16]
    assert call["x"].shape[0] == 4
    assert torch.equal(call["x"][:2], call["x"][2:])
    assert "x_mask" not in call


def test_guidance_one_runs_the_prompt_alone(pipe: OpenSoraPipeline) -> None:
    spy = spied(pipe)
    latent(pipe, seed=1, guidance_scale=1.0)
    assert [call["x"].shape[0] for call in spy.calls] == [1] * 4


def test_negative_prompt_takes_the_place_of_the_null_text(pipe: OpenSoraPipeline) -> None:
    spy = spied(pipe)
    changed = latent(pipe, seed=1, negative_prompt="Blurry")
    y, mask = pipe.text_encoder.encode(["a red ball", "blurry"])
    torch.testing.assert_close(spy.calls[0]["y"], y)
    assert torch.equal(spy.calls[0]["mask"], mask)
    assert not torch.allclose(changed, latent(pipe, seed=1), atol=1e-3)


@pytest.mark.parametrize(("frames", "told"), [(1, 120.0), (9, 24.0)])
def test_the_model_is_told_size_and_rate(pipe: OpenSoraPipeline, frames: int, told: float) -> None:
    spy = spied(pipe)
    made = latent(pipe, seed=1, num_frames=frames, height=16, width=64, fps=24)
    assert made.shape == (1, 4, 1 if frames == 1 else 3, 2, 8)
    call = spy.calls[0]
    assert (call["fps"].tolist(), call["height"].tolist(), call["width"].tolist()) == (
        [told],
        [16.0],
        [64.0],
    )


def test_scores_are_appended_and_prompts_cleaned(pipe: OpenSoraPipeline) -> None:
    made = pipe("A  RED ball!", aes=6.5, flow=2, camera_motion="pan left", progress=False, seed=0)
    assert made.texts == [
        "a red ball! aesthetic score: 6.5. motion score: 2.0. camera motion: pan left."
    ]


def test_training_mode_is_left_for_sampling_and_restored(pipe: OpenSoraPipeline) -> None:
    expected = latent(pipe, seed=1)
    pipe.transformer.train()
    pipe.transformer.y_embedder.uncond_prob = 1.0
    torch.testing.assert_close(latent(pipe, seed=1), expected, rtol=0, atol=0)
    assert pipe.transformer.training
    assert not pipe.vae.training


def test_callback_sees_every_step_and_may_replace_the_latent(pipe: OpenSoraPipeline) -> None:
    seen = []

    def watch(pipe: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> None:
        seen.append((step, float(t[0]), state["latents"].shape))

    latent(pipe, seed=1, callback_on_step_end=watch)
    assert seen == [(i, 1000 - 250 * i, (1, 4, 3, 4, 6)) for i in range(4)]

    def zero(pipe: Any, step: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(state["latents"])} if step == 3 else {}

    assert not latent(pipe, seed=1, callback_on_step_end=zero).any()


def test_seed_may_be_drawn_and_is_reported(pipe: OpenSoraPipeline) -> None:
    torch.manual_seed(1)
    made = pipe("x", output_type="latent", progress=False)
    again = pipe("x", seed=made.seeds, output_type="latent", progress=False)
    assert torch.equal(made.frames, again.frames)


@pytest.mark.parametrize("name", ["spatial_blocks.0.attn.qkv", "temporal_blocks.1.mlp.fc1"])
def test_nan_weights_are_named_with_step_and_layer(pipe: OpenSoraPipeline, name: str) -> None:
    pipe.transformer.get_parameter(f"{name}.weight").data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        latent(pipe, seed=1)
    assert f"step 1 of 4, first in layer {name} (its weight weight holds NaN" in str(caught.value)


def test_a_layer_that_overflows_late_is_named_with_its_step(pipe: OpenSoraPipeline) -> None:
    layer, calls = pipe.transformer.temporal_blocks[0].mlp.fc2, []

    def overflow(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        calls.append(1)
        return output + float("inf") if len(calls) >= 3 else None

    layer.register_forward_hook(overflow)
    with pytest.raises(
        NonFiniteError, match=r"step 3 of 4, first in layer temporal_blocks\.0\.mlp"
    ):
        latent(pipe, seed=1)


def test_overflow_by_guidance_is_told_from_a_bad_layer(pipe: OpenSoraPipeline) -> None:
    pipe.transformer.final_layer.register_forward_hook(lambda layer, inputs, out: out * 1e37)
    with pytest.raises(NonFiniteError, match="not in a layer: guidance_scale 999 may be too large"):
        latent(pipe, seed=1, guidance_scale=999.0)


def test_bad_frames_are_named_with_chunk_and_layer(pipe: OpenSoraPipeline) -> None:
    pipe.vae.get_parameter("spatial_vae.module.decoder.conv_in.bias").data[0] = float("inf")
    with pytest.raises(NonFiniteError) as caught:
        pipe("x", seed=1, num_frames=20, progress=False)
    words = "chunk 0, frame 0 of 20, first in spatial_vae.module.decoder.conv_in"
    assert words in str(caught.value)


def test_bad_text_states_are_named(pipe: OpenSoraPipeline) -> None:
    next(pipe.text_encoder.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="text encoder gave NaN"):
        latent(pipe, seed=1)


def test_find_bad_layer_finds_nothing_in_a_finite_run(pipe: OpenSoraPipeline) -> None:
    assert find_bad_layer(pipe.text_encoder, lambda: pipe.text_encoder.encode(["x"])) is None


def test_save_and_load_give_the_same_clip(tmp_path: Path, pipe: OpenSoraPipeline) -> None:
    expected = latent(pipe, seed=1)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = OpenSoraPipeline.from_pretrained(tmp_path / "saved", device="cpu", progress=False)
    assert torch.equal(latent(loaded, seed=1), expected)
    assert loaded.defaults == pipe.defaults
    assert set(loaded.sources) == {"transformer", "vae", "text_encoder"}
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["opensora", "STDiT3"]


def test_half_precision_files_keep_vectors_in_full(tmp_path: Path, pipe: OpenSoraPipeline) -> None:
    pipe.save_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = OpenSoraPipeline.from_pretrained(tmp_path, device="cpu", progress=False)
    assert loaded.dtype == torch.float32
    assert pipe.dtype == torch.float32
    own, read = pipe.transformer.state_dict(), loaded.transformer.state_dict()
    for key, value in own.items():
        is_buffer = key == "y_embedder.y_embedding"
        stored = value.bfloat16().float() if value.ndim > 1 and not is_buffer else value
        assert torch.equal(read[key], stored), key
    assert torch.equal(read["rope.freqs"], own["rope.freqs"])


def test_dtype_and_device_reach_the_parts(pipeline_folder: Path) -> None:
    pipe = OpenSoraPipeline.from_pretrained(
        pipeline_folder, torch_dtype=torch.bfloat16, device="cpu", progress=False
    )
    assert (pipe.dtype, pipe.device.type) == (torch.bfloat16, "cpu")
    assert next(pipe.vae.parameters()).dtype == torch.bfloat16
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe("x", seed=1, progress=False).frames.shape == (1, 9, 32, 48, 3)
    assert pipe.to("cpu", torch.float32) is pipe
    assert pipe.dtype == torch.float32
    assert pipe.to(device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_components_can_be_shared_and_injected(
    pipe: OpenSoraPipeline, pipeline_folder: Path
) -> None:
    shared = OpenSoraPipeline(**pipe.components, defaults=pipe.defaults)
    assert torch.equal(latent(shared, seed=1), latent(pipe, seed=1))
    mine = RFlow(num_sampling_steps=2, cfg_scale=1.0)
    loaded = OpenSoraPipeline.from_pretrained(
        pipeline_folder, transformer=pipe.transformer, scheduler=mine, device="cpu", progress=False
    )
    assert loaded.transformer is pipe.transformer
    assert loaded.scheduler is mine
    with pytest.raises(UsageError, match="unknown part 'vea'"):
        OpenSoraPipeline.from_pretrained(pipeline_folder, vea=pipe.vae, progress=False)


def test_parts_of_different_models_are_refused(pipe: OpenSoraPipeline) -> None:
    parts = pipe.components
    for wrong in (
        {"d_model": 32, "max_length": 32},
        {"d_model": 24, "max_length": 64},
    ):
        encoder = T5TextEncoder.byt5(d_ff=8, num_layers=1, num_heads=2, **wrong)
        with pytest.raises(WeightsError, match="name the text_encoder that belongs to it"):
            OpenSoraPipeline(**{**parts, "text_encoder": encoder})
    with pytest.raises(UsageError, match="unknown default 'frames'"):
        OpenSoraPipeline(**parts, defaults={"frames": 3})


def test_transformer_weights_alone_name_the_release(pipeline_folder: Path) -> None:
    parts = PipelineParts.find(pipeline_folder / "transformer")
    assert parts.vae.source == "hpcai-tech/OpenSora-VAE-v1.2"
    assert parts.text_encoder.source == "DeepFloyd/t5-v1_1-xxl"
    assert parts.defaults["num_frames"] == 51
    assert parts.vae_factor == 8


def test_parts_can_be_named_one_by_one(pipeline_folder: Path, pipe: OpenSoraPipeline) -> None:
    parts = PipelineParts.from_config(
        model={"type": "STDiT3", "from_pretrained": str(pipeline_folder / "transformer")},
        vae={"from_pretrained": str(pipeline_folder / "vae"), "micro_batch_size": 2},
        text_encoder={"from_pretrained": str(pipeline_folder), "model_max_length": 16},
        scheduler={"type": "rflow", "num_sampling_steps": 3},
    )
    loaded = load_parts(parts, device="cpu", progress=Progress(False))
    assert loaded.vae.micro_batch_size == 2
    assert loaded.text_encoder.max_length == 16
    assert loaded.scheduler.num_sampling_steps == 3
    assert torch.equal(
        loaded.transformer.state_dict()["t_block.1.weight"],
        pipe.transformer.state_dict()["t_block.1.weight"],
    )


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"model": {"type": "STDiT3-XL/2"}}, UsageError, "names no weights"),
        (
            {"model": {"type": "STDiT3-XL", "from_pretrained": "{folder}"}},
            UsageError,
            "STDiT3-XL/2",
        ),
        ({"model": {"from_pretrained": "{folder}", "depht": 3}}, UsageError, "depht"),
        ({"ckpt_path": "nowhere/at/all"}, WeightsError, "does not exist"),
        ({"ckpt_path": "missing.safetensors"}, WeightsError, "does not exist"),
        ({"ckpt_path": "{folder}", "vae": {"type": "WFVAE"}}, UsageError, "vae.type 'WFVAE'"),
        ({"ckpt_path": "{folder}", "vae": {"micro_batchsize": 1}}, UsageError, "micro_batch_size"),
        ({"ckpt_path": "{folder}", "vae": {"micro_batch_size": 0}}, UsageError, "at least 1"),
        ({"ckpt_path": "{folder}", "text_encoder": {"type": "clip"}}, UsageError, "use 't5'"),
        ({"ckpt_path": "{folder}", "text_encoder": {"max_len": 1}}, UsageError, "model_max_length"),
        ({"ckpt_path": "{folder}", "scheduler": {"type": "iddpm"}}, UsageError, "iddpm"),
        ({"ckpt_path": "{folder}", "scheduler": {"cfgscale": 1}}, UsageError, "cfg_scale"),
    ],
)
def test_wrong_parts_are_refused_before_loading(
    pipeline_folder: Path, config: dict[str, Any], error: type[Exception], words: str
) -> None:
    filled = json.loads(json.dumps(config).replace("{folder}", str(pipeline_folder)))
    with pytest.raises(error) as caught:
        PipelineParts.from_config(**filled)
    assert words in str(caught.value)


def test_a_named_type_must_be_that_of_the_weights(pipeline_folder: Path) -> None:
    model = {"type": "STDiT3-XL/2", "from_pretrained": str(pipeline_folder)}
    with pytest.raises(
        WeightsError, match=r"hidden_size is 32, but model\.type STDiT3-XL/2 has 1152"
    ):
        load_parts(PipelineParts.from_config(model=model), device="cpu", progress=Progress(False))


def test_incomplete_folders_are_named(tmp_path: Path, pipeline_folder: Path) -> None:
    copy = shutil.copytree(pipeline_folder, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    with pytest.raises(WeightsError, match="vae missing"):
        OpenSoraPipeline.from_pretrained(copy, progress=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": ["a", " "]}, "prompt is empty"),
        ({"prompt": 'a{"reference_path": "x.png"}'}, "not available yet"),
        ({"prompt": "|0|a|1|b"}, "not available yet"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1, got 0"),
        ({"num_frames": 2.5}, "num_frames must be a whole number"),
        (
            {"height": 30, "width": 32},
            "height must be a multiple of 8 pixels, got 30: use 24 or 32",
        ),
        ({"height": 32, "width": 4}, "width must be a multiple of 8 pixels, got 4: use 8"),
        ({"height": 32}, "give both height and width"),
        ({"height": 32, "width": 160_000}, "at most 16384"),
        ({"fps": 0}, "fps must be greater than 0"),
        ({"fps": float("nan")}, "fps must be a finite number"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": 1e4}, "guidance_scale must be at most 1000"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": [1, 2]}, "expected one seed or 1"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"num_videos_per_prompt": 0}, "at least one prompt"),
        ({"output_type": "gif"}, "output_type 'gif'"),
        ({"noise": "white"}, "noise 'white'"),
    ],
)
def test_wrong_requests_are_refused(
    pipe: OpenSoraPipeline, arguments: dict[str, Any], words: str
) -> None:
    arguments = {"prompt": "a", **arguments}
    with pytest.raises(UsageError) as caught:
        pipe(arguments.pop("prompt"), progress=False, **arguments)
    assert words in str(caught.value)


def test_untrained_sizes_are_possible_with_a_warning(pipe: OpenSoraPipeline) -> None:
    with pytest.warns(UserWarning, match="9 frames of 48x32"):
        latent(pipe, seed=1, num_frames=3)


def test_requests_beyond_the_memory_are_refused_before_the_work(
    pipe: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DoesNotFitError, match="needs at least"):
        latent(pipe, seed=1, num_frames=900_000, height=4096, width=4096)
    monkeypatch.setattr(request_module, "available_memory", lambda device: 1000)
    with pytest.raises(DoesNotFitError, match=r"cpu has 0\.0 GiB left"):
        latent(pipe, seed=1)


def test_memory_estimate_grows_with_the_request() -> None:
    small = Request(51, 240, 424, 24.0, 30, 7.0)
    large = Request(204, 720, 1280, 24.0, 30, 7.0)
    sizes = [estimate_memory(small, (15, 30, 53)), estimate_memory(large, (60, 90, 160))]
    assert 0.2 < sizes[0] / 2**30 < 4
    assert 10 < sizes[1] / 2**30 < 80
    assert estimate_memory(small, (15, 30, 53), weights=1 << 40) > 1 << 40


def test_known_sizes_need_not_be_multiples() -> None:
    given = {"num_frames": 1, "fps": 8, "num_inference_steps": 1, "guidance_scale": 1.0}
    request = validate_request(
        defaults={}, known_sizes=[(480, 854)], height=480, width=854, **given
    )
    assert request.size == (1, 480, 854)
    with pytest.raises(UsageError, match="use 848 or 856"):
        validate_request(defaults={}, height=480, width=854, **given)
    with pytest.raises(UsageError, match="height is not set"):
        validate_request(defaults={}, width=8, **given)


def test_training_note_lists_the_trained_sizes() -> None:
    request = Request(9, 32, 48, 8.0, 4, 3.0)
    assert training_note(request, []) is None
    assert training_note(request, [[9, 32, 48]]) is None
    assert "17 frames of 64x64" in (training_note(request, [[17, 64, 64]]) or "")


def test_package_offers_the_pipeline() -> None:
    assert opensora.OpenSoraPipeline is OpenSoraPipeline
