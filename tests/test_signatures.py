"""Compare C++ kernels with the schemas that they implement: nothing else does.

A stable-ABI kernel takes its arguments from a stack of 64-bit words. A `double` where the schema
says `int` reads garbage, in silence.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import opensora.functional  # noqa: F401  defines the schemas

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted([*CSRC.glob("cpu/*.cpp"), *CSRC.glob("cuda/*.cu")])
ARGUMENTS = {
    "Tensor": "const Tensor&",
    "Optional[Tensor]": "const std::optional<Tensor>&",
    "List[Tensor]": "std::vector<Tensor>",
    "List[int]": "std::vector<int64_t>",
    "float": "double",
    "int": "int64_t",
    "bool": "bool",
}


def registered(source: str) -> dict[str, str]:
    """Return op -> C++ function, of everything that a file registers."""
    return dict(re.findall(r'm\.impl\("([\w.]+)",\s*TORCH_BOX\(&(\w+)\)\)', source))


def signature(source: str, function: str) -> tuple[str, list[str]]:
    """Return what a C++ function returns, and the types of its parameters."""
    bound = source.partition("#ifdef OPENSORA_BIND")[2]
    found = re.search(rf"^([\w:<>, ]+?)\s{function}\(([^{{}};]*?)\)\s*\{{", bound, re.M)
    assert found, f"no definition of {function}"
    parameters = re.split(r",\s*(?![^<]*>)", " ".join(found[2].split()))
    types = [re.match(r"(?:const )?[\w:]+(?:<\w+>)?&?", one.strip())[0] for one in parameters]
    return found[1], types


def expected(op: str) -> tuple[str, list[str]]:
    """Return the C++ signature that a schema asks for."""
    name, _, overload = op.partition(".")
    schema = getattr(getattr(torch.ops.opensora, name), overload or "default")._schema
    returns = ["Tensor"] * len(schema.returns)
    result = "void" if not returns else returns[0]
    if len(returns) > 1:
        result = f"std::tuple<{', '.join(returns)}>"
    return result, [ARGUMENTS[str(a.type)] for a in schema.arguments]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_cpp_takes_what_the_schema_says(path: Path) -> None:
    source = path.read_text("utf-8")
    assert registered(source)
    for op, function in registered(source).items():
        assert signature(source, function) == expected(op), op


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("layernorm_modulate.cpp", "double eps", "int64_t eps"),
        ("cross_attention.cpp", "int64_t, bool text", "int64_t, int64_t text"),
        (
            "qk_norm_rope.cpp",
            "int64_t position_dim, bool legacy",
            "bool legacy, int64_t position_dim",
        ),
        ("gate_residual.cpp", "const std::optional<Tensor>& select", "const Tensor& select"),
        ("spatial_attention.cpp", "const Tensor&, double eps", "double eps"),
        ("groupnorm_silu.cpp", "std::tuple<Tensor, Tensor> forward", "Tensor forward"),
        ("temporal_attention.cu", "double eps) {", "int64_t eps) {"),
        ("causal_conv3d.cu", "std::vector<int64_t> stride) {", "std::vector<Tensor> stride) {"),
        ("causal_conv3d.cu", "int64_t groups, double eps", "double groups, double eps"),
    ],
)
def test_a_planted_mismatch_is_seen(file: str, right: str, wrong: str) -> None:
    (path,) = (p for p in SOURCES if p.name == file)
    text = re.sub(r"\n +(?=const|int64_t|bool|double|std)", " ", path.read_text("utf-8"))
    assert right in text
    for planted in (False, True):
        now = text.replace(right, wrong) if planted else text
        differ = [signature(now, f) != expected(op) for op, f in registered(now).items()]
        assert any(differ) is planted
