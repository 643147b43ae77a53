"""Test `cfg_rflow_step`: every implementation against the reference, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opensora import launches, testing
from opensora.functional import cfg_rflow_step
from opensora.kernels import cfg_rflow_step as kernels
from opensora.ops import cfg_rflow_step as op
from opensora.testing import Implementation, double, randn

# One pixel; a block of 1024 less one, full, and one more; several blocks of several samples.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 11, 1, 31), (1, 4, 4, 8, 8), (1, 1, 25, 41, 1), (3, 4, 5, 6, 20)]
IMPLEMENTATIONS = testing.implementations()
if IMPLEMENTATIONS[0].name == "Triton interpreted":  # which takes what CUDA would
    op.DTYPES["cpu"], op.VELOCITIES["cpu"] = op.DTYPES["cuda"], op.VELOCITIES["cuda"]


# Schema and fake are tested on the C++ kernel, or on the reference without a compiler.
through_dispatcher = (
    testing.require
    if op._forward.kernel("cpu") == "C++"
    else partial(testing.dispatched, op._forward)
)
VELOCITIES = op.VELOCITIES["cuda"]
GUIDANCES = [None, "number", "tensor"]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", VELOCITIES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_guidance = pytest.mark.parametrize("guidance", GUIDANCES)


def arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    guidance: str | None = "number",
    masked: bool = True,
    device: str = "cpu",
    extra: int = 2,
) -> dict[str, Any]:
    """Return the op's arguments; the velocity has `extra` channels more than z."""
    batch, channels, frames, *size = shape
    rows = batch if guidance is None else 2 * batch
    velocity = randn(rows, channels + extra, frames, *size, dtype=dtype, seed=2)
    each = randn(batch, device=device, seed=4)
    mask = randn(batch, frames, device=device, seed=5) > 0
    return {
        "z": randn(*shape, device=device, seed=1),
        "velocity": velocity.to(device),
        "guidance": {None: None, "number": 7.3, "tensor": each * 3 + 5}[guidance],
        "dt": randn(batch, device=device, seed=3).abs() / 30,
        "mask": mask if masked else None,
    }


def same(actual: Tensor, args: dict[str, Any], copies: int = 1) -> None:
    """Check a result against the reference, every bit but the signs of zeros; NaN equals NaN."""
    expected = op.reference(**args, copies=copies)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@each_shape
