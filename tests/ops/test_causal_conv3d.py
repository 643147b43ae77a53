"""Test `causal_conv3d`: every implementation against the reference in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opensora import testing
from opensora.functional import causal_conv3d
from opensora.kernels import causal_conv3d as kernels
from opensora.launches import record
from opensora.models.vae.conv import CausalConv3d, Conv2d
from opensora.ops import causal_conv3d as op
from opensora.ops import groupnorm_silu
from opensora.ops._channels_last import channels_last
from opensora.testing import Implementation, assert_as_exact_as, double, randn

Shape = tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int]]
# [B, I, T, H, W], [O, kt, kh, kw], stride. Seen in tiles of 16 pixels, 16 outputs and 16 inputs:
# one tile less a pixel, full, and one more; blocks of channels of which the last is full or not;
# windows wider than the image; both kinds of padding; every axis of the kernel and stride alone.
CASES: list[Shape] = [
    ((1, 5, 3, 4, 5), (7, 3, 3, 3), (1, 1, 1)),
    ((1, 17, 1, 3, 5), (16, 1, 3, 3), (1, 1, 1)),
    ((2, 16, 1, 2, 4), (17, 1, 1, 3), (1, 1, 1)),
    ((1, 48, 1, 1, 17), (33, 1, 1, 1), (1, 1, 1)),
    ((2, 3, 4, 1, 3), (4, 3, 1, 1), (1, 1, 1)),
    ((2, 4, 5, 3, 2), (4, 3, 3, 3), (2, 1, 1)),
    ((1, 4, 6, 1, 3), (18, 3, 1, 3), (2, 1, 1)),
    ((1, 4, 2, 5, 8), (4, 1, 3, 3), (1, 2, 2)),
    ((1, 4, 3, 5, 4), (2, 1, 1, 1), (2, 2, 1)),
    ((1, 1, 1, 1, 1), (1, 3, 3, 3), (1, 1, 1)),
]
IMPLEMENTATIONS = [i for i in testing.implementations() if not i.name.startswith("C++")]
if op._forward.kernel("cpu") == "oneDNN":
    IMPLEMENTATIONS.append(Implementation("oneDNN", "cpu", testing.require))
if os.environ.get("TRITON_INTERPRET") == "1":  # interpreted Triton takes what CUDA would
    op.DTYPES["cpu"] = op.DTYPES["cuda"]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_shape = pytest.mark.parametrize("shape", CASES, ids=str)
Args = list[Any]
ROW = torch.zeros(4)


def use_tiles(monkeypatch: pytest.MonkeyPatch, split: bool) -> None:
    config = kernels.Config(16, 16, split, 16, warps=4, stages=2)
    monkeypatch.setattr(kernels.Config, "heuristic", lambda *_: config)


@pytest.fixture(autouse=True)
def exact_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take TF32, torch's choice for float32 convolutions on CUDA, out of what is compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, False)


def arguments(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", normed: bool = False
) -> Args:
    """Return the op's arguments, bias and residual among them, the norm where asked for."""
    size, (outputs, *kernel), stride = shape
    x = channels_last(randn(*size, dtype=dtype, device=device, seed=1))
    weight = randn(outputs, size[1], *kernel, dtype=dtype, device=device, seed=2)
    bias = randn(outputs, dtype=dtype, device=device, seed=3)
    out = op.output_size(x, weight, list(stride))
    residual = channels_last(randn(*out, dtype=dtype, device=device, seed=4))
    norm = ()
    if normed:
        spread = torch.arange(1.0, size[0] + 1).view(-1, 1, 1, 1, 1)  # samples differ
        x = channels_last((x * spread.to(x) + 3).to(dtype))
        groups = next(g for g in (4, 3, 2, 1) if size[1] % g == 0)
        rows = [randn(size[1], dtype=dtype, device=device, seed=seed) for seed in (5, 6)]
        norm = (statistics(x, groups), *(row.requires_grad_() for row in rows))
    return [*(t.requires_grad_() for t in (x, weight, bias, residual)), norm, stride]


