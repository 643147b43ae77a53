"""Check the text encoder: shapes, padding, saving, loading, and what it says when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.errors import UsageError, WeightsError
from opensora.models.text_encoder import T5TextEncoder, grow
from opensora.models.text_encoder.lazy_transformers import load_transformers

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red ball", "a blue star moves to the left of the picture"]


def tiny(max_length: int = 20, **changes: Any) -> T5TextEncoder:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2} | changes
    return T5TextEncoder.byt5(max_length=max_length, **sizes).eval()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def wordpiece_t5(folder: Path) -> Path:
    """Write a T5 with a vocabulary of words, model and tokenizer in one folder as on the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    transformers = load_transformers()
    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in PROMPTS for word in text.split()})]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_states_are_padded_to_the_full_length() -> None:
    encoder = tiny(max_length=50)
    y, mask = encoder.encode(PROMPTS)
    assert y.shape == (2, 1, 50, 16)
    assert y.dtype == torch.float32
    assert mask.dtype == torch.int64
    # One id per byte and one for the end.
    assert mask.sum(1).tolist() == [len(text) + 1 for text in PROMPTS]


def test_padding_does_not_change_a_prompt() -> None:
    long, short = tiny(max_length=50), tiny(max_length=11)
    n = len(PROMPTS[0]) + 1
    y_long, mask = long.encode(PROMPTS)
    y_short, _ = short.encode(PROMPTS[:1])
    assert mask[0].sum() == n
    torch.testing.assert_close(y_long[0, :, :n], y_short[0, :, :n], rtol=0, atol=1e-5)


