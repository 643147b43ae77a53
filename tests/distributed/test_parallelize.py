"""Check that sharded training takes the steps of one process, and what its policies keep."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opensora.distributed.mesh import World, divide, start, stop
from opensora.distributed.sharded import local, part_of, reduce_gradients, whole
from opensora.errors import UsageError
from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.models.stdit.parallelize import freeze, parallelize, set_checkpointing
from opensora.optim import Muon
from opensora.training.clip import GradientClip, gradient_norm

CONFIG = {
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "caption_channels": 8,
    "model_max_length": 5,
    "drop_path": 0.3,
}
STEPS = 2
LIMIT = 0.5  # of the gradient norm: every step is clipped

# name -> (arguments of parallelize, arguments of freeze)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "full": ({"checkpointing": "full"}, {}),
    "every-2": ({"checkpointing": "every-2"}, {}),
    "first-3": ({"checkpointing": "first-3", "reshard_after_forward": False}, {}),
    "ops": ({"checkpointing": "ops"}, {}),
    "not sharded": ({"shard": False, "checkpointing": "full"}, {}),
    "on the CPU": ({"cpu_offload": True}, {}),
    "only temporal": ({}, {"only_train_temporal": True}),
    "frozen text": ({"checkpointing": "full"}, {"freeze_y_embedder": True}),
}


def make_model() -> STDiT3:
    """Return a model in which no branch is zero."""
    torch.manual_seed(0)
    model = STDiT3(STDiT3Config.from_dict(CONFIG)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("norm.weight"):
                parameter.normal_(std=0.2)
    return model


def loss_of(model: nn.Module, number: int) -> Tensor:
    """Return the loss of one batch, all of whose randomness is made from its number."""
    torch.manual_seed(number)
    frames = 1 + 2 * (number % 3)
    x = torch.randn(2, 4, frames, 4, 6)
    given = {
        "timestep": torch.rand(2) * 1000,
        "y": torch.randn(2, 1, 5, 8),
        "mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]),
        "x_mask": torch.rand(2, frames) < 0.7,
        "fps": torch.tensor([8.0]),
        "height": torch.tensor([37.0]),
        "width": torch.tensor([49.0]),
    }
    result: Tensor = (model(x, **given)[:, :4] - x).square().mean()
    return result


def train(model: STDiT3, world: World, accumulate: int) -> dict[str, Any]:
    """Take some steps; return losses and norms of each, and the parameters afterwards."""
    # The gradient of a key's bias is zero but for rounding, which a small eps would make a step.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, fused=True)
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for i in range(accumulate):
            number = (step * accumulate + i) * world.dp_size + world.dp_rank
            loss = loss_of(model, number) / accumulate
            loss.backward()
            total += loss.item()
        reduce_gradients(model.parameters())
        norm = GradientClip(LIMIT)(model.parameters()).before
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        norms.append(norm)
    return {"losses": losses, "norms": norms, "weights": [whole(p) for p in model.parameters()]}


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest error over the largest value, of all tensors."""
    pairs = zip(found, wanted, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in pairs)