def statistics(x: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """Return mean and 1 / deviation of groups of channels, [B, G, 2]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    variance, mean = torch.var_mean(
        x.detach().to(wide).reshape(x.shape[0], groups, -1), -1, correction=0
    )
    return torch.stack((mean, torch.rsqrt(variance + eps)), dim=-1)


def exact(args: Args) -> Args:
    """Return the arguments in float64, the norm's too."""
    return [tuple(double(a)) if isinstance(a, tuple) else a for a in double(args)]


def call(args: Args) -> Tensor:
    x, weight, bias, residual, norm, stride = args
    return causal_conv3d(x, weight, bias, stride=stride, residual=residual, norm=norm or None)


def gradients(y: Tensor, args: Args, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [t for t in (*args[:4], *args[4]) if isinstance(t, Tensor) and t.requires_grad]
    return torch.autograd.grad(y, inputs, grad.to(y.device, y.dtype))


def assert_matches(args: Args, implementation: Implementation) -> None:
    with implementation.activate(), torch.no_grad():
        y = call(args)
    assert implementation.name == "reference" or channels_last(y) is y
    assert_as_exact_as(op.reference(*args), y, op.reference(*exact(args)))


@pytest.mark.usefixtures("small_tiles")
@each_shape
@each_implementation
def test_forward_matches_reference(implementation: Implementation, shape: Shape) -> None:
    assert_matches(arguments(shape, device=implementation.device), implementation)


@pytest.mark.usefixtures("small_tiles")
@each_shape
@each_implementation
def test_forward_normalises(implementation: Implementation, shape: Shape) -> None:
    assert_matches(arguments(shape, device=implementation.device, normed=True), implementation)


@pytest.mark.parametrize("outputs", [7, 16, 25])
@each_implementation
def test_halves_of_a_block(
    implementation: Implementation, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch, True)
    shape = (2, 18, 1, 3, 5), (outputs, 1, 1, 3), (1, 1, 1)
    for normed in (False, True):
        args = arguments(shape, device=implementation.device, normed=normed)
        assert_matches(args, implementation)


@pytest.mark.parametrize(
    "shape",
    [
        ((1, 33, 1, 5, 13), (65, 1, 1, 3), (1, 1, 1)),
        ((1, 64, 2, 4, 8), (64, 3, 1, 1), (1, 1, 1)),
        ((1, 8, 1, 1, 63), (8, 1, 1, 1), (1, 1, 1)),
    ],
    ids=str,
)
@each_implementation
def test_tiles_of_the_models(implementation: Implementation, shape: Shape) -> None:
    assert_matches(arguments(shape, device=implementation.device), implementation)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-bit products need tensor cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        *CASES,
        ((1, 256, 3, 9, 15), (256, 3, 3, 3), (1, 1, 1)),
        ((2, 128, 5, 7, 9), (384, 3, 3, 3), (2, 1, 1)),
        ((1, 96, 2, 10, 13), (3, 3, 3, 3), (1, 1, 1)),
    ],
    ids=str,
)
def test_16_bit_products_match_reference(shape: Shape, dtype: torch.dtype, normed: bool) -> None:
    (implementation,) = (i for i in IMPLEMENTATIONS if i.name == "Triton")
    assert_matches(arguments(shape, dtype, "cuda", normed), implementation)


@pytest.mark.skipif(op._forward.kernel("cpu") != "oneDNN", reason="interpreted, or no oneDNN")
@pytest.mark.parametrize("normed", [False, True])
@each_shape
def test_bfloat16_on_a_cpu_matches_reference(shape: Shape, normed: bool) -> None:
    implementation = next(i for i in IMPLEMENTATIONS if i.name == "oneDNN")
    assert_matches(arguments(shape, torch.bfloat16, "cpu", normed), implementation)


def test_a_time_axis_is_padded_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    if op._forward.kernel("cpu") != "oneDNN":
        pytest.skip("interpreted, or no oneDNN")
    monkeypatch.setattr(op.F, "pad", lambda *_: pytest.fail("made a padded copy"))
    for shape in CASES[:7]:
        with torch.no_grad(), testing.require():
            call(arguments(shape))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("given", ["bias", "residual", "neither"])
