"""Replay STDiT3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from opensora.models.stdit import STDiT3, STDiT3Config
from opensora.replay.modules import Outputs, run_module
from opensora.replay.recording import Case

#: Inputs that the model itself casts to the precision of its weights.
_CAST = ("x", "timestep", "y")


def is_stdit3(case: Case) -> bool:
    """Whether the case is a run of STDiT3, by its class or else by its parameters."""
    if case.class_name:
        return case.class_name == "STDiT3"
    return "sd.spatial_blocks.0.scale_shift_table" in case.tensors


def run_stdit3(case: Case) -> Outputs:
    """Build the model of the case's `config` and call it with the inputs that `call` lists."""
    config = case.config()
    # The original accepts any key; those of other models mean nothing to it.
    known = {field.name for field in dataclasses.fields(STDiT3Config)}
    architecture = {key: value for key, value in config.items() if key in known}
    if len(architecture) < len(config):
        case.notes.add(f"config keys without effect: {', '.join(sorted(config.keys() - known))}")
    model = STDiT3(STDiT3Config.from_dict(architecture))
    names = [name for name in case.read("call") or case.names("in.") if name != "loss_w"]

    def forward(leaves: Mapping[str, Tensor]) -> Tensor:
        given = {n: case.input(n) if n in _CAST else case.given(n) for n in names}
        result: Tensor = model(**case.read("kwargs", {}), **{**given, **leaves})
        return result

    return run_module(case, model, forward, "out.x")
