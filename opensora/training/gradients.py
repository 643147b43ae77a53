"""Average gradients over processes that hold the same parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from opensora.distributed.collectives import all_reduce

#: Gradients that travel together, bytes: large enough that the network's delay does not count.
_BUCKET = 64 << 20


@torch.no_grad()
def average_gradients(optimizer: Optimizer, count: int) -> None:
    """Divide the gradients, summed over batches and processes, by the number of batches.

    A process without a gradient (none of its batches had one) counts as zeros. Where no process has
    one, gradients stay None, so that the optimizer leaves the parameters alone.

    Args:
        optimizer: of parameters that are the same on all processes.
        count: batches of all processes that gave these parameters gradients.
    """
    if count == 0:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bucket: list[Tensor] = []
    size = 0
    for index, parameter in enumerate(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.nbytes
        if size >= _BUCKET or index + 1 == len(parameters):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            flat = all_reduce(flat, "gradients").div_(count)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))
            bucket, size = [], 0
