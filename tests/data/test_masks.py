"""Test frame masks that Open-Sora could not draw; those it drew are replayed."""

from __future__ import annotations

import random

import pytest
import torch

from opensora.data.masks import KINDS, MaskGenerator
from opensora.errors import UsageError


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_something_to_make(kind: str, frames: int) -> None:
    masks = MaskGenerator({kind: 1.0}).masks(100, frames, random.Random(0))
    assert (masks.shape, masks.dtype) == ((100, frames), torch.bool)
    assert masks.any(1).all()
    if frames > 1 and kind not in ("identity", "random"):
        assert not masks.all(1).any()


def test_names_of_1_1_mean_the_same() -> None:
    old = MaskGenerator({"mask_no": 0.5, "mask_image_head": 0.3, "mask_quarter_tail": 0.2})
    new = MaskGenerator({"identity": 0.5, "image_head": 0.3, "quarter_tail": 0.2})
    assert old.ratios == new.ratios
    first, second = random.Random(3), random.Random(3)
    assert old.masks(50, 15, first).equal(new.masks(50, 15, second))


def test_draws_leave_global_generators_alone() -> None:
    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    MaskGenerator({"random": 1.0}).masks(10, 8, random.Random(0), generator)
    assert random.getstate() == states[0]
    assert torch.get_rng_state().equal(states[1])


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"foo": 1.0}, "unknown kind 'foo'"),
        ({"interpolate": 0.5}, "did you mean intepolate"),
        ({"image_haed": 0.5}, "did you mean image_head"),
        ({"random": -0.1}, r"must lie in 0 \.\.\. 1"),
        ({"random": 1.2}, r"must lie in 0 \.\.\. 1"),
        ({"random": "0.2"}, r"must lie in 0 \.\.\. 1"),
        ({"random": 0.7, "image_head": 0.7}, "add up to 1.4"),
        ({"identity": 0.5, "random": 0.2}, "set it to 0.8"),
        ({"random": 0.1, "mask_random": 0.1}, "there twice"),
    ],
)
def test_rejects_what_cannot_be(ratios: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MaskGenerator(ratios)
