"""A caption gives the same tokens and states in training, in extraction and as a prompt."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.captions import clean_prompt, plain_caption
from opensora.data.batch import Batch, Size
from opensora.data.dataset import VideoTextDataset
from opensora.data.features import TextFeatures
from opensora.data.table import read_table
from opensora.errors import UsageError
from opensora.extract_features import run
from opensora.generation import text_of
from opensora.models.text_encoder import T5TextEncoder
from opensora.pipeline import OpenSoraPipeline
from opensora.prompts import prepare_prompt
from opensora.training.models import Models, encode_captions
from tests.data.test_features import SIZE, settings, write_table

#: Cells as they stand in a csv file; they are quoted when they are written.
AWKWARD = [
    "A RED Ball, rolling LEFT!",
    "  blanks \t around \n and between  ",
    "<p>a <b>bold</b> horse &amp; a rider</p>",
    "see https://example.com/clip.mp4?x=1 for a dog www.site.org",
    "a caf\u00e9 in \u201cParis\u201d \u2013 it\u2019s raining",
    'she said "hello" and left, ""twice""',
    "100% cotton+wool a%20b #12 @someone 1920x1080",
    "\u4e2d\u6587 only a boat",
    "it costs 5; or 6, maybe",
    "5",
    "3.50",
    "True",
    "|2| is no loop",
    "word " * 40,
    "\u0627\u0644 emoji \U0001f600 zero\u200bwidth",
    "\u00c3\u00a9t\u00c3\u00a9",
    "nan",
]
#: What holds no words: empty after reading or after cleaning. As a prompt it is refused.
EMPTY = ["", "   ", "\u4e2d\u6587", "https://example.com/a.mp4"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, list[int]]]:
    """Collect what the text encoder is given last."""
    found: dict[str, tuple[str, list[int]]] = {}
    tokenize = T5TextEncoder.tokenize

    def watched(self: T5TextEncoder, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask = tokenize(self, texts)
        for text, row in zip(texts, ids.tolist(), strict=True):
            found["last"] = text, row
        return ids, mask

    monkeypatch.setattr(T5TextEncoder, "tokenize", watched)
    return found


def table(folder: Path, cells: list[str]) -> Path:
    """Write pictures whose captions are these."""
    path = write_table(folder, len(cells))
    rows = [f'{i:02d}.png,"{cell.replace(chr(34), chr(34) * 2)}"' for i, cell in enumerate(cells)]
    path.write_text("\n".join(["path,text", *rows]) + "\n", "utf-8")
    return path


@pytest.mark.filterwarnings("ignore:prompt .* is .* tokens long")
@pytest.mark.parametrize("clean", [True, False])
@torch.no_grad()
def test_tokens_are_the_same_everywhere(
    tmp_path: Path, pipeline_folder: Path, seen: dict[str, tuple[str, list[int]]], clean: bool
) -> None:
    cells = AWKWARD + EMPTY
    path = table(tmp_path, cells)
    config = settings(
        path, pipeline_folder, tmp_path / "f", save_latents=False, clean_captions=clean
    )
    run(config)
    stored = TextFeatures(tmp_path / "f")
    pipe = OpenSoraPipeline.from_pretrained(pipeline_folder, device="cpu", progress=False)
    models = Models(pipe.transformer, pipe.vae, pipe.text_encoder, False, clean)
    dataset = VideoTextDataset(
        path, num_frames=SIZE.frames, image_size=[SIZE.height, SIZE.width],
        transform_name="resize_crop",
    )  # fmt: skip
    assert len(dataset.entries()) == len(cells)
    for index, cell in enumerate(cells):
        sample = dataset.load(index, SIZE, random.Random(0))
        assert isinstance(sample.text, str)
        states, mask = models.text(batch_of(sample.text), torch.device("cpu"))
        trained = seen["last"]
        known = states[0, 0, mask[0] == 1]
        torch.testing.assert_close(stored.states(sample.text), known)
        models.train_text = True
        models.text(batch_of(sample.text), torch.device("cpu"))
        models.train_text = False
        assert seen["last"] == trained
        if not trained[0]:
            with pytest.raises(UsageError, match=r"empty|cleaning left nothing"):
                prepare_prompt(cell, clean=clean)
            continue
        prompt = text_of(prepare_prompt(cell, clean=clean))
        pipe.text_encoder.encode([prompt])
        assert seen["last"] == trained, cell


def batch_of(text: str) -> Batch:
    """Return a batch of a caption alone."""
    return Batch(number=0, epoch=0, size=Size(1, 8, 8), bucket="", names=["x"], text=[text])


def test_cells_that_are_no_text_are_read_as_their_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_table(tmp_path, 3)
    nan = float("nan")
    columns = [[5, None, 7], [2.5, nan, None], [True, None, False], [b"caf\xc3\xa9", None, b"\xff"]]
    expected = [["5", None, "7"], ["2.5", None, None], ["True", None, "False"]]
    expected += [["caf\u00e9", None, "\ufffd"]]
    for values, texts in zip(columns, expected, strict=True):
        cells = {"path": [f"{i:02d}.png" for i in range(3)], "text": values}
        parquet.write_table(pyarrow.table(cells), tmp_path / "meta.parquet")
        assert [row.text for row in read_table(tmp_path / "meta.parquet").rows] == texts
    assert clean_prompt("True") == plain_caption("True") == "true"


def test_states_of_other_cleaning_are_refused(tmp_path: Path, pipeline_folder: Path) -> None:
    config = settings(
        write_table(tmp_path, 1), pipeline_folder, tmp_path / "f", save_latents=False,
        clean_captions=False,
    )  # fmt: skip
    run(config)
    stored = TextFeatures(tmp_path / "f")
    stored.check(clean_captions=False)
    with pytest.raises(UsageError, match="set clean_captions=False"):
        stored.check(clean_captions=True)


@pytest.mark.parametrize("train", [False, True])
def test_training_gets_the_states_of_inference(train: bool) -> None:
    encoder = T5TextEncoder.from_pretrained("opensora/assets/tiny")
    encoder.model.requires_grad_(train)
    rng = random.Random(0)
    captions = ["x" * rng.randint(0, 119) for _ in range(40)]
    states, mask = encode_captions(encoder, captions)
    expected, same = encoder.encode(captions)
    assert states.shape == expected.shape
    assert torch.equal(mask, same)
    assert states.requires_grad == train
    words = mask[:, None, :, None].bool()
    torch.testing.assert_close(states * words, expected * words, atol=2e-5, rtol=1e-5)