@each_dtype
@each_implementation
def test_forward_matches_reference(
    implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    for guidance in GUIDANCES:
        for masked in (False, True):
            args = arguments(shape, dtype, guidance, masked, implementation.device)
            with implementation.activate():
                same(cfg_rflow_step(**args), args)


def test_reference_is_the_formula() -> None:
    args = arguments((3, 4, 5, 6, 20), guidance="tensor")
    z, velocity, guidance, dt, mask = double(args.values())
    expected = z.clone()
    for b in range(3):
        cond, uncond = velocity[b, :4], velocity[3 + b, :4]
        moved = z[b] + dt[b] * ((1 - guidance[b]) * uncond + guidance[b] * cond)
        expected[b][:, mask[b]] = moved[:, mask[b]]
    torch.testing.assert_close(cfg_rflow_step(**args).double(), expected, rtol=0, atol=2e-5)
    wide = dict(zip(args, double(args.values()), strict=True))
    torch.testing.assert_close(cfg_rflow_step(**wide), expected)


@pytest.mark.parametrize("pixels", [1, 200])
@each_implementation
def test_every_product_is_rounded_before_it_is_added(
    implementation: Implementation, pixels: int
) -> None:
    # (1 + e)^2 = 1 + 2e + e^2 loses e^2 when it is rounded; a fused operation keeps it.
    e = 2.0**-12
    value = torch.full((1, 1, 1, 1, pixels), 1 + e, device=implementation.device)
    dt = torch.full((1,), 1 + e, device=implementation.device)
    with implementation.activate():
        stepped = cfg_rflow_step(-value * value, value, None, dt)
        uncond = -value * value
        velocity, still = torch.cat([value + uncond, uncond]), {"dt": dt * 0 + 1, "mask": None}
        guided = cfg_rflow_step(value * 0, velocity, 1 + e, **still)
    assert not stepped.any()
    same(guided, {"z": value * 0, "velocity": velocity, "guidance": 1 + e, **still})


@pytest.mark.parametrize("capability", launches.CAPABILITIES)
def test_compiled_kernels_do_not_fuse_products_into_sums(capability: int) -> None:
    args = arguments((1, 1, 2, 16, 16), device="meta")
    (launch,) = launches.record(
        lambda: kernels.forward(args["z"], args["velocity"], None, 7.3, args["dt"], None, 1)
    )
    source = ASTSource(launch.kernel, launch.signature, constexprs=launch.constants)
    with mock.patch.object(triton.compiler.compiler, "driver", mock.MagicMock()):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    fused = [line for line in compiled.asm["ptx"].splitlines() if "fma.rn" in line]
    assert len(fused) == 2 * 1024 // 128  # two products of each element of a thread
    assert all(line.endswith(", 0f00000000;") for line in fused), fused


@each_implementation
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    frames=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 40),
    extra=st.integers(0, 3),
    guidance=st.sampled_from([None, "number", "tensor"]),
    dtype=st.sampled_from(VELOCITIES),
    copies=st.integers(1, 2),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_shape(
    implementation: Implementation,
    batch: int,
    channels: int,
    frames: int,
    height: int,
    width: int,
    extra: int,
    guidance: str | None,
    dtype: torch.dtype,
    copies: int,
) -> None:
    shape = (batch, channels, frames, height, width)
    args = arguments(shape, dtype, guidance, True, implementation.device, extra)
    with implementation.activate():
        same(cfg_rflow_step(**args, copies=copies), args, copies)


@pytest.mark.parametrize("copies", [1, 2, 3])
@each_implementation
def test_copies_follow_one_another(implementation: Implementation, copies: int) -> None:
    args = arguments((2, 3, 2, 5, 40), device=implementation.device)
    with implementation.activate():
        y = cfg_rflow_step(**args, copies=copies)
        one = cfg_rflow_step(**args)
    assert y.shape == (2 * copies, 3, 2, 5, 40)
    assert y.is_contiguous()
    assert all(torch.equal(part, one) for part in y.chunk(copies))


@each_implementation
def test_frames_outside_the_mask_keep_every_bit(implementation: Implementation) -> None:
    args = arguments((2, 2, 4, 3, 7), device=implementation.device)
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    args["mask"] = mask.to(implementation.device)
    still = ~args["mask"]
    args["velocity"].view(2, 2, 4, 4, 3, 7).transpose(2, 3)[:, still] = torch.nan
    args["z"][:, :, 1] = -0.0
    with implementation.activate():
        y = cfg_rflow_step(**args)
    bits = [t.transpose(1, 2)[still].view(torch.int32) for t in (y, args["z"])]
    assert torch.equal(*bits)
    moved = y.transpose(1, 2)[args["mask"]]
    assert not moved.isnan().any()
    assert (moved != args["z"].transpose(1, 2)[args["mask"]]).all()


@pytest.mark.parametrize("masked", [False, True])
@each_implementation
def test_strided_input(implementation: Implementation, masked: bool) -> None:
    args = arguments((2, 3, 4, 6, 11), torch.bfloat16, "tensor", masked, implementation.device)
    velocity, z = args["velocity"], args["z"]
    rows = velocity.shape[0]
    wide = torch.full((rows, 6, 5, 7, 12), torch.nan, dtype=velocity.dtype, device=velocity.device)
    wide[:, 1:, :4, :6, :11] = velocity  # rows and frames that were cropped
    layouts = {
        "cropped": wide[:, 1:, :4, :6, :11],
        "channels last": velocity.contiguous(memory_format=torch.channels_last_3d),
        "transposed": velocity.transpose(2, 4).contiguous().transpose(2, 4),
        "one for all": velocity[:1].expand_as(velocity),
    }
    z = z.transpose(1, 3).contiguous().transpose(1, 3)
    changes: dict[str, Any] = {"z": z, "dt": args["dt"][:1].expand(2)}
    if masked:
        changes["mask"] = args["mask"].T.contiguous().T
    for velocity in layouts.values():
        strided = args | changes | {"velocity": velocity}
        with implementation.activate():
            same(cfg_rflow_step(**strided), strided)


