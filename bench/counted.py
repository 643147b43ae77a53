"""Count what a block of STDiT3-XL/2 launches, moves, keeps and compiles to; no GPU is needed.

    python -m bench.counted        # print the counts

`tests/test_counted.py` gates them. Bytes are those of the tensors that each op takes and returns,
in multiples of the tokens [B, N, C]: what any implementation with these ops must at least move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.shapes import CELLS, LATENTS, TEXT
from opensora.models.stdit import PRESETS, STDiT3
from opensora.models.stdit.block import Modulation, STDiT3Block
from opensora.nn import PackedText
from opensora.traffic import Step, trace

CONFIG = PRESETS["STDiT3-XL/2"]
LONGEST = max(TEXT["480p-2s"])  # tokens of every prompt
DTYPE = torch.bfloat16
#: Tokens read and written by each op that is no matrix product, if it does nothing twice.
LEAST = {
    "layernorm_modulate_forward": 1 + 1,
    "residual_layernorm_modulate_forward": 2 + 2,
    "gate_residual_forward": 2 + 1,
    "spatial_attention_forward": 3 + 1,
    "temporal_attention_forward": 3 + 1,
    "cross_attention_forward": 1 + 1,
    "aten.gelu": 4 + 4,  # of the MLP, 4 C wide
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """Hold the counts of one block.

    Attributes:
        steps: what it runs, in order.
        tokens: bytes of [B, N, C].
        kept: bytes that it keeps for the backward pass, weights not among them; 0 without one.
    """

    steps: list[Step]
    tokens: int
    kept: int

    @property
    def products(self) -> int:
        """Number of matrix products."""
        return sum(step.is_product for step in self.steps)

    @property
    def launches(self) -> int:
        """Number of kernels that are no matrix products."""
        return sum(step.launches for step in self.steps if not step.is_product)

    @property
    def moved(self) -> float:
        """Tokens read and written outside of matrix products."""
        steps = [step for step in self.steps if not step.is_product]
        return sum(step.read + step.written for step in steps) / self.tokens

    @property
    def least(self) -> float:
        """Tokens that these steps must move; unknown steps have nothing to move."""
        return sum(LEAST.get(s.name, 0) for s in self.steps if not s.is_product)


def count(cell: str, *, temporal: bool, training: bool = False) -> Counts:
    """Trace one block between two others; in sampling the keys of the text are known."""
    block = _block(temporal)
    arguments = _arguments(cell, temporal, "meta", keys=not training)
    kept: dict[Any, int] = {}
    weights = {p.untyped_storage()._cdata for p in block.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    x = arguments["x"].requires_grad_(training)
    with (
        torch.set_grad_enabled(training),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        results: list[Any] = []
        steps = trace(lambda: results.append(block(**arguments)))
    return Counts(steps, x.nbytes, sum(kept.values()))


def count_graphs(*, temporal: bool, cells: list[str]) -> int:
    """Compile a block for CUDA tensors of all cells; return how many graphs that took.

    Raises:
        torch._dynamo.exc.Unsupported: A graph would break.
    """
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    block = _block(temporal).requires_grad_(False)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in block.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                    module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        block.compile(fullgraph=True, dynamic=True, backend=backend)
        for cell in cells:
            block(**_arguments(cell, temporal, "cuda", keys=True))
    return len(graphs)


def count_sampling_step() -> list[Step]:
    """Trace a whole model of two blocks at its second step, with what steps share reused."""
    with torch.device("meta"):
        model = STDiT3(dataclasses.replace(CONFIG, depth=1)).to(DTYPE).eval()
        schedule = torch.empty(30, 2)
        given = {
            "x": torch.empty(2, *LATENTS["480p-2s"]),
            "y": torch.empty(2, 1, LONGEST, CONFIG.caption_channels, dtype=DTYPE),
            "mask": torch.empty(1, LONGEST, dtype=torch.int64),
            "fps": torch.empty(1),
            "height": torch.empty(1),
            "width": torch.empty(1),
        }
    with torch.no_grad(), model.reusing(schedule):
        trace(lambda: model(timestep=schedule[0], **given))
        return trace(lambda: model(timestep=schedule[1], **given))


def _block(temporal: bool) -> STDiT3Block:
    with torch.device("meta"):
        block = STDiT3Block(CONFIG.hidden_size, CONFIG.num_heads, temporal=temporal)
    return block.to(DTYPE)


def _arguments(cell: str, temporal: bool, device: str, *, keys: bool) -> dict[str, Any]:
    """Return the arguments of a block between two others."""
    batch, frames, patches, channels = CELLS[cell]
    heads = CONFIG.num_heads

    def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    x = empty(batch, frames * patches, channels)
    kv = empty(batch * LONGEST, 2, heads, channels // heads) if keys else None
    text = PackedText(
        empty(batch * LONGEST, channels), *empty(2, batch, dtype=torch.int32).unbind(0), LONGEST, kv
    )
    modulation = Modulation(empty(batch, 6, channels))
    tables = (empty(frames, channels // heads), empty(frames, channels // heads))
    return {
        "x": x,
        "text": text,
        "modulation": modulation,
        "frames": frames,
        "rotary": tables if temporal else None,
        "normed": torch.empty_like(x),
        "following": modulation,
    }


def main() -> None:
    """Print the counts."""
    for temporal in (False, True):
        sampling = count("480p-2s", temporal=temporal)
        kind = "temporal" if temporal else "spatial"
        print(f"{kind} block, 480p-2s, sampling: what it runs, tokens read and written")
        for step in sampling.steps:
            read, written = step.read / sampling.tokens, step.written / sampling.tokens
            launches = "product" if step.is_product else f"{step.launches} launches"
            print(f"  {step.name:38} {launches:>11} {read:6.2f} {written:6.2f}")
        training = count("480p-2s", temporal=temporal, training=True)
        graphs = count_graphs(temporal=temporal, cells=list(CELLS))
        print(
            f"  {sampling.launches} launches beside {sampling.products} products; "
            f"{sampling.moved:.2f} tokens moved, {sampling.least} at least; training keeps "
            f"{training.kept / training.tokens:.2f} tokens; {graphs} graph(s) for "
            f"{len(CELLS)} sizes"
        )
    steps = count_sampling_step()
    outside = [step.name for step in steps]
    print(f"a later sampling step of two blocks: {sum(s.launches for s in steps)} launches")
    print("  " + ", ".join(outside))


if __name__ == "__main__":
    main()
