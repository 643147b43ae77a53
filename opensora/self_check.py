"""Check the kernels of one op against its reference, on tensors of a few hundred elements.

`opensora doctor` runs these checks on every op and device, `opensora/trust.py` on a GPU kernel that
nothing vouches for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora import functional
from opensora.testing import randn

#: Largest difference from the truth, of the largest value: the dtype's own rounding and more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

#: Returns a fresh normal tensor of the shape that asks for a gradient.
New = Callable[..., Tensor]


def _layernorm_modulate(new: New) -> Any:
    x = new(2, 3, 3, 72)
    rows = [new(2, 72) for _ in range(4)]
    chosen = functional.layernorm_modulate(
        x, *rows[:2], select=_select(x), shift0=rows[2], scale0=rows[3]
    )
    return chosen, functional.layernorm_modulate(x, *rows[:2])


def _residual_layernorm_modulate(new: New) -> Any:
    x, y = new(2, 3, 3, 72), new(2, 3, 3, 72)
    gate, shift, scale, gate0, shift0, scale0 = (new(2, 72) for _ in range(6))
    chosen = functional.residual_layernorm_modulate(
        x, y, gate, shift, scale, select=_select(x), gate0=gate0, shift0=shift0, scale0=scale0
    )
    return *chosen, *functional.residual_layernorm_modulate(x, y, gate, shift, scale)


def _gate_residual(new: New) -> Any:
    x, y, gate, gate0 = new(2, 3, 3, 72), new(2, 3, 3, 72), new(2, 72), new(2, 72)
    chosen = functional.gate_residual(x, y, gate, select=_select(x), gate0=gate0)
    return chosen, functional.gate_residual(x, y, gate)


def _qk_norm_rope(new: New) -> Any:
    qkv, weights, table = new(2, 5, 3, 2, 72), (new(72), new(72)), _table(new)
    with torch.no_grad():
        written = functional.qk_norm_rope(qkv.clone(), *weights, table, inplace=True)
    return functional.qk_norm_rope(qkv, *weights, table), written


def _spatial_attention(new: New) -> Any:
    return functional.spatial_attention(new(1, 2, 19, 3, 2, 72), new(72), new(72))


def _temporal_attention(new: New) -> Any:
    weights = new(72), new(72)
    # Few frames go several patches to a tile, more have their own, and many take several tiles.
    shapes = ((1, 5, 3, 3, 2, 72), (1, 19, 2, 3, 2, 72), (1, 70, 1, 3, 1, 72))
    tables = {shape: _table(new, shape[1]) for shape in shapes}
    return [functional.temporal_attention(new(*s), *weights, tables[s]) for s in shapes]


def _cross_attention(new: New) -> Any:
    q, kv = new(2, 9, 2, 72), new(12, 2, 2, 72)
    starts, lengths = torch.tensor([[0, 5], [5, 7]], dtype=torch.int32, device=q.device).unbind(0)
    return functional.cross_attention(q, kv, starts, lengths, longest=7)


def _groupnorm_silu(new: New) -> Any:
    return functional.groupnorm_silu(new(1, 64, 3, 5, 7), new(64), new(64), 32)


def _causal_conv3d(new: New) -> Any:
    # No gradients: they are the library's, and on a GPU in TF32.
    shapes = ((1, 16, 3, 5, 7), (16, 16, 3, 3, 3), (16,), (2, 16, 5, 7), (8, 16, 3, 3), (8,))
    video, filters, bias, image, *others = (new(*shape).detach() for shape in shapes)
    statistics = new(1, 4, 2).detach().to(torch.promote_types(video.dtype, torch.float32))
    normed = functional.causal_conv3d(video, filters, norm=(statistics, bias, bias))
    y = functional.causal_conv3d(video, filters, bias, residual=video)
    return y, normed, functional.causal_conv3d(image, *others, stride=(2, 2))


def _patchify(new: New) -> Any:
    weight, positions = new(48, 4, 1, 2, 2), new(15, 48).detach()
    return functional.patchify(new(1, 4, 3, 6, 10), weight, new(48), positions)


def _cfg_rflow_step(new: New) -> Any:
    z, velocity, dt = (new(*shape).detach() for shape in ((2, 4, 3, 5, 7), (4, 8, 3, 5, 7), (2,)))
    guided = functional.cfg_rflow_step(z, velocity, 7.0, dt, mask=_select(z), copies=2)
    return guided, functional.cfg_rflow_step(z, velocity[:2], None, dt)


CHECKS: dict[str, Callable[[New], Any]] = {
    function.__name__[1:]: function
    for function in (
        _layernorm_modulate,
        _residual_layernorm_modulate,
        _gate_residual,
        _qk_norm_rope,
        _spatial_attention,
        _temporal_attention,
        _cross_attention,
        _groupnorm_silu,
        _causal_conv3d,
        _patchify,
        _cfg_rflow_step,
    )
}


def _select(x: Tensor) -> Tensor:
    """Choose frames of both kinds, bool [2, 3]."""
    return torch.tensor([[True, False, True], [False, False, True]], device=x.device)


def _table(new: New, frames: int = 5) -> tuple[Tensor, Tensor]:
    angles = new(frames, 36).detach().repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def find_problem(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what is wrong with an op's kernels for a dtype on a device; None if nothing is.

    Results and the gradients of all inputs are compared with the reference in float64 on the CPU:
    it needs no other library of the device. `opensora/trust.py` lets the kernel through to a check
    and calls this in a thread of its own.

    Raises:
        torch.OutOfMemoryError: That tells nothing about a kernel.
    """
    try:
        found = _results(CHECKS[op], device, dtype, dtype)
        found = [(what, value.cpu()) for what, value in found]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel may fail to compile or to run in ways of its compiler
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    truth = _results(CHECKS[op], torch.device("cpu"), dtype, torch.float64)
    for (what, one), (_, other) in zip(found, truth, strict=True):
        if one.dtype != dtype or one.shape != other.shape:
            return f"{what} is {one.dtype} {list(one.shape)}, not {dtype} {list(other.shape)}"
        difference = (one.double() - other).abs().max().item()
        allowed = TOLERANCE[dtype] * other.abs().max().item()
        if not difference <= allowed:
            return f"{what} differs by {difference:.1e}, allowed {allowed:.1e}"
    return None


def _results(
    run: Callable[[New], Any], device: torch.device, rounded: torch.dtype, computed: torch.dtype
) -> list[tuple[str, Tensor]]:
    """Return an op's results and the gradients of all its inputs, each with its name.

    Inputs are the same numbers of dtype `rounded`, whatever they are computed in.
    """
    made: list[Tensor] = []

    def new(*shape: int) -> Tensor:
        x = randn(*shape, dtype=rounded, seed=len(made)).to(device, computed).requires_grad_()
        made.append(x)
        return x

    results: Sequence[Tensor] = run(new)
    results = [results] if isinstance(results, Tensor) else list(results)
    recorded = [y for y in results if y.requires_grad]
    directions = [
        randn(*y.shape, dtype=rounded, seed=100 + i).to(device, computed)
        for i, y in enumerate(recorded)
    ]
    named = [(f"result {i + 1}", y.detach()) for i, y in enumerate(results)]
    if recorded:
        gradients = torch.autograd.grad(recorded, made, directions, allow_unused=True)
        named += [(f"gradient {i + 1}", g) for i, g in enumerate(gradients) if g is not None]
    return named