@each_guidance
@each_implementation
def test_empty_batch(implementation: Implementation, guidance: str | None) -> None:
    for shape in ((0, 4, 2, 3, 3), (2, 4, 0, 3, 3), (2, 0, 2, 3, 3)):
        check_empty(implementation, guidance, shape)


def check_empty(
    implementation: Implementation, guidance: str | None, shape: tuple[int, ...]
) -> None:
    args = arguments(shape, torch.float32, guidance, True, implementation.device)
    with implementation.activate():
        y = cfg_rflow_step(**args, copies=2)
    assert y.shape == (2 * shape[0], *shape[1:])


@each_dtype
@each_implementation
def test_extreme_values(implementation: Implementation, dtype: torch.dtype) -> None:
    args = arguments((1, 1, 2, 5, 8), dtype, "number", False, implementation.device, extra=0)
    limits = torch.finfo(dtype)
    # The interpreter widens subnormal bfloat16 wrongly.
    small = limits.tiny if dtype == torch.bfloat16 else limits.tiny / 4
    odd = [limits.max, -limits.max, limits.tiny, small, 0.0, torch.inf, torch.nan, -1.0]
    args["velocity"][0, 0, 0] = torch.tensor(odd, dtype=dtype)
    args["velocity"][1, 0, 0] = torch.tensor(odd[::-1], dtype=dtype)
    args["z"][0, 0, 0, 1] = 3e38
    args["z"][0, 0, 0, 2] = 1e-40
    with implementation.activate():
        same(cfg_rflow_step(**args), args)


@each_implementation
def test_results_are_deterministic(implementation: Implementation) -> None:
    args = arguments((2, 4, 3, 6, 40), torch.bfloat16, "tensor", True, implementation.device)
    with implementation.activate():
        first, *others = (cfg_rflow_step(**args, copies=2) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


@each_implementation
def test_inputs_stay_unchanged(implementation: Implementation) -> None:
    args = arguments((2, 2, 3, 4, 5), device=implementation.device)
    before = {name: a.clone() for name, a in args.items() if isinstance(a, Tensor)}
    with implementation.activate():
        cfg_rflow_step(**args)
    assert all(torch.equal(args[name], value) for name, value in before.items())


@each_implementation
def test_other_dtypes_are_cast_to_that_of_z(implementation: Implementation) -> None:
    args = arguments((2, 2, 3, 4, 5), guidance="tensor", device=implementation.device)
    wide = dict(zip(args, double(args.values()), strict=True)) | {"z": args["z"]}
    with implementation.activate():
        assert torch.equal(cfg_rflow_step(**wide), cfg_rflow_step(**args))


def test_gradients_come_from_the_reference() -> None:
    args = arguments((2, 2, 3, 1, 2), guidance="tensor")
    *inputs, mask = double(args.values())
    for value in inputs:
        value.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: cfg_rflow_step(*a, mask=mask, copies=2), inputs)
    args["velocity"].requires_grad_()
    with testing.require():
        with pytest.raises(NotImplementedError, match="none has gradients"):
            cfg_rflow_step(**args)
        args["z"] = args["z"].double()
        with torch.no_grad(), pytest.raises(NotImplementedError, match="no kernel for"):
            cfg_rflow_step(**args)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[-1:], ids=str)
