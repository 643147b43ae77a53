"""Run the parts of training on two processes; test_sharded.py compares with one process.

Arguments: folder, rank, processes. Writes `result-<rank>.pt`.
"""

from __future__ import annotations

import datetime
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from opensora.training.clip import AdaptiveClip, GradientClip, gradient_norm
from opensora.training.ema import EMA
from opensora.training.metrics import Metrics
from opensora.training.optimizers import build_optimizer
from opensora.training.schedule import Schedule
from opensora.training.validation import Planned, Prepared, Validation
from opensora.training.watchdog import Watchdog

STEPS = 6
PLAN = [Planned("a", ("1", "2")), Planned("b", ("3",)), Planned("a", ("4", "5"))]


def build() -> nn.Module:
    """Return a model whose sizes two processes do not divide, one of them smaller than two."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, 1))


class Toy:
    """A scheduler: the loss of a latent is the model's output, squared, with noise and time."""

    def training_losses(
        self, model: Any, x: Tensor, kwargs: Any, **given: Any
    ) -> dict[str, Tensor]:
        """Return {"loss": [B]}."""
        mixed = (x + given["noise"] * given["t"][:, None] / 1000).float()
        return {"loss": model(mixed).square().mean(1)}


def prepare(index: int) -> Prepared:
    """Return latents that depend on the batch."""
    latent = torch.randn(len(PLAN[index].names), 6)
    return Prepared(latent + index, {})


def train(model: nn.Module, rank: int, ranks: int, name: str) -> dict[str, Any]:
    """Train on this process's half of every batch."""
    named = list(model.named_parameters())
    optimizer = build_optimizer(named, name=name, lr=0.02, weight_decay=0.1, decay_all=False)
    clip, ema = AdaptiveClip(0.5), EMA(model, 0.9, trained_only=True)
    schedule, norms = Schedule(warmup=2), []
    for step in range(STEPS):
        schedule.set(optimizer, step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator).chunk(ranks)[rank]
        optimizer.zero_grad()
        (10 ** (step % 2) * model(x).square().mean()).backward()
        norms.append(clip(p for _, p in named))
        optimizer.step()
        ema.update()
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for _, p in named)
    averages = sum(
        a.to_local().numel() if hasattr(a, "to_local") else a.numel() for a in ema.state.values()
    )
    assert averages == held
    whole = {key: full(value) for key, value in ema.state_dict()["averages"].items()}
    with ema.swap():
        swapped = {key: full(value) for key, value in model.state_dict().items()}
    loaded = EMA(model, 0.9, trained_only=True)
    loaded.load_state_dict({"updates": STEPS, "averages": whole})
    return {
        "weights": {key: full(value) for key, value in model.state_dict().items()},
        "averages": whole,
        "swapped": swapped,
        "loaded": {key: full(value) for key, value in loaded.state.items()},
        "norms": [(n.before, n.after, n.extreme) for n in norms],
        "held": held,
    }


def full(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def add(tensor: Tensor) -> Tensor:
    """Sum over the processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest(value: int) -> int:
    """Return the largest value of all processes."""
    tensor = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def run(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Return all that is compared."""
    result: dict[str, Any] = {}
    for name in ("adamw", "muon"):
        model = build()
        if ranks > 1:
            for layer in model:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer)
            fully_shard(model)
        result[name] = train(model, rank, ranks, name)
        validation = Validation(
            PLAN, prepare, Toy(), steps=3, replica=rank, replicas=ranks, sum_ranks=add
        )
        torch.manual_seed(7)
        result[name]["validation"] = validation(build()).line()
        # A forward without gradients leaves FSDP's root gathered: a swap must not be missed.
        ema = EMA(model, 0.5, warm_up=False)
        for average in ema.state.values():
            average.mul_(1.5)
        lines = [validation(model, which).line() for which in (None, ema, None)]
        result[name]["sharded validation"], result[name]["averaged validation"] = lines[:2]
        assert lines[0] == lines[2]
    metrics = Metrics(folder, 2, log_every=2, rank=rank, devices=ranks, sum_ranks=add, peak=1e12)
    half = 4 // ranks
    for step in range(2):
        mine = torch.arange(4.0)[rank * half : (rank + 1) * half]
        metrics.losses(mine * 250, mine)
        metrics.step(
            step, float(mine.mean()), grad_norm=1.0, lr=0.1, tokens=100 * half, values={"kl": 2.0}
        )
    dog = Watchdog(folder, rank=rank, agree=largest)
    loss = math.nan if rank == ranks - 1 else 0.5
    result["verdict"] = dog.check(loss, 1.0, [f"sample of {rank}"], 0).value
    return result


def meshes() -> list[float]:
    """Return the norm of one gradient on meshes that repeat or shard it."""
    norms = []
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        model = build()
        fully_shard(model, mesh=mesh)
        model(torch.ones(2, 6)).sum().backward()
        norms.append(gradient_norm(model.parameters()))
        GradientClip(1e-3)(model.parameters())
        norms.append(gradient_norm(model.parameters()))
    return norms


def main() -> None:
    """Join the other processes, run and write."""
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    result = run(folder, rank, ranks)
    result["meshes"] = meshes()
    torch.save(result, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
