"""Test `cross_attention`: every implementation against the reference in float64."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora import testing
from opensora.attention import MultiHeadCrossAttention
from opensora.functional import cross_attention
from opensora.kernels import _flash
from opensora.kernels import cross_attention as kernels
from opensora.ops import cross_attention as op
from opensora.testing import Implementation, assert_as_exact_as, double, randn

# (N, H, D, lengths of text): STDiT3-XL's width, lengths and tokens at the borders of tiles of 32,
# a sample without text first, last and alone, widths that fit, need a tail and are padded.
SHAPES = [
    (33, 1, 72, (5, 33)),
    (31, 1, 40, (0, 32, 65)),
    (5, 2, 32, (31, 1, 0)),
    (65, 1, 64, (2,)),
    (2, 1, 5, (0,)),
]
# At the borders of the tiles of 128, 64 and 32 rows that half precision takes.
WIDE_SHAPES = [(127, 2, 72, (65, 3)), (257, 1, 72, (128, 300)), (129, 1, 128, (63,))]
TYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = testing.implementations()
if IMPLEMENTATIONS[0].name == "Triton interpreted":
    # Interpreted products of bfloat16 are not those of a GPU.
    TYPES, WIDE_SHAPES = [torch.float32], []
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)


def arguments(
    tokens: int,
    heads: int,
    width: int,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    gap: int = 0,
) -> list[Any]:
    """Return the op's arguments: texts in reverse order, `gap` rows of no sample around each."""
    q = (randn(len(lengths), tokens, heads, width, seed=1) * 2).to(device, dtype)
    starts = [n + gap for n in accumulate((n + gap for n in lengths[::-1]), initial=0)]
    kv = randn(starts.pop(), 2, heads, width, dtype=dtype, device=device, seed=2)
    runs = [torch.tensor(n, dtype=torch.int32, device=device) for n in (starts[::-1], lengths)]
    return [q.requires_grad_(), kv.requires_grad_(), *runs, max(*lengths, 1)]


def call(args: list[Any]) -> Tensor:
    return cross_attention(*args[:4], longest=args[4])


def gradients(y: Tensor, args: list[Any], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, args[:2], grad.to(y.device, y.dtype))


def check(implementation: Implementation, args: list[Any]) -> tuple[Tensor, ...]:
    """Compare the output and both gradients with the reference, and return them."""
    with implementation.activate():
        y = call(args)
        grad = randn(*y.shape, seed=9).to(y.dtype)
        actual = (y, *gradients(y, args, grad))
    results = []
    for those in (args, double(args)):
        y = op.reference(*those)
        results.append((y, *gradients(y, those, grad)))
    for one, other, true in zip(results[0], actual, results[1], strict=True):
        assert_as_exact_as(one, other, true)
    return actual


@pytest.mark.parametrize("shape", SHAPES + WIDE_SHAPES, ids=str)
@each_dtype
@each_implementation
def test_forward_and_backward_match_reference(
    implementation: Implementation, dtype: torch.dtype, shape: tuple[Any, ...]
) -> None:
    check(implementation, arguments(*shape, dtype, implementation.device))


@each_implementation
@given(
    tokens=st.integers(1, 70),
    heads=st.integers(1, 3),
    width=st.integers(1, 96),
    # A single key has weight 1 whatever its score: gradients are then noise of rounding alone.
    lengths=st.lists(st.just(0) | st.integers(2, 70), min_size=1, max_size=4),
    gap=st.integers(0, 2),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    tokens: int,
    heads: int,
    width: int,
    lengths: list[int],
    gap: int,
) -> None:
    shape = (tokens, heads, width, tuple(lengths))
    check(implementation, arguments(*shape, torch.float32, implementation.device, gap))


