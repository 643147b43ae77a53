"""Build the optimizer that a configuration names."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from opensora.config_expression import suggest
from opensora.errors import UsageError
from opensora.optim import Muon

OPTIMIZERS = ("adamw", "apex", "muon")
# HybridAdam is what upstream trains with: AdamW, in the mode of decoupled decay.
_ALIASES = {"hybridadam": "adamw", "fusedadam": "apex", "fused_adam": "apex"}
#: Parts of the names of tables: learned like biases, a vector for every place.
TABLES = ("scale_shift_table", "pos_embed", "y_embedding", "relative_attention_bias", "shared.")
#: Matrices that are tables or face the data, which Muon leaves to AdamW.
MUON_EXCLUDED = (*TABLES, "x_embedder", "final_layer")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: str = "adamw",
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_all: bool = True,
    fused: bool | None = None,
    adamw_lr: float | None = None,
    momentum: float = 0.95,
) -> torch.optim.Optimizer:
    """Build an optimizer over the parameters that require gradients; sets `initial_lr`.

    Args:
        named_parameters: (name, parameter) pairs; DTensor parameters of `fully_shard` too.
        name: "adamw"; "apex", the FusedAdam of apex with the same rule; "muon", which moves
            matrices orthogonalised and the rest with AdamW.
        lr: step size; of the matrices with Muon, whose updates are as large as AdamW's.
        betas: of AdamW's two averages.
        eps: of AdamW. 1e-15 is fine: float32 holds it and its inverse.
        weight_decay: decoupled, per step and lr.
        decay_all: as upstream, the decay is for every parameter; False spares vectors (norms,
            biases) and tables. Muon never decays those.
        fused: AdamW in one kernel; None where this torch and the device have one.
        adamw_lr: step size of what Muon leaves to AdamW; None uses `lr`.
        momentum: of Muon.

    Raises:
        UsageError: an unknown name, apex is missing or cannot take these parameters, nothing is to
            be trained, or parameters are in half precision, where small steps round to nothing.
    """
    chosen = _ALIASES.get(name.lower(), name.lower())
    if chosen not in OPTIMIZERS:
        raise UsageError(
            f"optimizer {name!r} is unknown{suggest(chosen, OPTIMIZERS)} ({', '.join(OPTIMIZERS)})"
        )
    named = [(key, value) for key, value in named_parameters if value.requires_grad]
    if not named:
        raise UsageError("nothing to train: no parameter requires gradients")
    for key, value in named:
        if value.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"cannot train {key} in {value.dtype}: its steps would round to nothing. Keep "
                "weights in float32 and let dtype = 'bf16' cast them for the computation"
            )
    if chosen == "muon":
        return Muon(
            named,
            lr,
            lr if adamw_lr is None else adamw_lr,
            momentum,
            betas,
            eps,
            weight_decay,
            MUON_EXCLUDED,
        )
    groups = _groups(named, weight_decay, decay_all)
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    optimizer: torch.optim.Optimizer
    if chosen == "apex":
        optimizer = _apex(named, groups, settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=_can_fuse(named, fused), **settings)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay suits a parameter: matrices and kernels that are no tables."""
    return parameter.ndim >= 2 and not any(part in name for part in TABLES)


def _groups(
    named: list[tuple[str, nn.Parameter]], weight_decay: float, decay_all: bool
) -> list[dict[str, Any]]:
    if decay_all or weight_decay == 0:
        return [{"params": [value for _, value in named]}]
    groups: list[dict[str, Any]] = [
        {"params": [value for key, value in named if decays(key, value)]},
        {"params": [value for key, value in named if not decays(key, value)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _can_fuse(named: list[tuple[str, nn.Parameter]], fused: bool | None) -> bool:
    if fused is not None:
        return fused
    return all(value.device.type in ("cuda", "cpu") for _, value in named)


def _apex(
    named: list[tuple[str, nn.Parameter]], groups: list[dict[str, Any]], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return apex's FusedAdam; its kernels read plain CUDA tensors only."""
    # PyPI's apex is another project: the one of NVIDIA has apex.optimizers.
    if find_spec("apex") is None or find_spec("apex.optimizers") is None:
        raise UsageError(
            "optimizer 'apex': apex is not installed; use optimizer = 'adamw', which is fused too, "
            "or build apex from github.com/NVIDIA/apex"
        )
    for key, value in named:
        if isinstance(value, DTensor) or value.device.type != "cuda":
            raise UsageError(
                f"optimizer 'apex' takes whole CUDA tensors, and {key} is not one; use "
                "optimizer = 'adamw', which is fused too"
            )
    from apex.optimizers import FusedAdam

    optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
    return optimizer