def test_ids_are_bytes() -> None:
    encoder = tiny(max_length=6)
    ids, mask = encoder.tokenize(["h\u00e9"])
    assert ids.tolist() == [[byte + 3 for byte in "h\u00e9".encode()] + [1, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_long_prompt_warns_with_the_number_of_lost_tokens() -> None:
    encoder = tiny(max_length=20)
    total = len(PROMPTS[1]) + 1
    with pytest.warns(UserWarning, match=f"prompt 1 is {total} tokens.*last {total - 20} were cut"):
        ids, mask = encoder.tokenize(PROMPTS)
    assert ids.shape == (2, 20)
    assert mask[1].all()
    assert ids[1, -1] == 1, "the end token must survive"


def test_prompt_that_just_fits_does_not_warn() -> None:
    encoder = tiny(max_length=len(PROMPTS[0]) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(PROMPTS[:1])


def test_a_fresh_byte_encoder_tells_neighbours_from_distant_bytes() -> None:
    encoder = tiny(max_length=60)
    text = "a" * 40
    states = encoder.encode([text, text[:18] + "b" + text[19:], text[:36] + "b" + text[37:]])[0]
    near, far = ((states[i, 0, 19] - states[0, 0, 19]).norm() for i in (1, 2))
    assert near > 3 * far


def test_a_grown_encoder_begins_as_it_was_and_carries_words_on() -> None:
    encoder = tiny(max_length=60)
    plain, grown = grow(encoder, 3, 4, share=0), grow(encoder, 3, 4)
    states, mask = encoder.encode(PROMPTS)
    assert mask.sum() > 40
    assert torch.equal(states, plain.encode(PROMPTS)[0])
    changed = (grown.encode(PROMPTS)[0] - states).norm() / states.norm()
    assert 0.05 < changed < 1
    assert (grown.model.config.num_layers, encoder.model.config.num_layers) == (3, 2)
    # A letter tells more about itself to those after it, and no more to those before.
    text = "a" * 40
    pair = [text, text[:20] + "b" + text[21:]]
    one, other = (each.encode(pair)[0][:, 0] for each in (plain, grow(encoder, 3, 4, share=2)))
    more = (other[1] - other[0]).norm(dim=1) / (one[1] - one[0]).norm(dim=1)
    assert more[23:30].mean() > 1.3
    assert more[11:18].mean() < 1.1
    ids, tokens = grown.tokenize(PROMPTS)
    grown.train()(ids, tokens).square().mean().backward()
    for name, weight in grown.model.named_parameters():
        if name.endswith(("o.weight", "wo.weight", "v.weight")):
            assert weight.grad is not None
            assert weight.grad.abs().max() > 0, name
    assert torch.equal(grow(encoder, 3, 4).encode(PROMPTS)[0], grown.eval().encode(PROMPTS)[0])
    assert grow(encoder, 2, 2) is encoder
    with pytest.raises(UsageError, match="2 layers and 2 heads"):
        grow(encoder, num_layers=2, num_heads=1)


def test_forward_trains_and_encode_does_not() -> None:
    encoder = tiny().train()
    ids, mask = encoder.tokenize(PROMPTS[:1])
    encoder(ids, mask).square().mean().backward()
    grads = [parameter.grad for parameter in encoder.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert not encoder.encode(PROMPTS[:1])[0].requires_grad


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_encoder_loads_with_length_and_values(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    encoder = tiny(max_length=33)
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "text_encoder" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "tokenizer").iterdir()] == ["tokenizer_config.json"]
    loaded = T5TextEncoder.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.max_length == 33
    assert loaded.dtype == (dtype or torch.float32)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    y, mask = loaded.encode(PROMPTS[:1])
    expected, expected_mask = encoder.encode(PROMPTS[:1])
    assert torch.equal(mask, expected_mask)
    tolerance = 0.0 if dtype is None else 0.1
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)


def test_named_subfolders_and_length_are_honoured(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "text_encoder").rename(tmp_path / "te")
    (tmp_path / "tokenizer").rename(tmp_path / "tok")
    loaded = T5TextEncoder.from_pretrained(
        tmp_path, subfolder="te", tokenizer_subfolder="tok", max_length=7
    )
    assert loaded.max_length == 7


def test_full_t5_in_one_folder_loads_without_its_decoder(tmp_path: Path) -> None:
    encoder = T5TextEncoder.from_pretrained(wordpiece_t5(tmp_path), max_length=12)
    y, mask = encoder.encode(PROMPTS)
    assert y.shape == (2, 1, 12, 16)
    assert mask.sum(1).tolist() == [len(text.split()) + 1 for text in PROMPTS]
    assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_default_length_is_upstreams(tmp_path: Path) -> None:
    assert T5TextEncoder.from_pretrained(wordpiece_t5(tmp_path)).max_length == 300


def test_weights_only_bin_file_loads(tmp_path: Path) -> None:
    encoder = tiny()
    encoder.save_pretrained(tmp_path)
    folder = tmp_path / "text_encoder"
    (folder / "model.safetensors").unlink()
    torch.save(encoder.model.state_dict(), folder / "pytorch_model.bin")
    loaded = T5TextEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(PROMPTS[:1])[0], encoder.encode(PROMPTS[:1])[0])


class Bomb:
    """Create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    folder = tmp_path / "text_encoder"
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="cannot load"):
        T5TextEncoder.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    tiny(num_layers=1).save_pretrained(tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 2}))
    with pytest.raises(WeightsError, match=r"lacks \d+ tensors"):
        T5TextEncoder.from_pretrained(tmp_path)


def test_missing_shard_is_named_before_loading(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("model-00001-of-00002.safetensors"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="shard"):
        T5TextEncoder.from_pretrained(tmp_path)


def test_corrupt_weights_are_one_sentence(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(WeightsError, match="cannot load") as caught:
        T5TextEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_model_family_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))
    with pytest.raises(WeightsError, match="'bert'"):
        T5TextEncoder.from_pretrained(tmp_path)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(WeightsError, match="tokenizer"):
        T5TextEncoder.from_pretrained(tmp_path)


def test_tokenizer_of_another_model_is_refused() -> None:
    encoder = tiny()
    tokenizer = load_transformers().ByT5Tokenizer(extra_ids=125)
    with pytest.raises(WeightsError, match="384"):
        T5TextEncoder(encoder.model, tokenizer, 10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("DeepFloyd/t5-v1_1-xxl", "hf download DeepFloyd/t5-v1_1-xxl"),
        ("no/such/folder", "does not exist"),
        (str(ROOT), "config.json"),
        (str(Path(__file__)), "is a file"),
    ],
)
def test_absent_weights_say_what_to_do(source: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        T5TextEncoder.from_pretrained(source)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UsageError, match="max_length"):
        tiny(max_length=0)
    with pytest.raises(UsageError, match="list"):
        tiny().encode("a red ball")


def test_loads_from_the_repository_root_where_kernels_lies() -> None:
    # transformers imports any package `kernels` it finds; ours refuses that name.
    code = (
        "import sys; sys.path.insert(0, '')\n"
        "from opensora.models.text_encoder import T5TextEncoder\n"
        "assert 'transformers' not in sys.modules\n"
        "T5TextEncoder.byt5(max_length=4, d_model=8, d_ff=8, num_layers=1, num_heads=1)\n"
        "assert sys.path[0] == '' and 'kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
