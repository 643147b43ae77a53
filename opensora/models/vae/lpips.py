"""Measure how different two images look: LPIPS on VGG16 features, from weights on the disk.

Two published files hold the weights: torchvision's VGG16 (`vgg16-397923af.pth`: features.0.weight,
features.0.bias, ..., features.28.bias) and the layer weights of LPIPS 0.1 (`vgg.pth`:
lin0.model.1.weight ... lin4.model.1.weight). Nothing is downloaded.
Source: Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.checkpoint import describe_mismatch
from opensora.errors import UsageError, WeightsError
from opensora.weight_files import PICKLES, read_tensors

# Widths of VGG16's convolutions up to relu5_3, one tuple a level; levels end before a max-pool.
LEVELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and spread for pixels in [-1, 1], rounded as published.
_MEAN, _SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
NEEDED = (
    "LPIPS needs two files that are not part of this package: torchvision's VGG16 "
    "(vgg16-397923af.pth, keys features.0.weight ... features.28.bias) and LPIPS 0.1's vgg.pth "
    "(keys lin0.model.1.weight ... lin4.model.1.weight), as .pth or .safetensors, together in one "
    "folder or merged into one file"
)


class LPIPS(nn.Module):
    """Compute sum over levels of mean over pixels of w . (unit(f(x)) - unit(f(y)))^2.

    f are VGG16's features of a level after their ReLU, unit() divides a pixel's features by their
    norm, w are the level's weights.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, levels: Sequence[Sequence[int]] = LEVELS) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        self.levels: list[list[str]] = []
        width, position = 3, 0
        for widths in levels:
            names = []
            for wider in widths:
                self.features[str(position)] = nn.Conv2d(width, wider, 3, padding=1)
                names.append(str(position))
                width, position = wider, position + 2  # a ReLU follows
            self.levels.append(names)
            position += 1  # the max-pool
        self.lins = nn.ParameterList(torch.zeros(widths[-1]) for widths in levels)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(_SPREAD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_files(cls, sources: str | os.PathLike[str] | Sequence[str]) -> LPIPS:
        """Return frozen LPIPS with the weights of one file, of two, or of a folder's files.

        The state dict of the `lpips` package (net.slice1.0.weight, ...) is read as well.

        Raises:
            UsageError: a path does not exist.
            WeightsError: a file is damaged, or weights are missing or of another shape.
        """
        paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
        files: list[Path] = []
        for path in map(Path, paths):
            if not path.exists():
                raise UsageError(f"{path} does not exist; {NEEDED}")
            suffixes = (".safetensors", *PICKLES)
            inside = sorted(path.iterdir()) if path.is_dir() else [path]
            files += [file for file in inside if file.suffix in suffixes]
        if not files:
            raise UsageError(f"{paths[0]} holds no weight files; {NEEDED}")
        tensors = {}
        for name, tensor in ((n, t) for file in files for n, t in read_tensors((file,)).items()):
            name = re.sub(r"^net\.slice\d\.(\d+)\.", r"features.\1.", name)
            if re.match(r"features\.\d+\.", name):
                tensors[name] = tensor
            elif match := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
                tensors[f"lins.{match[1]}"] = tensor.flatten()
        with torch.device("meta"):
            network = cls()
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wanted != given:
            names = ", ".join(map(str, paths))
            raise WeightsError(f"{names}: {describe_mismatch(wanted, given)}; {NEEDED}")
        network = cls()
        network.load_state_dict(tensors)
        return network.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances [N] of images x and y [N, 3, H, W] in [-1, 1]; sides from 16.

        A gradient flows into x or y where it is asked for; no graph is kept for the other.

        Raises:
            UsageError: the images are smaller than 16 pixels.
        """
        if min(x.shape[2:]) < 2 ** (len(self.levels) - 1):
            raise UsageError(
                f"LPIPS: images of {x.shape[2]}x{x.shape[3]} pixels are too small; expected "
                f"{2 ** (len(self.levels) - 1)} or more"
            )
        x, y = (image.sub(self.mean).div(self.spread) for image in (x, y))
        distance = x.new_zeros(len(x), dtype=torch.float32)
        for index, (names, weight) in enumerate(zip(self.levels, self.lins, strict=True)):
            if index:
                x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
            for name in names:
                x, y = F.relu(self.features[name](x)), F.relu(self.features[name](y))
            difference = (_unit(x) - _unit(y)).square() * weight.view(1, -1, 1, 1)
            distance = distance + difference.sum(1).mean((1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    """Divide the features of every pixel by their norm, in float32."""
    features = features.float()
    return features / (features.square().sum(1, keepdim=True).sqrt() + _EPS)