@each_implementation
def test_tiles_of_unequal_sides(
    implementation: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat, tall = (_flash.Tile(*sides, warps=4, stages=1) for sides in ((16, 32), (32, 16)))
    args = arguments(17, 1, 24, (33, 15), torch.float32, implementation.device)
    for tiles in ((flat, tall, flat), (tall, flat, tall)):
        config = kernels.Config(*tiles)
        monkeypatch.setattr(kernels.Config, "heuristic", lambda *_, config=config: config)
        check(implementation, args)


@pytest.mark.parametrize("tokens", [64, 65])
@each_implementation
def test_gradients_of_keys_add_up_over_chunks(
    implementation: Implementation, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.Config, "chunks", lambda *_: 2)
    check(implementation, arguments(tokens, 1, 16, (9, 3), torch.float32, implementation.device))


def test_chunks_fill_the_device_and_are_not_short() -> None:
    config = kernels.Config.heuristic(72, torch.bfloat16)
    assert config.chunks(32, 23850, 300) * 32 * 5 >= 4 * 132
    assert config.chunks(32, 23850, 300) == 4
    assert config.chunks(32, 2047, 300) == 1
    assert config.chunks(10**4, 23850, 300) == 1


@each_implementation
def test_text_of_no_sample_is_not_seen(implementation: Implementation) -> None:
    args = arguments(17, 2, 24, (9, 0, 6), torch.float32, implementation.device, gap=3)
    kv, starts, lengths = args[1].detach().clone(), args[2].tolist(), args[3].tolist()
    outside = torch.ones(len(kv), dtype=torch.bool)
    for start, length in zip(starts, lengths, strict=True):
        outside[start : start + length] = False
    assert outside.sum() == 12
    kv[outside] = torch.nan
    args[1] = kv.requires_grad_()
    y, dq, dkv = check(implementation, args)
    assert not y.isnan().any()
    for nothing in (y[1], dq[1], dkv[outside]):
        assert torch.equal(nothing, torch.zeros_like(nothing))


@each_implementation
def test_samples_may_share_text_without_its_gradient(implementation: Implementation) -> None:
    args = arguments(5, 2, 16, (4, 7), torch.float32, implementation.device)
    q, kv, starts, lengths, longest = args
    shared = [q, kv.detach(), torch.zeros_like(starts), lengths, longest]
    twice = torch.cat((kv[:4], kv[:7])).detach()
    apart = [q, twice, torch.tensor([0, 4], dtype=torch.int32, device=q.device), lengths, longest]
    with implementation.activate():
        results = []
        for those in (shared, apart):
            y = call(those)
            results.append((y, *torch.autograd.grad(y.square().sum(), q)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_implementation
def test_samples_and_heads_do_not_mix(implementation: Implementation) -> None:
    args = arguments(5, 2, 16, (4, 3, 2), torch.float32, implementation.device)
    with implementation.activate(), torch.no_grad():
        clean = call(args)
        args[1] = args[1].detach().clone()
        args[1][3, :, 1] = torch.nan  # rows 2 to 4 are sample 1's
        y = call(args)
    hit = torch.zeros(3, 5, 2, 16, dtype=torch.bool)
    hit[1, :, 1] = True
    y, clean = (t.unflatten(-1, (2, 16)).cpu() for t in (y, clean))
    assert torch.equal(y.isnan(), hit)
    assert torch.equal(y[~hit], clean[~hit])


def test_reference_is_what_the_module_computes() -> None:
    module = MultiHeadCrossAttention(64, 2)
    x, text, lengths = randn(2, 10, 64), randn(2, 9, 64, seed=1), torch.tensor([6, 3]).int()
    q = module.q_linear(x).unflatten(-1, (2, 32))
    padded = module.kv_linear(text).flatten(0, 1).unflatten(-1, (2, 2, 32))
    y = op.reference(q, padded, torch.tensor([0, 9]).int(), lengths, 9)
    with testing.reference():
        expected = module(x, text, torch.arange(9) < lengths[:, None])
    assert torch.equal(module.proj(y), expected)
    packed = torch.cat((padded[:6], padded[9:12]))
    for longest in (6, 9, 140):
        y = op.reference(q, packed, torch.tensor([0, 6]).int(), lengths, longest)
        torch.testing.assert_close(module.proj(y), expected, rtol=0, atol=1e-6)


def test_reference_backward_equals_autograd() -> None:
    args = double(arguments(7, 2, 12, (3, 0, 5), torch.float32, gap=1))
    grad = randn(3, 7, 24, dtype=torch.float64, seed=4)
    expected = gradients(op.reference(*args), args, grad)
    torch.testing.assert_close(op.reference_backward(grad, *args), expected)


def test_gradcheck() -> None:
    args = double(arguments(3, 2, 4, (3, 0, 2), torch.float32))
    assert torch.autograd.gradcheck(lambda *a: call(list(a)), args)


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments(5, 2, 24, (4, 3), torch.float32, implementation.device)
    q, kv, starts, lengths, longest = (a.detach() if isinstance(a, Tensor) else a for a in args)
    apart = torch.stack((starts, lengths), 1)
    inputs = [
        (q, kv, starts, lengths),
        (q.transpose(1, 2).contiguous().transpose(1, 2), kv, *apart.unbind(1)),  # heads outside
        (q, kv.transpose(0, 1).contiguous().transpose(0, 1), starts, lengths),  # k, then v
        (torch.nn.functional.pad(q, (8, 8, 0, 1))[..., :-1, 8:-8], kv, starts, lengths),
        (q.mT.contiguous().mT, kv.mT.contiguous().mT, starts, lengths),  # columns apart
    ]
    grad = randn(2, 5, 48, seed=4)
    results = []
    for q, kv, *runs in inputs:
        those = [q.detach().requires_grad_(), kv.detach().requires_grad_(), *runs, longest]
        with implementation.activate():
            y = call(those)
            results.append((y, *gradients(y, those, grad)))
    for result in results[1:]:
        assert result[0].is_contiguous()
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "lengths"), [(0, (3, 2)), (5, ()), (5, (0, 0))], ids=["tokens", "batch", "text"]
)
@each_implementation
def test_empty_batch(implementation: Implementation, tokens: int, lengths: tuple[int, ...]) -> None:
    args = arguments(tokens, 2, 16, lengths or (4,), torch.float32, implementation.device)
    if not lengths:
        args = [args[0].detach()[:0].requires_grad_(), args[1], args[2][:0], args[3][:0], 4]
    with implementation.activate():
        y = call(args)
        dq, dkv = gradients(y, args, torch.ones(y.shape))
    assert y.shape == (len(lengths), tokens, 32)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in (y, dq, dkv))
    assert dq.shape == args[0].shape
    assert dkv.shape == args[1].shape


