"""Estimate and measure the memory of a training step, for the first guess of a batch size."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.models.stdit import STDiT3Config
from opensora.models.stdit.parallelize import recomputed_blocks
from opensora.training.batch_size import OutOfMemory

#: Tensors [N, C] that a block keeps for its backward, without the MLP's: 13 + 2 mlp_ratio, counted
#: with `saved_bytes` on STDiT3 of widths 64 and 144 (21.07 at mlp_ratio 4, in any dtype).
_KEPT = 13
#: Results [N, C] of a block's products and attention, without fc1, that "ops" keeps beside the
#: block's input: qkv 3, attention 1, proj 1, q 1, cross-attention 1, proj 1, fc2 1.
#: Counted: 12.08 and 14.08 tensors a block at mlp_ratio 2 and 4, the input among them.
_PRODUCTS = 9
#: Outside the blocks: embedded patches, last norm and modulation, the prediction.
_AROUND = 2
#: Gradients that are alive beside what is kept: peaks of a step on a CPU, no block recomputed and
#: all, were 89.2 and 29.2 tensors where this model says 89 and 30 (4 blocks, mlp_ratio 4, float32).
_GRADIENTS = 3
#: Bytes of a trained weight: itself, gradient and two averages of Adam, all float32.
_TRAINED = 4 + 4 + 8


@dataclass(frozen=True)
class MemoryModel:
    """Say how many bytes a step needs: fixed + per_token * tokens.

    Attributes:
        fixed: weights, gradients, optimizer, averages, other models.
        per_token: activations.
    """

    fixed: float
    per_token: float

    def bytes(self, tokens: float) -> float:
        """Return the bytes of a step of so many tokens, all samples together."""
        return self.fixed + self.per_token * tokens

    def batch_size(self, memory: float, tokens: int, *, reserve: float = 0.08) -> int:
        """Return the samples of `tokens` tokens that fit; 0 if not one does.

        Args:
            memory: bytes of the device.
            tokens: of one sample.
            reserve: share of the memory left to the allocator and to communication.
        """
        room = memory * (1 - reserve) - self.fixed
        return max(0, int(room / (self.per_token * tokens)))

    @classmethod
    def fit(cls, measured: Sequence[tuple[float, float]]) -> MemoryModel:
        """Fit a line to (tokens, peak bytes) of at least two steps of different size.

        Raises:
            ValueError: all steps have the same number of tokens.
        """
        count = len(measured)
        mean_x, mean_y = (sum(p[i] for p in measured) / max(1, count) for i in (0, 1))
        spread = sum((x - mean_x) ** 2 for x, _ in measured)
        if spread == 0:
            raise ValueError("steps of two different sizes are needed")
        slope = sum((x - mean_x) * (y - mean_y) for x, y in measured) / spread
        return cls(mean_y - slope * mean_x, slope)


def estimate(
    config: STDiT3Config,
    parameters: int,
    *,
    trained: int | None = None,
    checkpointing: str = "none",
    shards: int = 1,
    ema: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    other: float = 0.0,
) -> MemoryModel:
    """Estimate the memory of a step; a guess, which a measured step should correct.

    Args:
        config: the architecture.
        parameters: weights of the model.
        trained: those that are trained; None: all.
        checkpointing: the policy, as `opensora.models.stdit.parallelize` takes it.
        shards: processes that weights and optimizer are sharded over.
        ema: averages are kept.
        dtype: of the computation.
        other: bytes of other models and of what the process holds anyway.
    """
    width, blocks, item = config.hidden_size, 2 * config.depth, dtype.itemsize
    trained = parameters if trained is None else trained
    weights = 4 * (parameters - trained) + (_TRAINED + (4 if ema else 0)) * trained
    # The weights as computed with: of two blocks at a time where they are gathered, else of all.
    cast = parameters * item if shards == 1 and item < 4 else 0
    if shards > 1:
        cast = round(2 * parameters / blocks) * item
    block = _KEPT + 2 * config.mlp_ratio
    recomputed = sum(recomputed_blocks(checkpointing, blocks))
    kept = 1 + (_PRODUCTS + config.mlp_ratio if checkpointing == "ops" else 0)
    tensors = (blocks - recomputed) * block + recomputed * kept + _AROUND + _GRADIENTS
    if recomputed:
        tensors += block  # one at a time is there again
    return MemoryModel(weights / shards + cast + other, tensors * width * item)


def saved_bytes(call: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward of `call`, without the weights.

    Storages count once, however many views of them are kept.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, Tensor] = {}  # the tensors too: a freed address may be given out again

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def timed_step(
    step: Callable[[], Any],
    device: torch.device,
    *,
    warm_up: int = 1,
    active: int = 2,
    limit: float | None = None,
) -> tuple[float, int]:
    """Run a step a few times; returns the seconds of one and the peak of memory in bytes.

    Args:
        step: a whole training step.
        device: that it runs on.
        warm_up: runs before the clock starts.
        active: runs that are timed.
        limit: bytes that may be used, checked after every run: a GPU's own limit raises by itself,
            a CPU's would end the process.

    Raises:
        OutOfMemory: more than `limit` was used.
    """
    _forget_peak(device)
    started = 0.0
    for run in range(warm_up + active):
        if run == warm_up:
            _wait(device)
            started = time.perf_counter()
        step()
        if limit is not None and run + 1 < warm_up + active:
            _check(peak_memory(device), limit)
    _wait(device)
    seconds = (time.perf_counter() - started) / active
    peak = peak_memory(device)
    if limit is not None:
        _check(peak, limit)
    return seconds, peak


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak can be reset
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _check(peak: int, limit: float) -> None:
    if peak > limit:
        raise OutOfMemory(f"{peak / 2**30:.2f} GiB of {limit / 2**30:.2f} were used")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    """Start the peak of memory anew; on a CPU that only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (reset := Path("/proc/self/clear_refs")).exists():
        try:
            reset.write_text("5")
        except OSError:  # not allowed in some containers: the peak is then that of the process
            return
