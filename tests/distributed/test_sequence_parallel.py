"""Check that a batch split over ranks gives the prediction and the gradients of one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opensora.attention import Attention
from opensora.distributed.mesh import World, start, stop
from opensora.distributed.sequence import Sequence
from opensora.distributed.sharded import reduce_gradients
from opensora.models.stdit import STDiT3, STDiT3Config

SIZE = {"hidden_size": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
CONFIG = {**SIZE, "caption_channels": 8, "model_max_length": 5}
LATENT_FRAMES, HEIGHT, WIDTH = 5, 6, 10  # 15 patches a frame: neither is even, 5 is no multiple

# name -> (batch, changes of the forward's arguments, changes of the model)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "plain": (1, {}, {}),
    "two samples, text mask": (2, {"mask": True}, {}),
    "frame mask": (2, {"mask": True, "x_mask": True}, {}),
    "image": (1, {"frames": 1, "mask": True}, {}),
    "images, fewer than ranks or more": (2, {"frames": 1, "mask": True}, {}),
    "split by sample": (3, {"frames": 4, "mask": True, "x_mask": True}, {"recompute": True}),
    "padded patches of two frames": (1, {"height": 5}, {"patch_size": (2, 2, 2)}),
    "dropped captions and branches": (3, {"mask": True}, {"drop_path": 0.6, "train": True}),
    "recomputed blocks": (2, {"x_mask": True}, {"train": True, "recompute": True}),
    "float64": (2, {"mask": True, "x_mask": True}, {"dtype": torch.float64}),
}  # fmt: skip


def make_model(**changes: Any) -> STDiT3:
    """Return a model in which no branch is zero."""
    torch.manual_seed(0)
    config = {k: v for k, v in changes.items() if k in ("drop_path", "patch_size")}
    model = STDiT3(STDiT3Config.from_dict({**CONFIG, "class_dropout_prob": 0.5, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("norm.weight"):
                parameter.normal_(std=0.2)
    for block in model.blocks():
        block.recompute = bool(changes.get("recompute"))
    return model.train(changes.get("train", False)).to(changes.get("dtype", torch.float32))


def make_inputs(batch: int, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    frames = changes.get("frames", LATENT_FRAMES)
    given: dict[str, Any] = {
        "x": torch.randn(batch, 4, frames, changes.get("height", HEIGHT), WIDTH),
        "timestep": torch.linspace(300, 900, batch),
        "y": torch.randn(batch, 1, 5, 8),
        "fps": torch.tensor([8.0]),
        "height": torch.tensor([48.0]),
        "width": torch.tensor([80.0]),
    }
    if changes.get("mask"):
        given["mask"] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1] * 5])[:batch]
    if changes.get("x_mask"):
        given["x_mask"] = torch.rand(batch, frames) < 0.5
    return given


def run(model: STDiT3, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return the prediction and all gradients of a loss that weighs every value differently."""
    torch.manual_seed(2)
    model.zero_grad()
    given = {k: v.clone().requires_grad_() if k in "xy" else v for k, v in given.items()}
    out = model(**given)
    ((out * torch.linspace(-1, 1, out.numel()).view_as(out)) ** 2).sum().backward()
    if model.sequence is not None:
        reduce_gradients([*model.parameters(), given["x"], given["y"]])
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": given["x"].grad, "y": given["y"].grad, **found}


def error(found: Tensor, wanted: Tensor, floor: float = 1e-30) -> float:
    """Return the largest error over the largest value, or over `floor` where that is more."""
    scale = wanted.double().abs().max().clamp(min=floor)
    return ((found.double() - wanted.double()).abs().max() / scale).item()


def check_models(sequence: Sequence) -> dict[str, Any]:
    """Return the worst relative error of every case, and whether all ranks predict the same."""
    errors: dict[str, Any] = {}
    for name, (batch, of_inputs, of_model) in CASES.items():
        model, given = make_model(**of_model), make_inputs(batch, **of_inputs)
        wanted = run(model, given)
        model.sequence = sequence
        found = run(model, given)
        assert found.keys() == wanted.keys()
        # Gradients of a saturated softmax are differences of large numbers.
        floor = 1e-4 * max(value.abs().max().item() for value in wanted.values())
        errors[name] = {key: error(found[key], wanted[key], floor) for key in found}
        first = found["out"].clone()
        dist.broadcast(first, 0)
        errors[name]["ranks differ"] = float(not torch.equal(first, found["out"]))
        errors[name]["loss moved nothing"] = float(found["x"].abs().max() == 0)
    return errors


def check_reuse(sequence: Sequence) -> float:
    model, given = make_model(), make_inputs(2, mask=True)
    schedule = torch.tensor([[900.0, 900.0], [500.0, 400.0], [100.0, 50.0]])
    worst = 0.0
    with torch.no_grad():
        wanted = [model(**given | {"timestep": t}) for t in schedule]
        model.sequence = sequence
        with model.reusing(schedule):
            for t, want in zip(schedule, wanted, strict=True):
                worst = max(worst, error(model(**given | {"timestep": t}), want))
    return worst


