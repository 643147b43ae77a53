"""Test `spatial_attention`: every implementation against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora import testing
from opensora.attention import Attention
from opensora.functional import spatial_attention
from opensora.kernels import _flash
from opensora.kernels import spatial_attention as kernels
from opensora.ops import spatial_attention as op
from opensora.testing import Implementation, assert_as_exact_as, double, randn

# (B, T, S, H, D): STDiT3-XL's width and the tiny model's, S at the borders of tiles of 32 and 64,
# single tokens and frames, widths that fit, that need a tail and that are padded.
SHAPES = [
    (1, 1, 33, 2, 72),
    (1, 1, 65, 1, 40),
    (1, 1, 64, 1, 64),
    (1, 1, 31, 2, 32),
    (2, 2, 5, 2, 24),
    (1, 1, 32, 1, 96),
    (1, 1, 2, 2, 5),
]
# At the borders of the tiles of 128 and 64 rows that half precision takes.
WIDE_SHAPES = [(1, 2, 127, 2, 72), (1, 1, 257, 1, 72), (1, 1, 129, 1, 128)]
TYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = testing.implementations()
if IMPLEMENTATIONS[0].name == "Triton interpreted":
    # Interpreted products of bfloat16 are not those of a GPU.
    TYPES, WIDE_SHAPES = [torch.float32], []
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES + WIDE_SHAPES, ids=str)
with_and_without_norm = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, norm: bool, device: str = "cpu"
) -> list[Any]:
    """Return the op's arguments, the scores spread enough that softmax picks."""
    batch, frames, tokens, heads, width = shape
    spread = torch.tensor([2.0, 1.5, 1.0])[:, None, None]
    qkv = (randn(batch, frames, tokens, 3, heads, width, seed=1) * spread).to(device, dtype)
    weights: list[Tensor | None] = [None, None]
    if norm:
        weights = [
            (1 + randn(width, seed=2 + i) / 3).to(device, dtype).requires_grad_() for i in (0, 1)
        ]
    return [qkv.requires_grad_(), *weights, 1e-6]


def call(args: list[Any]) -> Tensor:
    return spatial_attention(*args[:3], eps=args[3])


def gradients(y: Tensor, args: list[Any], grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(y, inputs, grad.to(y.device, y.dtype))


def check(implementation: Implementation, args: list[Any]) -> None:
    """Compare the output and every gradient with the reference."""
    with implementation.activate():
        y = call(args)
        grad = randn(*y.shape, seed=9).to(y.dtype)
        actual = (y, *gradients(y, args, grad))
    results = []
    for those in (args, double(args)):
        y = op.reference(*those)
        results.append((y, *gradients(y, those, grad)))
    # The same sums in another order: of one order alone, the largest error is luck.
    for one, two, other, true in zip(
        results[0], flipped(args, grad), actual, results[1], strict=True
    ):
        errors = [(w - true).abs().nan_to_num(0.0).amax() if w.numel() else 0 for w in (one, two)]
        assert_as_exact_as(one if errors[0] > errors[1] else two, other, true)


def flipped(args: list[Any], grad: Tensor) -> list[Tensor]:
    """Return the reference's results and gradients, computed with tokens and columns reversed."""
    qkv, *weights, eps = args
    others = [w if w is None else w.detach().flip(0).requires_grad_() for w in weights]
    turned = [qkv.detach().flip(2, 5).requires_grad_(), *others, eps]
    shape = (*qkv.shape[:3], *qkv.shape[4:])
    y = op.reference(*turned)
    dqkv, *dweights = gradients(y, turned, grad.view(shape).flip(2, 4).reshape(grad.shape))
    return [
        y.view(shape).flip(2, 4).reshape(y.shape),
        dqkv.flip(2, 5),
        *(d.flip(0) for d in dweights),
    ]


@each_shape
@each_dtype
@with_and_without_norm
@each_implementation
def test_forward_and_backward_match_reference(
    implementation: Implementation, norm: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    check(implementation, arguments(shape, dtype, norm, implementation.device))


@each_implementation
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 3),
    tokens=st.integers(2, 70),
    heads=st.integers(1, 3),
    width=st.integers(1, 96),
    norm=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    batch: int,
    frames: int,
    tokens: int,
    heads: int,
    width: int,
    norm: bool,
) -> None:
    shape = (batch, frames, tokens, heads, width)
    check(implementation, arguments(shape, torch.float32, norm, implementation.device))