def compare(world: World, name: str) -> dict[str, Any]:
    """Train on all ranks, and on this one alone with as many more accumulated batches."""
    options, frozen = RUNS[name]
    model, alone = make_model(), make_model()
    freeze(model, **frozen)
    freeze(alone, **frozen)
    before = [p.detach().clone() for p in alone.parameters()]
    parallelize(model, world, **{"dtype": "fp32", **options})
    found = train(model, world, 2 // world.dp_size)
    wanted = train(alone, World(), 2)
    mean = torch.tensor(found["losses"])
    torch.distributed.all_reduce(mean)
    found["losses"] = (mean / world.size).tolist()
    moved = [not torch.equal(a, b) for a, b in zip(before, wanted["weights"], strict=True)]
    trained = [p.requires_grad for p in alone.parameters()]
    return {
        "losses": [found["losses"], wanted["losses"]],
        "norms": [found["norms"], wanted["norms"]],
        "weights": worst(found["weights"], wanted["weights"]),
        "as frozen": [m <= t for m, t in zip(moved, trained, strict=True)],
        "moved": sum(moved) / sum(trained),
        "sharded": sum(local(p).numel() for p in model.parameters())
        / sum(p.numel() for p in model.parameters()),
    }


def clip_by_torch(world: World) -> list[float]:
    """Return the norms that torch's clipping and ours find, and the norm that it leaves."""
    model = parallelize(make_model(), world, dtype="fp32")
    loss_of(model, world.dp_rank).backward()
    ours = gradient_norm(model.parameters())
    theirs = nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    return [ours, whole(theirs).item(), gradient_norm(model.parameters())]


def parts_round_trip(world: World) -> bool:
    model = parallelize(make_model(), world, dtype="fp32")
    return all(torch.equal(part_of(whole(p), p), local(p)) for p in model.parameters())


def muon_error(world: World) -> float:
    """Take steps of Muon with equal gradients on shards and alone; return the worst error."""
    models = [parallelize(make_model(), world, dtype="fp32"), make_model()]
    results = []
    for model in models:
        optimizer = Muon(model.named_parameters(), weight_decay=0.1, adamw_names=("x_embedder",))
        torch.manual_seed(5)
        for _ in range(STEPS):
            for p in model.parameters():
                grad = torch.randn(p.shape)
                p.grad = torch.zeros_like(p) if p.requires_grad else None
                if p.grad is not None:
                    local(p.grad).copy_(part_of(grad, p))
            optimizer.step()
        results.append([whole(p) for p in model.parameters()])
    return worst(*results)


def sampling_error(world: World) -> float:
    """Predict along a schedule with sharded weights; return the worst error."""
    results = []
    schedule = torch.tensor([[900.0, 800.0], [100.0, 50.0]])
    torch.manual_seed(6)
    given = {
        "y": torch.randn(2, 1, 5, 8),
        "fps": torch.tensor([8.0]),
        "height": torch.tensor([37.0]),
        "width": torch.tensor([49.0]),
    }
    x = torch.randn(2, 4, 3, 4, 6)
    for model in (parallelize(make_model(), world, dtype="fp32"), make_model()):
        with torch.no_grad(), model.eval().reusing(schedule):
            results.append([model(x, t, **given) for t in schedule])
    return worst(*results)


def main(shape: str) -> dict[str, Any]:
    _, sides, names = SHAPES[shape]
    world = divide(WORLD, **sides)
    result: dict[str, Any] = {name: compare(world, name) for name in names}
    result["clipped"] = clip_by_torch(world)
    if shape not in WHOLE:
        return result
    result["round trip"] = parts_round_trip(world)
    result["muon"] = muon_error(world)
    result["sampling"] = sampling_error(world)
    return result


# name -> (processes, sides of the mesh, runs)
SHAPES: dict[str, tuple[int, dict[str, int], tuple[str, ...]]] = {
    "two ranks": (2, {}, tuple(RUNS)),
    "two batches of two ranks each": (4, {"sp_size": 2}, ("ops",)),
    "two copies of two shards": (4, {"replicate": 2, "sp_size": 2}, ("full",)),
}
# Where everything is measured.
WHOLE = ("two ranks", "two copies of two shards")


@pytest.fixture(scope="module")
def measured(ranks: Any) -> Callable[[str], list[dict[str, Any]]]:
    """Return what gives the measurements of all ranks of a mesh; processes start once."""
    kept: dict[int, list[dict[str, Any]]] = {}

    def get(shape: str) -> list[dict[str, Any]]:
        size = SHAPES[shape][0]
        if size not in kept:
            kept[size] = ranks(str(Path(__file__)), size)
        return [rank[shape] for rank in kept[size]]

    return get


CASES = [(shape, run) for shape, (_, _, runs) in SHAPES.items() for run in runs]


@pytest.mark.parametrize(("shape", "run"), CASES)
def test_steps_equal_those_of_one_process(measured: Any, shape: str, run: str) -> None:
    for rank in measured(shape):
        found = rank[run]
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-5)
        assert found["losses"][1][0] > 1.01 * found["losses"][1][-1]  # it learns
        assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-5)
        assert found["weights"] < 1e-4
        assert all(found["as frozen"])
        assert found["moved"] > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_holds_its_share(measured: Any, shape: str) -> None:
    size, sides, (*_, run) = SHAPES[shape]
    for rank in measured(shape):
        share = 1 / (size // sides.get("replicate", 1))
        assert share * 0.7 < rank[run]["sharded"] < share * 1.4


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_norm_equals_that_of_torch(measured: Any, shape: str) -> None:
    for rank in measured(shape):
        ours, theirs, left = rank["clipped"]
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert left == pytest.approx(LIMIT, rel=1e-5)


@pytest.mark.parametrize("shape", WHOLE)
def test_a_part_of_the_whole_is_what_a_rank_holds(measured: Any, shape: str) -> None:
    assert all(rank["round trip"] for rank in measured(shape))


@pytest.mark.parametrize("shape", WHOLE)
def test_muon_on_shards_equals_muon(measured: Any, shape: str) -> None:
    assert all(rank["muon"] < 1e-6 for rank in measured(shape))


@pytest.mark.parametrize("shape", WHOLE)
def test_sharded_weights_sample_as_whole_ones(measured: Any, shape: str) -> None:
    assert all(rank["sampling"] < 1e-5 for rank in measured(shape))


def saved_bytes(model: STDiT3) -> int:
    """Return the bytes that one forward keeps for the backward pass, parameters apart."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # or another tensor may take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, 2).backward()
    return sum(kept.values())


def test_recomputed_blocks_keep_their_input_alone() -> None:
    """Count bytes: a quarter of the blocks spares a quarter of what all of them spare."""
    found = {}
    for policy in ("none", "full", "every-2", "every-4", "first-1", "first-3"):
        model = make_model()
        set_checkpointing(model, policy)
        found[policy] = saved_bytes(model)
    tokens = 2 * 5 * 6 * 24 * 4  # bytes of [B, T * S, C] in float32, batch 2
    spared = found["none"] - found["full"]
    assert spared > 4 * 12 * tokens
    for policy, share in (("every-2", 2), ("every-4", 1), ("first-1", 1), ("first-3", 3)):
        assert (found["none"] - found[policy]) / spared == pytest.approx(share / 4, abs=0.08)


def ops_in_backward(policy: str) -> Counter[str]:
    """Count the operations of a backward pass."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            counted[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    counted: Counter[str] = Counter()
    model = make_model()
    set_checkpointing(model, policy)
    loss = loss_of(model, 2)
    with Seen():
        loss.backward()
    return counted


def test_the_ops_policy_computes_no_product_and_no_attention_again() -> None:
    none, full, ops = (ops_in_backward(policy) for policy in ("none", "full", "ops"))
    kinds = ("mm", "addmm", "bmm", "baddbmm")
    products = [sum(counted[kind] for kind in kinds) for counted in (none, full, ops)]
    assert products[1] >= products[0] + 4 * 6  # six products a block
    assert products[2] == products[0]
    for kind in ("spatial", "temporal", "cross"):
        name = f"{kind}_attention_forward"
        assert none[name] == ops[name] == 0
    assert ops["gelu"] == none["gelu"] + 4  # the rest is


@pytest.mark.parametrize(
    ("policy", "backend", "dtype"),
    [("every-2", "eager", "fp32"), ("ops", "aot_eager", "fp32"), ("full", "eager", "bf16")],
)
def test_blocks_compile_to_one_graph_each(policy: str, backend: str, dtype: str) -> None:
    """In bfloat16 with the hooks of FSDP2 around them, which stay outside."""
    from torch._dynamo.utils import counters  # seconds, which ranks need not wait for

    torch._dynamo.reset()
    counters.clear()
    model = parallelize(
        make_model(), World(), dtype=dtype, checkpointing=policy, compile=True, backend=backend
    )
    for block in model.blocks():  # a rate of its own in every block is a graph of its own
        block.drop_path = 0.0
    loss_of(model, 2).backward()
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 4
    torch._dynamo.reset()
    stop()


def test_one_process_casts_as_many_do() -> None:
    """Parameters stay float32, blocks see bfloat16, gradients come back in float32."""
    model = make_model()
    world = World()
    parallelize(model, world, dtype="bf16", checkpointing="full")
    seen = []
    for block in model.blocks():
        block.register_forward_hook(lambda _m, given, out: seen.append((given[0], out[0])))
    loss = loss_of(model, 2)
    assert {t.dtype for pair in seen for t in pair} == {torch.bfloat16}
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
    plain = make_model().bfloat16()
    assert loss.item() == pytest.approx(loss_of(plain, 2).item(), rel=1e-6)
    stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpointing": "every"}, r"'every' is unknown; did you mean every-2\?"),
        ({"checkpointing": "every-0"}, r"\(none, full, every-N"),
        ({"dtype": "bf32"}, r"dtype 'bf32' is unknown"),
        ({"dtype": "bf16", "shard": False}, r"dtype bf16 needs sharded parameters"),
        ({"dtype": "fp32", "cpu_offload": True, "shard": False}, r"cpu_offload needs sharded"),
    ],
)
def test_rejects_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parallelize(make_model(), World(), **options)


def test_rejects_parameters_that_lost_their_precision() -> None:
    with pytest.raises(UsageError, match=r"parameters of torch.bfloat16.*dtype=torch.float32"):
        parallelize(make_model().bfloat16(), World())


if __name__ == "__main__":
    torch.set_num_threads(1)
    WORLD = start("cpu", timeout_s=60)
    RESULT = {shape: main(shape) for shape in SHAPES if SHAPES[shape][0] == WORLD.size}
    stop()
    sys.stdout.write("\n" + json.dumps(RESULT) + "\n")
