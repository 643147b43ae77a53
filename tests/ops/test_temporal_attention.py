"""Test `temporal_attention`: every implementation against the reference in float64."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora import testing
from opensora.functional import temporal_attention
from opensora.kernels import temporal_attention as kernels
from opensora.nn import Attention, RotaryEmbedding
from opensora.ops import temporal_attention as op
from opensora.testing import Implementation, assert_as_exact_as, double, randn

# B, T, S, H, D. STDiT3-XL's 15 frames; tiles of 16, 4 and 2 patches with patches left over; tiles
# of 16, 32 and 64 rows, full, with one row and with all but one. LONG: two and three blocks of 64.
SHAPES = [
    (1, 15, 2, 2, 72),
    (2, 1, 17, 1, 32),
    (1, 3, 5, 2, 40),
    (1, 5, 3, 1, 10),
    (1, 16, 1, 1, 64),
    (1, 17, 2, 1, 96),
    (1, 63, 1, 1, 16),
    (1, 64, 1, 1, 72),
]
LONG = [(2, 65, 2, 1, 16), (1, 130, 1, 2, 24)]
TYPES = [torch.float32, torch.bfloat16]
MODES = ["both", "norm", "rotary", "neither"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


dispatched = partial(testing.dispatched, op._forward, op._backward)

IMPLEMENTATIONS = testing.implementations()
if INTERPRETED:
    TYPES = [torch.float32]  # interpreted products of bfloat16 are not those of a GPU
# Schema, fakes and autograd are tested on the C++ kernels, or on the references without a compiler.
through_dispatcher = testing.require if op._forward.kernel("cpu") == "C++" else dispatched
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)
each_mode = pytest.mark.parametrize("mode", MODES)


def arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    mode: str = "both",
    device: str = "cpu",
    wide: torch.dtype | None = None,
) -> list[Any]:
    """Return the arguments of the op's reference; frames are rotated by random angles."""
    batch, frames, patches, heads, width = shape
    qkv = randn(batch, frames, patches, 3, heads, width, seed=1)
    q_weight, k_weight, cos, sin = None, None, None, None
    if mode in ("both", "norm"):
        q_weight, k_weight = (
            (randn(width, seed=s) * 0.3 + 1).to(device, wide or dtype).requires_grad_()
            for s in (2, 3)
        )
    if mode in ("both", "rotary"):
        angles = (randn(frames, width // 2, seed=4) * 3).repeat_interleave(2, dim=-1)
        cos, sin = (t.to(device, wide or dtype) for t in (angles.cos(), angles.sin()))
    return [qkv.to(device, dtype).requires_grad_(), q_weight, k_weight, cos, sin, 1e-6]


def call(args: list[Any]) -> Tensor:
    qkv, q_weight, k_weight, cos, sin, eps = args
    rotary = None if cos is None else (cos, sin)
    return temporal_attention(qkv, q_weight, k_weight, rotary, eps=eps)


def gradients(y: Tensor, args: list[Any], grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(y, inputs, grad.to(y.device, y.dtype))


def assert_matches(args: list[Any], implementation: Implementation) -> None:
    """Compare value and gradients with float64: those of q and k together, and of both weights."""
    batch, frames, patches, _, heads, width = args[0].shape
    grad = randn(batch, frames, patches, heads * width, seed=6).to(args[0].dtype)
    with implementation.activate():
        y = call(args)
        actual = gradients(y, args, grad)
    working, truth = op.reference(*args), op.reference(*(exact := double(args)))
    assert_as_exact_as(working, y, truth)
    found = (gradients(working, args, grad), actual, gradients(truth, exact, grad))
    assert_as_exact_as(*(dqkv[:, :, :, :2] for dqkv, *_ in found))
    assert_as_exact_as(*(dqkv[:, :, :, 2] for dqkv, *_ in found))
    if len(actual) > 1:
        assert_as_exact_as(*(torch.stack(dweights) for _, *dweights in found))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
@each_implementation
def test_forward_and_backward_match_reference(
    implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    assert_matches(arguments(shape, dtype, "both", implementation.device), implementation)


@pytest.mark.parametrize("shape", LONG, ids=str)
@each_dtype
@each_implementation
def test_more_frames_than_a_tile_match_reference(
    implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    assert_matches(arguments(shape, dtype, "neither", implementation.device), implementation)


@each_dtype
@each_mode
@each_implementation
def test_norm_and_rotation_are_options(
    implementation: Implementation, mode: str, dtype: torch.dtype
) -> None:
    assert_matches(arguments((1, 5, 3, 1, 18), dtype, mode, implementation.device), implementation)


@pytest.mark.parametrize("mode", MODES[:3])
@each_dtype
@each_implementation
def test_norm_and_rotation_are_options_of_blocks_too(
    implementation: Implementation, dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MOST_FRAMES", 16)
    args = arguments((1, 18, 1, 1, 6), dtype, mode, implementation.device)
    # Strided as well: the backward of blocks makes a dense copy.
    every_other = torch.stack((args[0], -args[0]), dim=2).flatten(2, 3)[:, :, ::2]
    args[0] = every_other.detach().requires_grad_()
    assert_matches(args, implementation)


@each_implementation
def test_weights_and_table_may_be_wider(implementation: Implementation) -> None:
    args = arguments((1, 4, 2, 1, 72), TYPES[-1], "both", implementation.device, torch.float32)
    assert_matches(args, implementation)
    with implementation.activate():
        y = call(args)
        _, dq_weight, dk_weight = gradients(y, args, torch.ones(y.shape))
    assert y.dtype == TYPES[-1]
    assert dq_weight.dtype == dk_weight.dtype == torch.float32


@each_implementation
def test_gradients_of_weights_add_up_over_programs(implementation: Implementation) -> None:
    args = arguments((2, 3, 6, 2, 8), device=implementation.device)  # of 8, two of them not full
    assert_matches(args, implementation)


def test_equals_the_attention_module() -> None:
    batch, frames, patches, heads, width = 2, 5, 3, 2, 24
    channels = heads * width
    module = Attention(channels, heads, qk_norm=True)
    module.q_norm.weight.data = randn(width, seed=2)
    module.k_norm.weight.data = randn(width, seed=3)
    table = RotaryEmbedding(width).table(frames)
    x = randn(batch, frames, patches, channels, seed=1)
    expected = module(x.transpose(1, 2).reshape(-1, frames, channels), table)
    qkv = module.qkv(x).unflatten(-1, (3, heads, width))
    y = module.proj(temporal_attention(qkv, module.q_norm.weight, module.k_norm.weight, table))
    expected = expected.view(batch, patches, frames, channels).transpose(1, 2)
    torch.testing.assert_close(y, expected)


@each_mode
def test_reference_backward_equals_autograd(mode: str) -> None:
    args = double(arguments((2, 3, 2, 2, 6), mode=mode))
    grad = randn(2, 3, 2, 12, dtype=torch.float64, seed=6)
    dqkv, *dweights = gradients(op.reference(*args), args, grad)
    mine, both = op.reference_backward(grad, *args)
    torch.testing.assert_close(mine, dqkv)
    if dweights:
        torch.testing.assert_close(both, torch.stack(dweights))
    else:
        assert both.shape == (2, 0)


@each_mode
def test_gradcheck(mode: str) -> None:
    args = double(arguments((1, 3, 2, 2, 4), mode=mode))
    assert torch.autograd.gradcheck(lambda *a: call(list(a)), args)


@each_implementation
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 20),
    patches=st.integers(1, 3),
    heads=st.integers(1, 2),
    pairs=st.integers(1, 20),
    mode=st.sampled_from(MODES),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    batch: int,
    frames: int,
    patches: int,
    heads: int,
    pairs: int,
    mode: str,
) -> None:
    shape = (batch, frames, patches, heads, 2 * pairs)
    assert_matches(arguments(shape, mode=mode, device=implementation.device), implementation)


@each_implementation
def test_a_patch_is_alone(implementation: Implementation) -> None:
    for shape in ((1, 5, 3, 2, 10), (1, 9, 2, 1, 10)):
        args = arguments(shape, device=implementation.device)
        with implementation.activate(), torch.no_grad():
            y = call(args)
            single = [args[0][:, :, 1:2, :, -1:], *args[1:]]
            one = call(single)
        torch.testing.assert_close(one, y[:, :, 1:2, -10:], rtol=0, atol=1e-5)


@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    args = arguments((2, 4, 3, 2, 8), device=implementation.device)
    dense = args[0].detach()
    grad = randn(2, 4, 3, 16, seed=6).transpose(1, 2).contiguous().transpose(1, 2)
    by_patch = dense.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack((dense, -dense), dim=3).flatten(2, 3)[:, :, ::2]
    scattered = torch.stack((dense, -dense), dim=-1).flatten(-2)[..., ::2]
    one_sample = dense[:1].expand(2, 4, 3, 3, 2, 8)
    with implementation.activate():
        for view in (by_patch, every_other, scattered, one_sample):
            strided = [view.detach().requires_grad_(), *args[1:]]
            plain = [view.contiguous().requires_grad_(), *args[1:]]
            y, expected = call(strided), call(plain)
            assert torch.equal(y, expected)
            assert y.is_contiguous()
            for one, other in zip(
                gradients(y, strided, grad), gradients(expected, plain, grad), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@each_implementation
def test_strided_weights_and_table(implementation: Implementation) -> None:
    args = arguments((1, 3, 2, 1, 8), device=implementation.device)
    strided = [args[0], *(randn(16, seed=s)[::2].to(args[0].device) for s in (7, 8))]
    strided += [t.T.contiguous().T for t in args[3:5]] + [1e-6]
    dense = [a.contiguous() if isinstance(a, Tensor) else a for a in strided]
    with implementation.activate(), torch.no_grad():
        assert torch.equal(call(strided), call(dense))


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 2, 8), (2, 0, 5, 2, 8), (2, 3, 0, 2, 8), (1, 70, 0, 2, 8)], ids=str
)
@pytest.mark.parametrize("mode", ["both", "neither"])
@each_implementation
def test_empty_batch(implementation: Implementation, mode: str, shape: tuple[int, ...]) -> None:
    args = arguments(shape, mode=mode, device=implementation.device)
    with implementation.activate():
        y = call(args)
        dqkv, *dweights = gradients(y, args, torch.ones(y.shape))
    assert y.shape == (*shape[:3], 16)
    assert dqkv.shape == args[0].shape
    assert all(torch.equal(t, torch.zeros_like(t)) for t in dweights)


@each_dtype
@each_implementation
def test_extreme_values(implementation: Implementation, dtype: torch.dtype) -> None:
    many = 16  # patches of each kind: of one alone the largest error is luck
    args = arguments((1, 9, 6 * many, 1, 12), dtype, "both", implementation.device)
    qkv = args[0].detach().clone()
    kinds = qkv.unflatten(2, (6, many)).unbind(2)  # views
    kinds[0][:] = 0.0
    kinds[1][..., :2, :, :] *= 1e15
    kinds[2][..., 2, :, :] *= 1e15
    kinds[3][:, 3, :, 0] = torch.nan  # a query: the other frames stay whole
    kinds[4][..., :2, :, :] *= 1e-20
    kinds[5][:, 2, :, 1] *= 100.0
    args[0], args[1] = qkv, args[1] * 20  # one key far above the others
    with implementation.activate(), torch.no_grad():
        y = call(args)
    for kind, of_kind in zip(kinds, y.unflatten(2, (6, many)).unbind(2), strict=True):
        one = [kind, *args[1:]]  # kind by kind: the tolerance follows the largest error
        with torch.no_grad():
            working, truth = op.reference(*one), op.reference(*double(one))
        assert_as_exact_as(working, of_kind, truth)


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments((1, 9, 4, 3, 32), TYPES[-1], "both", implementation.device)
    grad = randn(1, 9, 4, 96, seed=6)
    runs = []
    for _ in range(3):
        with implementation.activate():
            y = call(args)
            runs.append((y, *gradients(y, args, grad)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_opcheck() -> None:
    for mode in ("both", "neither"):
        args = [
            a.detach() if isinstance(a, Tensor) else a
            for a in arguments((2, 3, 2, 2, 8), mode=mode)
        ]
        with through_dispatcher():
            torch.library.opcheck(op._forward.overload, tuple(args))
            torch.library.opcheck(op._backward.overload, (randn(2, 3, 2, 16), *args))


@pytest.mark.parametrize("kernels_mode", ["auto", "require"])
def test_compiles_without_graph_break(kernels_mode: str) -> None:
    args = arguments((2, 3, 2, 2, 8))
    grad = randn(2, 3, 2, 16, seed=6)
    eager = gradients(call(args), args, grad)
    with through_dispatcher(), testing._mode(kernels_mode):
        compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
        y = compiled(*args)
        torch.testing.assert_close(y, call(args))
        torch.testing.assert_close(gradients(y, args, grad), eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 5, 3, 2, 8)}, r"qkv must be float \[B, T, S, 3, H, D\]"),
        ({"qkv": torch.zeros(2, 5, 4, 2, 2, 8)}, "qkv must be float"),
        ({"qkv": torch.zeros(2, 5, 4, 3, 2, 8, dtype=torch.int64)}, "qkv must be float"),
        ({"qkv": torch.zeros(2, 4, 5, 3, 2, 8)}, r"rotary's cos must be \[N, D\] = \[4, 8\]"),
        ({"q_weight": None}, "come together"),
        ({"k_weight": torch.ones(9)}, r"k_weight must be \[D = 8\]"),
        ({"q_weight": torch.ones(8).half()}, "must share a dtype"),
        ({"rotary": (torch.zeros(5, 8), torch.zeros(5, 9))}, "rotary's sin must be"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Any], message: str) -> None:
    good = {
        "qkv": torch.zeros(2, 5, 4, 3, 2, 8),
        "q_weight": torch.ones(8),
        "k_weight": torch.ones(8),
        "rotary": (torch.zeros(5, 8), torch.zeros(5, 8)),
    }
    temporal_attention(**good)
    with pytest.raises(ValueError, match=message):
        temporal_attention(**(good | change))


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, shape in (("both", (2, 3, 3, 1, 24)), ("neither", (1, 65, 1, 1, 16))):
        args = arguments(shape, mode=mode, device=implementation.device)
        results = []
        for wide in (False, True):
            monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
            with implementation.activate():
                y = call(args)
                results.append((y, *gradients(y, args, torch.ones(y.shape))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")


native = torch.ops.opensora.temporal_attention_forward.native


# One pack of frames, few, what keeps keys in float32, what does not, and more queries than lanes.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((1, 1, 3, 16, 72), "both"),
        ((2, 5, 2, 6, 72), "both"),
        ((1, 15, 3, 16, 72), "both"),
        ((2, 16, 2, 3, 64), "norm"),
        ((1, 17, 2, 4, 72), "rotary"),
        ((1, 60, 2, 2, 72), "both"),
        ((1, 97, 1, 2, 64), "neither"),
        ((1, 170, 1, 1, 72), "both"),
        ((1, 256, 1, 1, 64), "both"),
    ],
    ids=str,
)
def test_native_matches_reference(
    native_device: str, shape: tuple[int, ...], mode: str, dtype: torch.dtype
) -> None:
    args = arguments(shape, dtype, mode, native_device)
    if mode in ("both", "rotary") and shape[1] % 2:
        args[3:5] = (t.float() for t in args[3:5])
    if dtype == torch.float32 and shape[1] == 256:
        with pytest.raises(RuntimeError, match="256 frames need"):
            native(*args)
        return
    with torch.no_grad():
        y = native(*args)
    assert_as_exact_as(op.reference(*args).to(dtype), y, op.reference(*double(args)))


def test_native_reads_strides_and_extremes(native_device: str) -> None:
    args = arguments((2, 5, 7, 4, 72), torch.bfloat16, "neither", native_device)
    with torch.no_grad():
        window = args[0][:, 1:4, 2:5]
        y = native(window, *args[1:])
        assert torch.equal(y, native(window.contiguous(), *args[1:]))
        large = args[0].detach() * 100  # one key takes all
        exact = op.reference(*double([large, *args[1:]]))
        assert_as_exact_as(op.reference(large, *args[1:]), native(large, *args[1:]), exact)
        large[0, 1, 0, 1] = float("inf")
        found = native(large, *args[1:])
        assert found[0, :, 0].isnan().all()
        assert found[1].isfinite().all()


def test_native_takes_nothing_it_would_read_wrong(native_device: str) -> None:
    args = arguments((1, 5, 2, 2, 72), torch.bfloat16, "both", native_device, torch.float32)
    wrong = {
        0: [args[0][0], args[0][..., :40].contiguous(), args[0].transpose(-2, -1)],
        1: [None, args[1][:40]],
        3: [None, args[3].bfloat16(), args[3][:2]],
    }
    shifted = torch.empty(args[0].numel() + 1, dtype=torch.bfloat16, device=native_device)[1:]
    wrong[0].append(shifted.view(args[0].shape))
    for i, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match=r"must|come together"):
                native(*args[:i], value, *args[i + 1 :])
    assert native(args[0].detach()[:, :, :0], *args[1:]).shape == (1, 5, 0, 144)
