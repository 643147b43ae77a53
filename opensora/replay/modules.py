"""Run a module on a case: output, outputs of submodules, loss, gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora.models.stdit.block import STDiT3Block
from opensora.nn import PatchEmbed3D
from opensora.replay.recording import Case, Mismatch

#: What a run gives back: tensors by their full name in the file.
Outputs = dict[str, Tensor]


def run_module(
    case: Case, module: nn.Module, forward: Callable[[Mapping[str, Tensor]], Tensor], output: str
) -> Outputs:
    """Load the case's weights strictly, run the module and return all that the case recorded.

    Gradients are those of loss = sum(output * in.loss_w).

    Args:
        case: read in its working precision.
        module: freshly built, any precision.
        forward: calls the module. It gets the inputs that gradients were recorded for, and takes
            all others from the case.
        output: full name of the module's output.

    Raises:
        Mismatch: gradients were recorded without weights of the loss.
    """
    module.to(case.dtype).load_state_dict(case.weights(), strict=True)
    module.train(case.read("mode") == "train")
    found: Outputs = {}
    _record_submodules(case, module, found)
    gradients = case.names("grad.")
    leaves = {
        name: case.input(name).detach().clone().requires_grad_()
        for name in (n.removeprefix("@in.") for n in gradients if n.startswith("@in."))
    }
    with torch.set_grad_enabled(bool(gradients)):
        result = forward(leaves)
        found[output] = result
        if not gradients and "in.loss_w" not in case.tensors:
            return found
        if "in.loss_w" not in case.tensors:
            raise Mismatch("gradients without in.loss_w, the weights of their loss")
        loss = (result * case.given("loss_w")).sum()
        found["out.loss"] = loss
        if gradients:
            loss.backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"grad.{name}"] = parameter.grad
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            found[f"grad.@in.{name}"] = leaf.grad
    return found


def _record_submodules(case: Case, module: nn.Module, found: Outputs) -> None:
    """Keep the output of every submodule that the case recorded; of its last call."""
    modules = dict(module.named_modules())

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, PatchEmbed3D):  # recorded without the positions
                output = module.forward(args[0])
            elif isinstance(module, STDiT3Block):
                output = output[0]
            if isinstance(output, Tensor):
                found[f"out.mid.{name}"] = output

        return hook

    for name in case.names("out.mid."):
        if name in modules:
            modules[name].register_forward_hook(keep(name))