@each_implementation
def test_more_text_than_promised(implementation: Implementation) -> None:
    if implementation.name == "reference":
        pytest.skip("the reference pads to `longest`; kernels do not depend on it")
    args = arguments(4, 1, 16, (70, 3), torch.float32, implementation.device)
    grad = randn(2, 4, 16, seed=4)
    with implementation.activate():
        y = call(args)
        expected = (y, *gradients(y, args, grad))
        y = call([*args[:4], 1])
        actual = (y, *gradients(y, args, grad))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@each_dtype
@each_implementation
def test_extreme_values(implementation: Implementation, dtype: torch.dtype) -> None:
    args = arguments(6, 1, 24, (40,), dtype, implementation.device)
    for case in range(4):
        q, kv = args[0].detach().clone(), args[1].detach().clone()
        if case == 0:
            q *= 100  # one key takes all
        elif case == 1:
            kv[:, 1] *= 1e15
        elif case == 2:
            q, kv[:, 0] = q.abs() * 10, -kv[:, 0].abs() * 10  # scores far below zero
        else:
            q[0, 3] = torch.nan  # one query
        check(implementation, [q.requires_grad_(), kv.requires_grad_(), *args[2:]])


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments(70, 2, 72, (40, 33), TYPES[-1], implementation.device)
    grad = randn(2, 70, 144, seed=4)
    runs = []
    for _ in range(3):
        with implementation.activate():
            y = call(args)
            runs.append((y, *gradients(y, args, grad)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@each_implementation
def test_opcheck(implementation: Implementation) -> None:
    """Check schema and fakes against the kernels, interpreted ones as those of a CPU."""
    if implementation.name == "reference":
        pytest.skip("a reference is no kernel")
    with torch.library._scoped_library("opensora", "IMPL") as library:
        if implementation.name == "Triton interpreted":
            for one in (op._forward, op._backward):
                library.impl(one.name, one.launcher, "CPU")
        args = arguments(5, 2, 16, (3, 4), torch.float32, implementation.device)
        args = [a.detach() if isinstance(a, Tensor) else a for a in args]
        results = torch.ops.opensora.cross_attention_forward(*args[:4])
        grad = randn(*results[0].shape, seed=3).to(results[0].device)
        torch.library.opcheck(torch.ops.opensora.cross_attention_forward, tuple(args[:4]))
        for text in (True, False):
            torch.library.opcheck(
                torch.ops.opensora.cross_attention_backward,
                (grad, *args[:4], *results, args[4], text),
            )


def test_compiles_without_graph_break() -> None:
    args = arguments(5, 2, 16, (3, 4), torch.float32)
    grad = randn(2, 5, 32, seed=4)
    eager = gradients(call(args), args, grad)
    compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
    y = compiled(*args)
    torch.testing.assert_close(y, call(args))
    torch.testing.assert_close(gradients(y, args, grad), eager)


def test_a_required_kernel_that_cannot_run_raises() -> None:
    args = arguments(2, 1, 8, (3,), torch.float64)
    assert call(args).dtype == torch.float64
    with testing.require(), pytest.raises(NotImplementedError, match=r"float64 on 'cpu'.*cuda: "):
        call(args)


def test_a_processor_with_tiles_leaves_bfloat16_to_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = arguments(3, 1, 8, (3,), torch.bfloat16)
    monkeypatch.setattr(op, "reference", lambda *_: "the reference")
    monkeypatch.setattr(op._attention, "_HAS_TILES", True)
    assert call(args) == "the reference"
    wider = arguments(3, 1, 8, (3,), torch.float32)
    compiled = op._forward.kernel("cpu") is not None
    assert (call(wider) == "the reference") is not compiled


@each_implementation
def test_wide_heads_go_to_the_reference_or_to_cpp(implementation: Implementation) -> None:
    args = arguments(3, 1, 136, (3,), torch.float32, implementation.device)
    assert_as_exact_as(op.reference(*args), call(args), op.reference(*double(args)))
    if implementation.name.startswith("C++"):
        check(implementation, args)
    elif implementation.name != "reference":
        with implementation.activate(), pytest.raises(NotImplementedError, match="at most 128"):
            call(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 16)}, r"q must be float \[B, N, H, D\]"),
        ({"q": torch.zeros(2, 5, 2, 8, dtype=torch.int64)}, "q must be float"),
        (
            {"kv": torch.zeros(7, 3, 2, 8)},
            r"\[L, 2, H, D\] = \[L, 2, 2, 8\], got .* \[7, 3, 2, 8\]",
        ),
        ({"kv": torch.zeros(7, 2, 2, 9)}, "kv must be"),
        ({"kv": torch.zeros(7, 2, 2, 8).half()}, "kv must be torch.float32"),
        ({"kv": torch.zeros(7, 2, 2, 8, device="meta")}, "share a device, got cpu, meta, cpu, cpu"),
        ({"starts": torch.tensor([0, 3])}, r"starts must be int32 \[B = 2\], got torch.int64"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths must be int32"),
        ({"longest": 0}, "longest must be 1 or more, got 0"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Any], message: str) -> None:
    good = {
        "q": torch.zeros(2, 5, 2, 8),
        "kv": torch.zeros(7, 2, 2, 8),
        "starts": torch.tensor([0, 3], dtype=torch.int32),
        "lengths": torch.tensor([3, 4], dtype=torch.int32),
        "longest": 4,
    }
    cross_attention(**good)
    with pytest.raises(ValueError, match=message):
        cross_attention(**(good | change))


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(35, 2, 24, (33, 2), torch.float32, implementation.device)
    grad = randn(2, 35, 48, seed=4)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            y = call(args)
            results.append((y, *gradients(y, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")