def test_opcheck(implementation: Implementation) -> None:
    if implementation.device != "cpu":
        pytest.skip("the op is checked on the CPU")
    with through_dispatcher():
        for guidance in GUIDANCES:
            args = arguments((2, 2, 3, 4, 5), guidance=guidance)
            each = args["guidance"] if guidance == "tensor" else None
            torch.library.opcheck(
                op._forward.overload,
                (args["z"], args["velocity"], each, 7.3, args["dt"], args["mask"], 2),
            )


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_compiles_without_graph_break(mode: str) -> None:
    args = arguments((2, 2, 3, 4, 5))
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    with through_dispatcher(), testing._mode(mode):
        compiled = torch.compile(
            lambda a: cfg_rflow_step(**a, copies=2), fullgraph=True, backend=backend
        )
        same(compiled(args), args, copies=2)
    kept = mode == "require" or op._forward.kernel("cpu") == "C++"
    assert ("cfg_rflow_step_forward" in graphs[0]) is kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 4, 3, 5)}, r"z must be float32 or float64 \[B, C, T, H, W\]"),
        ({"z": torch.zeros(2, 4, 3, 5, 6).half()}, "z must be float32 or float64"),
        ({"velocity": torch.zeros(2, 8, 3, 5, 6)}, r"float \[4, '>= 4', 3, 5, 6\] on cpu"),
        ({"guidance": None}, r"velocity must be float \[2, "),
        ({"velocity": torch.zeros(4, 3, 3, 5, 6)}, r"got torch.float32 \[4, 3, 3, 5, 6\]"),
        ({"velocity": torch.zeros(4, 8, 3, 5, 7)}, "velocity must be"),
        ({"velocity": torch.zeros(4, 8, 3, 5, 6).int()}, "velocity must be float"),
        ({"velocity": torch.zeros(4, 8, 3, 5, 6, device="meta")}, "velocity must be .* on cpu"),
        ({"dt": torch.zeros(1)}, r"dt must be float \[B = 2\]"),
        ({"dt": torch.zeros(2, 1)}, "dt must be"),
        ({"dt": torch.ones(2, dtype=torch.int64)}, "dt must be float"),
        ({"guidance": torch.zeros(4)}, r"guidance must be float \[B = 2\]"),
        ({"mask": torch.zeros(2, 3)}, r"mask must be bool \[B, T\] = \[2, 3\]"),
        ({"mask": torch.zeros(3, 2, dtype=torch.bool)}, "mask must be bool"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
    ],
)
def test_rejects_bad_shapes(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "z": torch.zeros(2, 4, 3, 5, 6),
        "velocity": torch.zeros(4, 8, 3, 5, 6),
        "guidance": 7.0,
        "dt": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    cfg_rflow_step(**good)
    with pytest.raises(ValueError, match=message):
        cfg_rflow_step(**(good | change))


@each_implementation
def test_int64_offsets(implementation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments((2, 3, 4, 6, 30), torch.bfloat16, device=implementation.device)
    cropped = args | {"velocity": randn(4, 5, 4, 6, 33, device=implementation.device)[..., :30]}
    results = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "needs_int64", lambda *_, wide=wide: wide)
        with implementation.activate():
            results.append([cfg_rflow_step(**a, copies=2) for a in (args, cropped)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_int64_offsets_are_asked_for_where_a_block_passes_2_31_elements() -> None:
    def wide(width: int) -> bool:
        z = torch.empty(1, 1, 1, 1, width, device="meta")
        dt = torch.empty(1, device="meta")
        (launch,) = launches.record(lambda: kernels.forward(z, z, None, 1.0, dt, None, 1))
        return bool(launch.constants["INT64"])

    assert not wide(2**31 - 1024)
    assert wide(2**31 - 1023)
    assert wide(2**31 + 1)


def test_triton_in_the_interpreter() -> None:
    testing.run_interpreted(__file__, "Triton-interpreted")