@each_implementation
def test_bias_and_residual_can_be_left_out(implementation: Implementation, given: str) -> None:
    args = arguments(((1, 4, 2, 3, 3), (5, 1, 1, 3), (1, 1, 1)), device=implementation.device)
    args[2], args[3] = (
        args[i] if given == name else None for i, name in ((2, "bias"), (3, "residual"))
    )
    assert_matches(args, implementation)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", [CASES[2], CASES[5], CASES[7]], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@each_implementation
def test_backward_matches_reference(
    implementation: Implementation, normed: bool, shape: Shape
) -> None:
    args = arguments(shape, device=implementation.device, normed=normed)
    for t in args[4][:1]:
        t.requires_grad_()
    with implementation.activate():
        y = call(args)
        grad = randn(*y.shape, seed=7)
        actual = gradients(y, args, grad)
    true = exact(args)
    truth = gradients(op.reference(*true), true, grad)
    assert len(actual) == (7 if normed else 4)
    for one, other in zip(actual, truth, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


@each_shape
def test_reference_backward_equals_autograd(shape: Shape) -> None:
    args = exact(arguments(shape))
    y = op.reference(*args)
    grad = randn(*y.shape, dtype=torch.float64, seed=7)
    *expected, dresidual = gradients(y, args, grad)
    x, weight = args[:2]
    for one, other in zip(op.reference_backward(grad, x, weight, shape[2]), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(dresidual, grad)


def test_gradients_that_nobody_asks_for_are_left_out() -> None:
    args = arguments(CASES[5])
    y = op.reference(*args).detach()
    found = op.reference_backward(y, *args[:2], args[5], (False, True, False))
    assert [one is None for one in found] == [True, False, True]


@pytest.mark.parametrize("shape", [CASES[4], CASES[5], CASES[7]], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_gradcheck(normed: bool, shape: Shape) -> None:
    args = exact(arguments(shape, normed=normed))
    assert torch.autograd.gradcheck(
        lambda *tensors: call([*tensors[:4], tensors[4:], shape[2]]),
        (*args[:4], *args[4]),
        fast_mode=True,
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_norm_is_what_the_vaes_compute(groups: int) -> None:
    x, weight, bias, residual, _, stride = exact(arguments(CASES[5]))
    group_norm = torch.nn.GroupNorm(groups, 4, eps=1e-6, dtype=torch.float64)
    torch.nn.init.normal_(group_norm.weight)
    torch.nn.init.normal_(group_norm.bias)
    norm = (statistics(x, groups), group_norm.weight, group_norm.bias)
    normed = torch.nn.functional.silu(group_norm(x))
    torch.testing.assert_close(
        op.reference(x, weight, bias, residual, norm, stride),
        op.reference(normed, weight, bias, residual, (), stride),
    )


@pytest.mark.usefixtures("small_tiles")
@each_implementation
def test_norm_takes_the_statistics_of_groupnorm_silu(implementation: Implementation) -> None:
    if implementation.name == "reference":
        pytest.skip("statistics are an output of the kernel alone")
    args = arguments(((2, 8, 2, 3, 5), (4, 1, 1, 1), (1, 1, 1)), device=implementation.device)
    x, rows = args[0].detach(), [randn(8, device=implementation.device, seed=i) for i in (5, 6)]
    with implementation.activate(), torch.no_grad():
        normed, mean_rstd = groupnorm_silu._forward(x, *rows, 4, 1e-6, True)
        y, expected = call([x, *args[1:4], (mean_rstd, *rows), args[5]]), call([normed, *args[1:]])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), ((3, 3, 3), 2), ((1, 3, 3), 1)])
def test_reference_is_what_the_temporal_vae_computes(kernel: Any, stride: int) -> None:
    module = CausalConv3d(4, 6, kernel, strides=(stride, 1, 1))
    x = randn(2, 4, 6, 5, 7)
    conv = module.conv
    with testing.reference():
        own = module(x)
    y = op.reference(x, conv.weight, conv.bias, None, (), [stride, 1, 1])
    assert torch.equal(y, own)
    assert torch.equal(op.reference(x, conv.weight, conv.bias, y, (), [stride, 1, 1]), y + own)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("case", [1, 2, 3, 7], ids=lambda i: str(CASES[i]))
@each_implementation
def test_an_image_is_a_video_of_one_frame(
    implementation: Implementation, case: int, normed: bool
) -> None:
    (batch, inputs, _, height, width), (outputs, _, kh, kw), (_, sh, sw) = CASES[case]
    video = (batch, inputs, 1, height, width), (outputs, 1, kh, kw), (1, sh, sw)
    args = arguments(video, device=implementation.device, normed=normed)
    image = [
        a.detach().squeeze(2).requires_grad_() if isinstance(a, Tensor) and a.dim() == 5 else a
        for a in args
    ]
    image[-1] = (sh, sw)
    with implementation.activate():
        y, expected = call(image), call(args)
        grad = randn(*y.shape, seed=7)
        found, wanted = gradients(y, image, grad), gradients(expected, args, grad.unsqueeze(2))
    assert implementation.name == "reference" or channels_last(y) is y
    torch.testing.assert_close(y, expected.squeeze(2))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-4, atol=1e-4)
    dx, dweight, dbias = op.reference_backward(
        grad.to(y), normalised(image), image[1], list(image[-1])
    )
    if not normed:
        torch.testing.assert_close(dx, found[0], rtol=1e-4, atol=1e-4)
    for one, other in zip((dweight, dbias), found[1:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def normalised(args: Args) -> Tensor:
    return op.normalise(args[0], *args[4]) if args[4] else args[0]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", [(6, 9), (5, 8)])
@each_implementation
def test_images_are_convolved_as_by_the_library(
    implementation: Implementation, size: tuple[int, int]
) -> None:
    x, residual = (randn(2, 4, *size, device=implementation.device, seed=i) for i in (1, 2))
    pad = torch.nn.functional.pad
    for kernel, stride, padding in ((3, 1, 1), (1, 1, 0), (3, 2, 0)):
        conv = Conv2d(4, 4, kernel, stride=stride).to(implementation.device)
        library = torch.nn.Conv2d(4, 4, kernel, stride, padding).to(implementation.device)
        library.load_state_dict(conv.state_dict())
        with implementation.activate(), torch.no_grad():
            y = conv(x)
            torch.testing.assert_close(y, library(x if stride == 1 else pad(x, (0, 1, 0, 1))))
            if stride == 1:
                torch.testing.assert_close(conv(x, residual), y + residual)


def test_weights_keep_the_order_of_memory_that_kernels_read() -> None:
    for module in (Conv2d(4, 6, 3), CausalConv3d(4, 6, 3)):
        dense = {name: t.contiguous() for name, t in module.state_dict().items()}
        module.load_state_dict(dense)
        (weight,) = (t for t in module.parameters() if t.dim() > 1)
        assert channels_last(weight) is weight
        assert not weight.is_contiguous()


@pytest.mark.usefixtures("small_tiles")
@each_implementation
@given(
    size=st.tuples(*[st.integers(1, 5)] * 4),
    channels=st.tuples(st.integers(1, 40), st.integers(8, 40)),  # few results: errors are luck
    kernel=st.tuples(*[st.sampled_from((1, 3))] * 3),
    stride=st.tuples(*[st.sampled_from((1, 2))] * 3),
    normed=st.booleans(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    size: tuple[int, ...],
    channels: tuple[int, int],
    kernel: tuple[int, ...],
    stride: tuple[int, int, int],
    normed: bool,
) -> None:
    batch, *pixels = size
    # At stride 2 a kernel of 3 needs two pixels.
    pixels = [max(n, min(k, s)) for n, k, s in zip(pixels, kernel, stride, strict=True)]
    shape = (batch, channels[0], *pixels), (channels[1], *kernel), stride
    args = arguments(shape, device=implementation.device, normed=normed)
    assert_matches(args, implementation)


@each_implementation
def test_a_frame_depends_on_itself_and_earlier_ones(implementation: Implementation) -> None:
    x, weight, *_ = arguments(((1, 3, 5, 2, 2), (3, 3, 3, 3), (1, 1, 1)))
    x, weight = (t.detach().to(implementation.device) for t in (x, weight))
    with implementation.activate():
        before = causal_conv3d(x, weight)
        x[:, :, 3] += 1
        changed = (causal_conv3d(x, weight) != before).flatten(3).any(3)
    assert torch.equal(changed.all(1)[0].cpu(), torch.tensor([False, False, False, True, True]))
    assert not changed[:, :, :3].any()


@pytest.mark.usefixtures("small_tiles")
@each_implementation
def test_values_outside_the_window_do_not_leak(implementation: Implementation) -> None:
    # The neighbour in memory of a row's last pixel is the next row's first one, and so on; zero
    # padding is a mask and no product, so NaN shows where a window reaches too far.
    args = arguments(((2, 3, 3, 4, 3), (4, 3, 3, 3), (1, 1, 1)), device=implementation.device)
    for places in ([(0, 0, 2, 1, 2), (1, 0, 0, 0, 0)], [(0, 1, 0, 3, 0), (0, 2, 2, 3, 2)]):
        x = args[0].detach().clone()
        for place in places:
            x[place] = torch.nan
        with implementation.activate(), torch.no_grad():
            y = call([x, *args[1:]])
        assert torch.equal(y.isnan(), op.reference(x, *args[1:]).isnan())


@pytest.mark.usefixtures("small_tiles")
@each_implementation
def test_strided_input(implementation: Implementation) -> None:
    shape: Shape = ((2, 4, 3, 3, 5), (4, 1, 1, 3), (1, 1, 1))
    args = arguments(shape, device=implementation.device, normed=True)
    wide = torch.zeros(2, 4, 3, 3, 10, device=implementation.device)
    wide[..., ::2] = args[0].detach()
    strided = [
        wide[..., ::2].requires_grad_(),
        args[1].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        torch.stack((args[2].detach(),) * 2, dim=1)[:, 0].requires_grad_(),
        args[3].detach().contiguous().requires_grad_(),
        tuple(torch.stack((t.detach(), t.detach()), dim=-1)[..., 0] for t in args[4]),
        args[5],
    ]
    args[4] = tuple(t.detach() for t in args[4])
    grad = randn(2, 4, 3, 5, 3, seed=7).transpose(3, 4)
    with implementation.activate():
        y, expected = call(strided), call(args)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
        mine, theirs = gradients(y, strided, grad), gradients(expected, args, grad.contiguous())
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with implementation.activate(), torch.no_grad():
        torch.testing.assert_close(call(strided), expected, rtol=0, atol=1e-5)


@each_implementation
def test_empty_batch(implementation: Implementation) -> None:
    args = arguments(((0, 4, 3, 3, 5), (6, 3, 3, 3), (2, 1, 1)), device=implementation.device)
    with implementation.activate():
        y = call(args)
        dx, dweight, dbias, _ = gradients(y, args, torch.zeros(y.shape))
    assert y.shape == (0, 6, 1, 3, 5)
    assert dx.shape == (0, 4, 3, 3, 5)
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.usefixtures("small_tiles")
@each_implementation
def test_extreme_values(implementation: Implementation) -> None:
    for scale in (1e15, 1e-20):
        args = arguments(((1, 4, 1, 3, 5), (4, 1, 3, 3), (1, 1, 1)), device=implementation.device)
        args = [a.detach() * scale if isinstance(a, Tensor) else a for a in args]
        args[1] = args[1] / scale
        assert_matches(args, implementation)


@pytest.mark.usefixtures("small_tiles")
@each_implementation
def test_norm_of_extreme_values(implementation: Implementation) -> None:
    shape: Shape = ((2, 4, 1, 3, 5), (4, 1, 3, 3), (1, 1, 1))
    args = arguments(shape, device=implementation.device, normed=True)
    x = args[0].detach()
    x[0] = x[0] * 1e-3 + 300  # a mean far above the spread
    x[1, 0, 0, 0, 0] = 1e4  # far outside; its neighbours lie near the mean
    args = [x, *args[1:4], (statistics(x, 2), args[4][1] * 100, args[4][2]), args[5]]
    with implementation.activate(), torch.no_grad():
        y = call(args)
    truth, working = op.reference(*exact(args)), op.reference(*args)
    for i in range(2):  # sample by sample: the tolerance follows the largest error
        assert_as_exact_as(working[i], y[i], truth[i])


@pytest.mark.usefixtures("small_tiles")
@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    for normed in (False, True):
        args = arguments(CASES[0], device=implementation.device, normed=normed)
        with implementation.activate(), torch.no_grad():
            assert torch.equal(call(args), call(args))


@pytest.mark.usefixtures("small_tiles")
@each_implementation
def test_a_sample_does_not_depend_on_the_others(implementation: Implementation) -> None:
    for normed in (False, True):
        args = arguments(CASES[2], device=implementation.device, normed=normed)
        norm = tuple(t[1:] if t.dim() == 3 else t for t in args[4])
        alone = [args[0][1:], *args[1:3], args[3][1:], norm, args[5]]
        with implementation.activate(), torch.no_grad():
            torch.testing.assert_close(call(args)[1:], call(alone), rtol=1e-5, atol=1e-5)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the launcher, interpreted in this process, as kernel of the CPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    library = torch.library.Library("opensora", "FRAGMENT")
    library.impl(op._forward.name, op._forward.launcher, "CPU")
    monkeypatch.setitem(op._forward._kernels, "cpu", "Triton")
    yield
    library._destroy()


@pytest.mark.usefixtures("on_cpu", "small_tiles")
@each_implementation
def test_opcheck(implementation: Implementation) -> None:
    if implementation.name == "reference":
        pytest.skip("the CPU has no kernel of this op; interpreted Triton stands in for one")
    for normed in (False, True):
        shape: Shape = ((1, 4, 3, 2, 3), (4, 3, 1, 1), (2, 1, 1))
        x, weight, bias, residual, norm, _ = arguments(shape, torch.float32, "cpu", normed)
        tensors = [t.detach().to(implementation.device) for t in (x, weight, bias, residual, *norm)]
        args = (*tensors[:4], tensors[4:], [2, 1, 1])
        torch.library.opcheck(op._forward.overload, args)


@pytest.mark.usefixtures("on_cpu", "small_tiles")
@each_implementation
def test_compiles_without_graph_break(implementation: Implementation) -> None:
    shape: Shape = ((1, 4, 3, 2, 3), (4, 3, 1, 1), (2, 1, 1))
    args = arguments(shape, device=implementation.device, normed=True)
    with testing._mode("auto" if implementation.name == "reference" else "require"):
        eager = call(args)
        grad = randn(*eager.shape, seed=7)
        compiled = torch.compile(lambda *a: call(list(a)), fullgraph=True, backend="aot_eager")
        y = compiled(*args)
        torch.testing.assert_close(y, eager)
        expected = gradients(eager, args, grad)
        torch.testing.assert_close(gradients(y, args, grad), expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), eager)


def test_a_required_kernel_that_cannot_run_raises() -> None:
    args = exact(arguments(CASES[0]))
    assert call(args).dtype == torch.float64
    with testing.require(), pytest.raises(NotImplementedError, match="float64 on 'cpu'"):
        call(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, r"x must be float \[B, I, T, H, W\] or \[B, I, H, W\]"),
        ({"x": torch.zeros(2, 4, 3, 3)}, r"weight must be \[O, I = 4, kh, kw\]"),
        ({"x": torch.zeros(2, 4, 4, 3, 3).int()}, "x must be float"),
        ({"weight": torch.zeros(6, 5, 3, 3, 3)}, r"weight must be \[O, I = 4, kt, kh, kw\]"),
        ({"weight": torch.zeros(6, 4, 3, 5, 3)}, "kernels of 1 or 3, got .*3, 5, 3"),
        ({"weight": torch.zeros(6, 4, 3, 3)}, "weight must be"),
        ({"weight": torch.zeros(6, 4, 3, 3, 3).bfloat16()}, "weight must be torch.float32"),
        ({"stride": (3, 1, 1)}, "stride must be .* each 1 or 2, got"),
        ({"stride": (1, 1)}, "stride must be"),
        ({"x": torch.zeros(2, 4, 1, 3, 3)}, "too few frames or pixels for kernel .* and stride"),
        ({"bias": torch.zeros(4)}, r"bias must be torch.float32 \[6\] on cpu"),
        ({"residual": torch.zeros(2, 6, 4, 3, 3)}, r"residual must be .* \[2, 6, 2, 3, 3\] on cpu"),
        ({"bias": torch.zeros(6, device="meta")}, "bias must be .* got .* on meta"),
        ({"norm": (torch.zeros(2, 3, 2), ROW, ROW)}, "mean_rstd must be .* divides I = 4, got"),
        ({"norm": (torch.zeros(2, 4), ROW, ROW)}, r"mean_rstd must be \[B, G, 2\]"),
        (
            {"norm": (torch.zeros(1, 2, 2), ROW, ROW)},
            r"mean_rstd must be torch.float32 \[2, 2, 2\]",
        ),
        ({"norm": (torch.zeros(2, 2, 2).half(), ROW, ROW)}, "mean_rstd must be torch.float32"),
        ({"norm": (torch.zeros(2, 2, 2), ROW[:3], ROW)}, r"norm's weight must be .* \[4\] on cpu"),
        ({"norm": (torch.zeros(2, 2, 2), ROW, ROW.half())}, "norm's bias must be torch.float32"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Any], message: str) -> None:
    good = {
        "x": torch.zeros(2, 4, 4, 3, 3),
        "weight": torch.zeros(6, 4, 3, 3, 3),
        "bias": torch.zeros(6),
        "stride": (2, 1, 1),
        "residual": torch.zeros(2, 6, 2, 3, 3),
        "norm": (torch.zeros(2, 2, 2), ROW, ROW),
    }
    causal_conv3d(**good)
    with pytest.raises(ValueError, match=message):
        causal_conv3d(**(good | change))


@pytest.mark.usefixtures("small_tiles")
@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    shape: Shape = ((2, 4, 3, 3, 4), (5, 3, 3, 1), (2, 1, 1))
    for normed in (False, True):
        args = arguments(shape, device=implementation.device, normed=normed)
        results = []
        for wide in (False, True):
            monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
            with implementation.activate(), torch.no_grad():
                results.append(call(args))
        assert torch.equal(*results)


@pytest.mark.parametrize(
    ("size", "kernel", "expected"),
    [
        ((1, 128, 2, 720, 1280), (128, 3, 3, 3), False),
        ((1, 128, 34, 720, 1280), (128, 3, 3, 3), True),
        ((1, 64, 1, 4096, 4096), (64, 1, 3, 3), False),
        ((1, 64, 1, 4096, 4096), (64, 3, 3, 3), True),  # the window begins 2^31 before its frame
        ((1, 1, 1, 1, 2**31 - 200), (1, 1, 1, 1), False),
        ((1, 1, 1, 1, 2**31 - 100), (1, 1, 1, 1), True),  # the last tile ends beyond 2^31
    ],
    ids=str,
)
def test_int64_offsets_are_asked_for(
    size: tuple[int, ...], kernel: tuple[int, ...], expected: bool
) -> None:
    meta: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    x = channels_last(torch.empty(size, **meta))
    outputs, *taps = kernel
    weight = channels_last(torch.empty(outputs, size[1], *taps, **meta))
    (launch,) = record(lambda: kernels.forward(x, weight, None, None, [], [1, 1, 1]))
    assert launch.constants["INT64"] is expected
    assert launch.grid == (-(-torch.Size(size[2:]).numel() // 128),)


def test_padding_takes_no_memory() -> None:
    # The launcher allocates the result alone, with or without a norm.
    x = channels_last(torch.empty(1, 32, 5, 16, 16, device="meta"))
    weight = channels_last(torch.empty(32, 32, 3, 3, 3, device="meta"))
    allocated: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            allocated.append(out.shape)
            return out

    row = torch.empty(32, device="meta")
    for norm in ([], [torch.empty(1, 4, 2, device="meta"), row, row]):
        allocated.clear()
        with Watch():
            record(lambda norm=norm: kernels.forward(x, weight, None, None, norm, [1, 1, 1]))
        assert allocated == [torch.Size([1, 32, 5, 16, 16])]


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")


native = torch.ops.opensora.causal_conv3d_forward.native
native_with_statistics = torch.ops.opensora.causal_conv3d_with_statistics
# Pixels left over in every direction, channels left over, more blocks of channels than one; each
# axis of the kernel alone; an image.
NATIVE_CASES: list[Shape] = [
    ((1, 32, 2, 9, 17), (128, 3, 3, 3), (1, 1, 1)),
    ((2, 64, 3, 5, 6), (136, 3, 3, 3), (1, 1, 1)),
    ((1, 32, 1, 17, 34), (32, 1, 3, 3), (1, 1, 1)),
    ((1, 96, 2, 3, 3), (64, 1, 1, 1), (1, 1, 1)),
    ((2, 32, 5, 8, 16), (264, 3, 1, 1), (1, 1, 1)),
    ((1, 32, 1, 1, 20), (8, 1, 1, 3), (1, 1, 1)),
]


def native_arguments(shape: Shape, dtype: torch.dtype, device: str, normed: bool) -> Args:
    args = [*arguments(shape, dtype, device, normed)]
    args[1] = channels_last(args[1])
    args[:5] = [[t.detach() for t in a] if isinstance(a, tuple) else a.detach() for a in args[:5]]
    return args


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", NATIVE_CASES, ids=str)
def test_native_matches_reference(
    native_device: str, shape: Shape, normed: bool, dtype: torch.dtype
) -> None:
    args = native_arguments(shape, dtype, native_device, normed)
    if not normed:
        args[2:4] = None, None
    y = native(*args)
    assert channels_last(y) is y
    true = [[t.double() for t in a] if isinstance(a, list) and a and i == 4 else a
            for i, a in enumerate(double(args))]  # fmt: skip
    assert_as_exact_as(op.reference(*args), y, op.reference(*true))
    groups = args[1].shape[0] // 8
    again, found = native_with_statistics(*args, groups, 1e-6)
    assert torch.equal(again, y)
    truth = statistics(y.double(), groups)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)


def test_native_statistics_keep_a_large_mean(native_device: str) -> None:
    args = native_arguments(NATIVE_CASES[0], torch.bfloat16, native_device, False)
    args[2] = torch.full_like(args[2], 1000.0)  # bfloat16 holds steps of 4 there
    y, found = native_with_statistics(*args, 16, 1e-6)
    truth = statistics(y.double(), 16)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)


def test_native_takes_nothing_it_would_read_wrong(native_device: str) -> None:
    args = native_arguments(NATIVE_CASES[1], torch.bfloat16, native_device, True)
    x, weight, bias, residual, norm, _ = args
    wrong = {
        0: [x.float(), x.contiguous(), x[:, :, 0], x[:, :24]],
        1: [weight.half(), weight.contiguous(), weight[:, :, :2]],
        2: [bias[:8], bias.float()],
        3: [residual.contiguous(), residual[:, :8]],
        4: [norm[:2], [norm[0].double(), *norm[1:]], [norm[0][:1], *norm[1:]]],
        5: [[1, 2, 2]],
    }
    for i, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match="must"):
                native(*args[:i], value, *args[i + 1 :])
    with pytest.raises(RuntimeError, match="multiple of 4 channels"):
        native_with_statistics(*args, 68, 1e-6)
