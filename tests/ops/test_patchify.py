"""Test `patchify`: every implementation against the reference in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora import testing
from opensora.functional import patchify
from opensora.kernels import patchify as kernels
from opensora.nn import PatchEmbed3D
from opensora.ops import patchify as op
from opensora.testing import Implementation, assert_as_exact_as, double, randn

# Latent, patch, channels. A tile is 64 rows of 128 channels (C++: at most 8 of 32): one token;
# STDiT3's patch with sizes that need padding; a tile less one, full, one more; patches along time,
# K of 54 and of 3; K of 600, which a CPU leaves to its library.
CASES = [
    ((1, 1, 1, 1, 1), (1, 1, 1), 4),
    ((2, 4, 3, 5, 7), (1, 2, 2), 130),
    ((1, 4, 1, 14, 18), (1, 2, 2), 127),
    ((1, 4, 4, 8, 8), (1, 2, 2), 128),
    ((1, 4, 5, 2, 26), (1, 2, 2), 129),
    ((2, 3, 5, 7, 4), (2, 3, 3), 20),
    ((3, 3, 2, 5, 5), (1, 1, 1), 12),
    ((1, 6, 4, 11, 20), (1, 10, 10), 20),
]
DTYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = testing.implementations()
if IMPLEMENTATIONS[0].name == "Triton interpreted":  # which takes what CUDA would
    op.DTYPES["cpu"] = op.DTYPES["cuda"]
    DTYPES.remove(torch.bfloat16)  # the interpreter's bfloat16 products are wrong
dispatched = partial(testing.dispatched, op._forward, op._backward, op._input_backward)
# Schema, fakes and autograd are tested on the C++ kernels, or on the references without a compiler.
through_dispatcher = testing.require if op._forward.kernel("cpu") == "C++" else dispatched
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize("case", CASES, ids=str)
Case = tuple[tuple[int, ...], tuple[int, ...], int]


def arguments(
    case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", wide: bool = True
) -> list[Tensor]:
    """Return x (float32 if `wide`, else of the dtype), weight, bias and positions."""
    shape, patch, channels = case
    x = randn(*shape, dtype=torch.float32 if wide else dtype, device=device, seed=1)
    weight = randn(channels, shape[1], *patch, dtype=dtype, device=device, seed=2)
    bias = randn(channels, dtype=dtype, device=device, seed=3)
    _, rows, columns = op.counts(x, weight)
    positions = randn(1, rows * columns, channels, dtype=dtype, device=device, seed=4)
    return [*(t.requires_grad_() for t in (x, weight, bias)), positions]


def gradients(tokens: Tensor, args: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(tokens, args[:3], grad.to(tokens.device, tokens.dtype))


def truths(args: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """Return tokens, and gradients if asked for, in float64, of the x that the op sees."""
    exact = double([args[0].to(args[1].dtype), *args[1:]])
    tokens = op.reference(*exact)
    return [tokens] if grad is None else [tokens, *gradients(tokens, exact, grad)]


@each_case
@each_dtype
@each_implementation
def test_forward_matches_reference(
    implementation: Implementation, dtype: torch.dtype, case: Case
) -> None:
    args = arguments(case, dtype, implementation.device)
    with implementation.activate(), torch.no_grad():
        tokens = patchify(*args)
    assert tokens.is_contiguous()
    assert_as_exact_as(op.reference(*args), tokens, truths(args)[0])


@each_case
@each_dtype
@each_implementation
def test_backward_matches_reference(
    implementation: Implementation, dtype: torch.dtype, case: Case
) -> None:
    args = arguments(case, dtype, implementation.device, wide=False)
    working = op.reference(*args)
    grad = randn(*working.shape, seed=5).to(dtype)
    with implementation.activate():
        actual = gradients(patchify(*args), args, grad)
    expected = gradients(working, args, grad)
    for one, other, true in zip(expected, actual, truths(args, grad)[1:], strict=True):
        assert_as_exact_as(one, other, true)


@each_implementation
def test_gradients_add_up_over_many_runs(implementation: Implementation) -> None:
    args = arguments(((2, 1, 3, 14, 15), (1, 1, 1), 3), device=implementation.device)
    grad = randn(2, 630, 3, seed=5)  # 1260 rows: two runs of 512 and a part of one
    with implementation.activate():
        actual = gradients(patchify(*args), args, grad)
    expected = gradients(op.reference(*args), args, grad)
    for one, other, true in zip(expected, actual, truths(args, grad)[1:], strict=True):
        assert_as_exact_as(one, other, true)


@each_dtype
def test_reference_is_the_patch_embedding_of_the_model(dtype: torch.dtype) -> None:
    embed = PatchEmbed3D((1, 2, 2), 4, 32).to(dtype)
    x, positions = randn(2, 4, 3, 5, 7), randn(1, 12, 32, dtype=dtype, seed=1)
    with testing.reference(), torch.no_grad():
        tokens = embed(x.to(dtype)).unflatten(1, (3, -1)) + positions[:, None]
        actual = patchify(x, embed.proj.weight, embed.proj.bias, positions)
    assert torch.equal(actual, tokens.flatten(1, 2))


@each_case
def test_reference_backward_equals_autograd(case: Case) -> None:
    args = double(arguments(case))
    tokens = op.reference(*args)
    grad = randn(*tokens.shape, dtype=torch.float64, seed=5)
    dx, *others = gradients(tokens, args, grad)
    mine = op.reference_backward(grad, args[0], args[1])
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(op.reference_input_backward(grad, args[0], args[1]), dx)


def test_gradcheck() -> None:
    args = double(arguments(((2, 2, 3, 3, 4), (2, 2, 2), 3)))
    assert torch.autograd.gradcheck(patchify, args)


@each_implementation
@given(
    batch=st.integers(1, 2),
    inputs=st.integers(1, 5),
    size=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    patch=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    batch: int,
    inputs: int,
    size: tuple[int, ...],
    patch: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
) -> None:
    case = ((batch, inputs, *size), patch, channels)
    args = arguments(case, dtype, implementation.device)
    with implementation.activate(), torch.no_grad():
        tokens = patchify(*args)
    assert_as_exact_as(op.reference(*args), tokens, truths(args)[0])


@each_implementation
def test_every_token_reads_its_own_patch(implementation: Implementation) -> None:
    # With the identity as weight the tokens are the pixels themselves, and back.
    x = torch.arange(2.0 * 3 * 4 * 5 * 7, device=implementation.device).view(2, 3, 4, 5, 7)
    weight = torch.eye(24, device=implementation.device).view(24, 3, 2, 2, 2)
    code = torch.arange(12.0, device=implementation.device)[:, None].expand(12, 24) * 1000
    x.requires_grad_()
    with implementation.activate():
        tokens = patchify(x, weight, weight.new_zeros(24), code)
        (dx,) = torch.autograd.grad(tokens, x, (tokens - code.repeat(2, 1)).detach())
    assert torch.equal(dx, x)
    assert tokens[1, 12 + 4 + 1, 0] == x[1, 0, 2, 2, 2] + 5000  # frame 1, row 1, column 1
    assert tokens[0, 3, 1] == 3000  # past the end of a row of 7


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments(((2, 3, 4, 5, 6), (1, 2, 2), 20), device=implementation.device)
    x, weight, bias, positions = args
    wide = randn(20, 2, 2, 3, 2, device=implementation.device, seed=6)
    changes = {
        "x": x.detach().transpose(1, 4).contiguous().transpose(1, 4).requires_grad_(),
        "weight": wide.permute(0, 3, 4, 1, 2)[:, :, :1].requires_grad_(),
        "bias": randn(40, device=implementation.device)[::2].requires_grad_(),
        "positions": positions.mT.contiguous().mT,
    }
    strided = list(changes.values())
    dense = [t.detach().contiguous().requires_grad_(t.requires_grad) for t in strided]
    grad = randn(2, 20, 36, seed=7).mT
    with implementation.activate():
        y, expected = patchify(*strided), patchify(*dense)
        mine = gradients(y, strided, grad)
        others = gradients(expected, dense, grad.contiguous())
    for one, other in zip((y, *mine), (expected, *others), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    shared = x.detach()[:1].expand(2, -1, -1, -1, -1)
    with implementation.activate(), torch.no_grad():
        y = patchify(shared, weight, bias, positions)
    assert torch.equal(y[0], y[1])


@each_implementation
def test_empty_batch(implementation: Implementation) -> None:
    args = arguments(((0, 4, 2, 3, 3), (1, 2, 2), 8), device=implementation.device)
    with implementation.activate():
        tokens = patchify(*args)
        dx, *others = gradients(tokens, args, torch.ones(0, 8, 8))
    assert tokens.shape == (0, 8, 8)
    assert dx.shape == args[0].shape
    assert all(torch.equal(t, torch.zeros_like(t)) for t in others)


@each_implementation
def test_extreme_values(implementation: Implementation) -> None:
    args = arguments(((1, 1, 1, 2, 70), (1, 2, 1), 8), device=implementation.device)
    x = args[0].detach()
    x[..., 1] *= 1e18
    x[..., 2] *= 1e-30
    x[0, 0, 0, 0, 3] = torch.nan
    x[0, 0, 0, 1, 66] = torch.inf
    args[0] = x
    with implementation.activate(), torch.no_grad():
        tokens = patchify(*args)
    working, (truth,) = op.reference(*args), truths(args)
    for n in (1, 2, 3, 66, [n for n in range(70) if n not in (1, 2, 3, 66)]):
        # The tolerance follows the largest error, so what is large or small stands alone.
        assert_as_exact_as(working[:, n], tokens[:, n], truth[:, n])


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments(((2, 4, 5, 18, 16), (1, 2, 2), 140), device=implementation.device)
    grad = randn(2, 360, 140, seed=5)  # C++: 720 rows in two units, 140 channels in two blocks
    runs, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with implementation.activate():
            tokens = patchify(*args)
            runs.append((tokens, *gradients(tokens, args, grad)))
    torch.set_num_threads(before)
    if implementation.name != "reference":  # its sums may split by threads
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[3], runs[0], strict=True))


@each_implementation
def test_gradients_only_where_they_are_wanted(implementation: Implementation) -> None:
    args = arguments(((1, 2, 2, 4, 4), (1, 2, 2), 8), device=implementation.device)
    grad = randn(1, 8, 8, seed=5)
    with implementation.activate():
        expected = gradients(patchify(*args), args, grad)
        for i in range(3):
            alone = [a.detach().requires_grad_(j == i) for j, a in enumerate(args)]
            (one,) = torch.autograd.grad(patchify(*alone), alone[i], grad.to(args[0].device))
            torch.testing.assert_close(one, expected[i], rtol=0, atol=1e-5)


@each_implementation
def test_the_latent_and_the_codes_are_cast(implementation: Implementation) -> None:
    args = arguments(((1, 2, 2, 4, 4), (1, 2, 2), 8), device=implementation.device)
    x = args[0].detach()
    with implementation.activate(), torch.no_grad():
        tokens = patchify(x.double(), *args[1:3], args[3].double())
        assert torch.equal(tokens, patchify(*args))
    y = patchify(args[0], *(a.bfloat16() for a in args[1:3]), args[3])
    (dx,) = torch.autograd.grad(y.sum(), args[0])
    assert y.dtype == torch.bfloat16
    assert dx.dtype == torch.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[-1:], ids=str)
def test_opcheck(implementation: Implementation) -> None:
    if implementation.device != "cpu":
        pytest.skip("the ops are checked on the CPU")
    args = arguments(((2, 2, 2, 3, 3), (1, 2, 2), 8))
    x, weight, bias, positions = (a.detach() for a in args)
    grad = randn(2, 8, 8)
    with through_dispatcher():
        for latent in (x, x.bfloat16(), x.transpose(1, 4).contiguous().transpose(1, 4)):
            tokens = (latent, weight, bias, positions[0])
            torch.library.opcheck(op._forward.overload, tokens)
            torch.library.opcheck(op._backward.overload, (grad, latent, weight))
            torch.library.opcheck(op._input_backward.overload, (grad, latent, weight))


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_compiles_without_graph_break(mode: str) -> None:
    args = arguments(((1, 2, 2, 3, 4), (1, 2, 2), 8))
    grad = randn(1, 8, 8, seed=5)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    with through_dispatcher(), testing._mode(mode):
        eager = gradients(patchify(*args), args, grad)
        compiled = torch.compile(patchify, fullgraph=True, backend="aot_eager")
        tokens = compiled(*args)
        torch.testing.assert_close(tokens, patchify(*args))
        torch.testing.assert_close(gradients(tokens, args, grad), eager)
        with torch.no_grad():
            torch.compile(patchify, fullgraph=True, backend=backend)(*args)
    kept = mode == "require" or op._forward.kernel("cpu") == "C++"
    assert ("patchify_forward" in graphs[0]) is kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 5, 7)}, r"x must be float \[B, I, T, H, W\] with pixels"),
        ({"x": torch.zeros(2, 4, 3, 5, 7).int()}, "x must be float"),
        ({"x": torch.zeros(2, 4, 3, 0, 7)}, r"with pixels, got torch.float32 \[2, 4, 3, 0, 7\]"),
        ({"x": torch.zeros(2, 3, 3, 5, 7)}, r"weight must be \[C, 3, pt, ph, pw\]"),
        ({"weight": torch.zeros(8, 16)}, "weight must be"),
        ({"weight": torch.zeros(8, 4, 1, 2, 2, device="meta")}, "weight must be .* on cpu"),
        ({"bias": torch.zeros(9)}, r"bias must be torch.float32 \[8\]"),
        ({"bias": torch.zeros(8).half()}, "bias must be torch.float32"),
        ({"positions": torch.zeros(11, 8)}, r"positions must be \[S, C\] = \[12, 8\]"),
        ({"positions": torch.zeros(2, 12, 8)}, "positions must be"),
        ({"positions": torch.zeros(12, 8, requires_grad=True)}, "must not require a gradient"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Tensor], message: str) -> None:
    good = {
        "x": torch.zeros(2, 4, 3, 5, 7),
        "weight": torch.zeros(8, 4, 1, 2, 2),
        "bias": torch.zeros(8),
        "positions": torch.zeros(12, 8),
    }
    patchify(**good)
    with pytest.raises(ValueError, match=message):
        patchify(**(good | change))


def test_a_required_kernel_that_cannot_run_raises() -> None:
    args = arguments(((1, 1, 1, 2, 2), (1, 2, 2), 4), torch.float64)
    assert patchify(*args).dtype == torch.float64
    with (
        testing.require(),
        pytest.raises(NotImplementedError, match=r"no kernel for torch\.float64"),
    ):
        patchify(*args)


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(((2, 3, 3, 5, 6), (2, 2, 2), 20), device=implementation.device)
    grad = randn(2, 18, 20, seed=5)
    results: list[Any] = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            tokens = patchify(*args)
            results.append((tokens, *gradients(tokens, args, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")