def check_traffic(sequence: Sequence) -> dict[str, list[int]]:
    """Return the numbers of values in the exchanges of a forward, and of a forward and backward."""
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(result: Tensor, x: Tensor, **options: Any) -> Any:
        sent.append(x.numel())
        return exchange(result, x, **options)

    found = {}
    model = make_model(recompute=True)
    model.sequence = sequence
    dist.all_to_all_single = counted
    for name, recorded in (("forward", False), ("backward", True)):
        sent.clear()
        with torch.set_grad_enabled(recorded):
            out = model(**make_inputs(1, frames=6))
        if recorded:
            out.sum().backward()
        found[name] = list(sent)
    dist.all_to_all_single = exchange
    return found


def check_transposes(sequence: Sequence) -> dict[str, float]:
    """Return |<A x, y> - <x, A' y>| of every operation, both summed over the ranks, relative."""
    n, rank = sequence.size, sequence.rank
    torch.manual_seed(10 + rank)
    part = -(-7 // n)
    operations = {
        "gather": (lambda x: sequence.gather(x, 1, 7), (2, part, 3)),
        "switch": (lambda x: sequence.switch(x, 2, 1, 7), (2, part, 5, 3)),
        "heads": (lambda x: sequence.heads(x, 7), (2, part, 5, 4)),
        "split": (lambda x: sequence.split(x, 1), (2, 7, 3)),
    }
    found = {}
    for name, (operation, shape) in operations.items():
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = operation(x)
        other = torch.randn_like(y)
        y.backward(other)
        assert x.grad is not None
        sums = torch.stack([(y * other).sum().detach(), (x * x.grad).sum().detach()])
        dist.all_reduce(sums)
        found[name] = ((sums[0] - sums[1]) / sums[0]).abs().item()
    return found


def check_round_trips(sequence: Sequence) -> list[bool]:
    """Split, switch both ways and gather odd sizes, shorter than the group too."""
    kept = []
    for frames, patches in ((5, 7), (1, 4), (2, 1)):
        torch.manual_seed(3)
        x = torch.randn(2, frames, patches, 4)
        by_frame = sequence.split(x, 1)
        by_patch = sequence.switch(by_frame, 2, 1, frames)
        again = sequence.switch(by_patch, 1, 2, patches)
        kept += [
            torch.equal(sequence.gather(by_patch, 2, patches), x),
            torch.equal(sequence.gather(again, 1, frames), x),
        ]
    return kept


def check_ulysses(sequence: Sequence) -> float:
    """Compare attention over all tokens by exchanged heads, 3 of them, with the layer's own."""
    torch.manual_seed(4)
    layer = Attention(24, 3, qk_norm=True).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    results = []
    for split in (False, True):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        if split:
            part = layer(sequence.split(given, 1), sequence=sequence, length=7)
            y = sequence.gather(part, 1, 7)
        else:
            y = layer(given)
        (y**3).sum().backward()
        if split:
            reduce_gradients([*layer.parameters(), given])
        results.append([y, given.grad, *(p.grad for p in layer.parameters())])
    return max(error(a, b) for a, b in zip(*results, strict=True))


def main(world: World) -> dict[str, Any]:
    sequence = Sequence.of(world)
    assert sequence is not None
    return {
        "models": check_models(sequence),
        "reuse": check_reuse(sequence),
        "traffic": check_traffic(sequence),
        "transposes": check_transposes(sequence),
        "round trips": check_round_trips(sequence),
        "ulysses": check_ulysses(sequence),
    }


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, ranks: Any) -> list[dict[str, Any]]:
    """What every rank of a group of 2 or 3 measured."""
    result: list[dict[str, Any]] = ranks(str(Path(__file__)), request.param)
    return result


@pytest.mark.parametrize("case", CASES)
def test_prediction_and_gradients_equal_one_process(found: Any, case: str) -> None:
    for rank in found:
        worst = max(rank["models"][case], key=rank["models"][case].get)
        assert rank["models"][case][worst] < 1e-5, worst


def test_what_steps_share_is_kept_under_sequence_parallelism(found: Any) -> None:
    assert all(rank["reuse"] < 1e-5 for rank in found)


def test_one_exchange_of_the_tokens_lies_between_two_blocks(found: Any) -> None:
    """Backward sends them the other way; recomputed blocks send nothing again."""
    ranks = len(found)
    patches = -(-15 // ranks) * ranks  # padded
    for rank in found:
        one = 6 * patches * SIZE["hidden_size"] // ranks
        borders = 2 * int(SIZE["depth"]) - 1
        assert rank["traffic"]["forward"] == [one] * borders
        assert rank["traffic"]["backward"] == [one] * 2 * borders


@pytest.mark.parametrize("name", ["gather", "switch", "heads", "split"])
def test_backward_is_the_transposed_communication(found: Any, name: str) -> None:
    assert all(rank["transposes"][name] < 1e-12 for rank in found)


def test_splitting_and_joining_keep_odd_sizes(found: Any) -> None:
    assert all(all(rank["round trips"]) for rank in found)


def test_attention_over_all_tokens_pads_heads_that_do_not_divide(found: Any) -> None:
    assert all(rank["ulysses"] < 1e-12 for rank in found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    WORLD = start("cpu", sp_size=int(os.environ["WORLD_SIZE"]), timeout_s=60)
    RESULT = main(WORLD)
    stop()
    sys.stdout.write("\n" + json.dumps(RESULT) + "\n")