@with_and_without_norm
@each_implementation
def test_a_single_token_takes_its_own_value(implementation: Implementation, norm: bool) -> None:
    args = arguments((2, 2, 1, 2, 72), torch.float32, norm, implementation.device)
    grad = randn(2, 2, 1, 144, seed=4)
    with implementation.activate():
        y = call(args)
        dqkv, *_ = gradients(y, args, grad)
    torch.testing.assert_close(y, args[0][:, :, :, 2].flatten(-2))
    torch.testing.assert_close(dqkv[:, :, :, 2].flatten(-2).cpu(), grad)
    assert dqkv[:, :, :, :2].abs().max() < 1e-5  # the scores do not matter


@pytest.mark.parametrize("tokens", [17, 48])
@with_and_without_norm
@each_implementation
def test_tiles_of_unequal_sides(
    implementation: Implementation, norm: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat, tall = (_flash.Tile(*sides, warps=4, stages=1) for sides in ((16, 32), (32, 16)))
    args = arguments((1, 1, tokens, 1, 24), torch.float32, norm, implementation.device)
    for tiles in ((flat, tall, flat), (tall, flat, tall)):
        config = kernels.Config(*tiles)
        monkeypatch.setattr(kernels.Config, "heuristic", lambda *_, config=config: config)
        check(implementation, args)


def test_reference_is_what_the_module_computes() -> None:
    for norm in (False, True):
        module = Attention(64, 2, qk_norm=norm)
        x = randn(2, 3, 10, 64)
        weights = (module.q_norm.weight, module.k_norm.weight) if norm else (None, None)
        y = op.reference(module.qkv(x).unflatten(-1, (3, 2, 32)), *weights, 1e-6)
        with testing.reference():
            expected = module(x.flatten(0, 1)).view(2, 3, 10, 64)
        assert torch.equal(module.proj(y), expected)


@with_and_without_norm
def test_reference_backward_equals_autograd(norm: bool) -> None:
    args = double(arguments((2, 3, 5, 2, 12), torch.float32, norm))
    grad = randn(2, 3, 5, 24, dtype=torch.float64, seed=4)
    dqkv, *dweights = gradients(op.reference(*args), args, grad)
    mine, sums = op.reference_backward(grad, *args)
    torch.testing.assert_close(mine, dqkv)
    assert sums.shape == ((2, 12) if norm else (0, 0))
    for one, other in zip(sums, dweights, strict=True):
        torch.testing.assert_close(one, other)


@with_and_without_norm
def test_gradcheck(norm: bool) -> None:
    args = double(arguments((2, 1, 3, 2, 4), torch.float32, norm))
    assert torch.autograd.gradcheck(lambda *a: call(list(a)), args)


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments((1, 2, 5, 2, 24), torch.float32, True, implementation.device)
    qkv = args[0].detach()
    grad = randn(1, 2, 5, 48, seed=4)
    results = []
    for layout in ("dense", "frames inside", "heads outside", "gaps", "columns apart", "expanded"):
        if layout == "frames inside":
            x = qkv.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "heads outside":
            x = qkv.permute(4, 3, 0, 1, 2, 5).contiguous().permute(2, 3, 4, 1, 0, 5)
        elif layout == "gaps":
            x = torch.nn.functional.pad(qkv, (8, 8, 0, 1))[..., :-1, 8:-8]
        elif layout == "columns apart":
            x = qkv.mT.contiguous().mT
        elif layout == "expanded":
            x = qkv[:, :1].expand(-1, 2, -1, -1, -1, -1)
        else:
            x = qkv
        x = x.detach().requires_grad_()
        with implementation.activate():
            y = call([x, *args[1:]])
            (dx,) = torch.autograd.grad(y, x, grad.to(y.device))
        results.append((y, dx))
    for y, dx in results[1:-1]:
        assert y.is_contiguous()
        torch.testing.assert_close(y, results[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(dx, results[0][1], rtol=0, atol=1e-5)
    first = results[0][0][:, :1].expand(-1, 2, -1, -1)
    torch.testing.assert_close(results[-1][0], first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 5, 2, 16), (2, 0, 5, 2, 16), (2, 3, 0, 2, 16)], ids=str)
@with_and_without_norm
@each_implementation
def test_empty_batch(implementation: Implementation, norm: bool, shape: tuple[int, ...]) -> None:
    args = arguments(shape, torch.float32, norm, implementation.device)
    with implementation.activate():
        y = call(args)
        dqkv, *dweights = gradients(y, args, torch.ones(*shape[:3], 32))
    assert y.shape == (*shape[:3], 32)
    assert dqkv.shape == args[0].shape
    assert all(torch.equal(w, torch.zeros_like(w)) for w in dweights)


@each_implementation
def test_frames_and_heads_do_not_mix(implementation: Implementation) -> None:
    args = arguments((2, 2, 7, 2, 16), torch.float32, False, implementation.device)
    qkv = args[0].detach()
    spoilt = qkv.clone()
    spoilt[1, 0, 3, :, 1] = torch.nan
    with implementation.activate(), torch.no_grad():
        clean, y = call([qkv, None, None, 1e-6]), call([spoilt, None, None, 1e-6])
    hit = torch.zeros(2, 2, 7, 2, 16, dtype=torch.bool)
    hit[1, 0, :, 1] = True
    y, clean = (t.unflatten(-1, (2, 16)).cpu() for t in (y, clean))
    assert torch.equal(y.isnan(), hit)
    assert torch.equal(y[~hit], clean[~hit])


@each_dtype
@with_and_without_norm
@each_implementation
def test_extreme_values(implementation: Implementation, norm: bool, dtype: torch.dtype) -> None:
    args = arguments((6, 1, 35, 1, 24), dtype, norm, implementation.device)
    qkv = args[0].detach().clone()
    qkv[0, :, :, :2] *= 100  # one key takes all
    qkv[1, :, :, 2] *= 1e15
    qkv[2, :, :, :2] *= 1e-20
    qkv[3, :, :, 1] = -qkv[3, :, :, 0].abs() * 30  # scores far below zero
    qkv[3, :, :, 0] = qkv[3, :, :, 0].abs()
    qkv[4, :, 34, 0] = torch.nan  # one query
    qkv[5] = 0
    for sample in range(6):  # one by one: the tolerance follows the largest error
        x = qkv[sample : sample + 1].requires_grad_()
        check(implementation, [x, *args[1:]])


@each_implementation
def test_weights_past_the_end_may_overflow(implementation: Implementation) -> None:
    """Scores near -130 make exp(0 - lse) infinite in the lanes past the end of a tile of keys."""
    args = arguments((1, 1, 35, 1, 24), torch.float32, True, implementation.device)
    spread = args[0].detach().abs()
    spread[..., 1, :, :] *= -1
    weights = [(w.detach().abs() * 6).requires_grad_() for w in args[1:3]]
    check(implementation, [spread.requires_grad_(), *weights, args[3]])


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments((1, 2, 70, 2, 72), TYPES[-1], True, implementation.device)
    grad = randn(1, 2, 70, 144, seed=4)
    runs = []
    for _ in range(3):
        with implementation.activate():
            y = call(args)
            runs.append((y, *gradients(y, args, grad)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@each_implementation
def test_weights_of_another_dtype(implementation: Implementation) -> None:
    args = arguments((1, 1, 9, 1, 16), TYPES[-1], True, implementation.device)
    wide = [args[0], *(w.detach().float().requires_grad_() for w in args[1:3]), args[3]]
    grad = randn(1, 1, 9, 16, seed=4)
    with implementation.activate():
        y, expected = call(wide), call(args)
        _, dq_weight, dk_weight = gradients(y, wide, grad)
    assert torch.equal(y, expected)
    assert y.dtype == TYPES[-1]
    assert dq_weight.dtype == dk_weight.dtype == torch.float32


@each_implementation
def test_opcheck(implementation: Implementation) -> None:
    """Check schema and fakes against the kernels, interpreted ones as those of a CPU."""
    if implementation.name == "reference":
        pytest.skip("a reference is no kernel")
    with torch.library._scoped_library("opensora", "IMPL") as library:
        if implementation.name == "Triton interpreted":
            for one in (op._forward, op._backward):
                library.impl(one.name, one.launcher, "CPU")
        for norm in (False, True):
            args = arguments((1, 2, 5, 2, 16), torch.float32, norm, implementation.device)
            args = [a.detach() if isinstance(a, Tensor) else a for a in args]
            results = torch.ops.opensora.spatial_attention_forward(*args)
            grad = randn(*results[0].shape, seed=3).to(results[0].device)
            torch.library.opcheck(torch.ops.opensora.spatial_attention_forward, tuple(args))
            torch.library.opcheck(
                torch.ops.opensora.spatial_attention_backward, (grad, *args[:3], *results, 1e-6)
            )


def test_compiles_without_graph_break() -> None:
    args = arguments((1, 2, 5, 2, 16), torch.float32, True)
    grad = randn(1, 2, 5, 32, seed=4)
    eager = gradients(call(args), args, grad)
    compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
    y = compiled(*args)
    torch.testing.assert_close(y, call(args))
    torch.testing.assert_close(gradients(y, args, grad), eager)


def test_a_required_kernel_that_cannot_run_raises() -> None:
    args = arguments((1, 1, 2, 1, 8), torch.float64, False)
    assert call(args).dtype == torch.float64
    with testing.require(), pytest.raises(NotImplementedError, match=r"float64 on 'cpu'.*cuda: "):
        call(args)


def test_a_processor_with_tiles_leaves_bfloat16_to_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = arguments((1, 1, 3, 1, 8), torch.bfloat16, False)
    monkeypatch.setattr(op, "reference", lambda *_: "the reference")
    monkeypatch.setattr(op._attention, "_HAS_TILES", True)
    assert call(args) == "the reference"
    wider = arguments((1, 1, 3, 1, 8), torch.float32, False)
    compiled = op._forward.kernel("cpu") is not None
    assert (call(wider) == "the reference") is not compiled


@each_implementation
def test_wide_heads_go_to_the_reference_or_to_cpp(implementation: Implementation) -> None:
    args = arguments((1, 1, 3, 1, 136), torch.float32, False, implementation.device)
    y = call(args)
    assert_as_exact_as(op.reference(*args), y, op.reference(*double(args)))
    if implementation.name.startswith("C++"):
        check(implementation, args)
    elif implementation.name != "reference":
        with implementation.activate(), pytest.raises(NotImplementedError, match="at most 128"):
            call(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 3, 5, 3, 8)}, r"qkv must be float \[B, T, S, 3, H, D\]"),
        ({"qkv": torch.zeros(2, 3, 5, 2, 1, 8)}, r"got torch.float32 \[2, 3, 5, 2, 1, 8\]"),
        ({"qkv": torch.zeros(2, 3, 5, 3, 1, 8, dtype=torch.int64)}, "qkv must be float"),
        ({"q_weight": None}, "come together"),
        ({"k_weight": None}, "come together"),
        (
            {"q_weight": torch.zeros(9)},
            r"q_weight must be \[D = 8\] on cpu, got torch.float32 \[9\]",
        ),
        ({"k_weight": torch.zeros(8, device="meta")}, r"k_weight must be .* on meta"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Tensor | None], message: str) -> None:
    good = {
        "qkv": torch.zeros(2, 3, 5, 3, 1, 8),
        "q_weight": torch.zeros(8),
        "k_weight": torch.zeros(8),
    }
    spatial_attention(**good)
    with pytest.raises(ValueError, match=message):
        spatial_attention(**(good | change))


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments((1, 2, 35, 2, 24), torch.float32, True, implementation.device)
    grad = randn(1, 2, 35, 48, seed=4)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            y = call(args)
            results.append((y, *gradients(y, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_heads_are_split_where_it_saves_lanes() -> None:
    found = {width: _flash.split_head(width) for width in (1, 8, 16, 24, 32, 40, 64, 72, 96, 112)}
    assert found == {
        1: (16, 0),
        8: (16, 0),
        16: (16, 0),
        24: (32, 0),
        32: (32, 0),
        40: (32, 16),
        64: (64, 0),
        72: (64, 16),
        96: (64, 32),
        112: (128, 0),
    }


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")
