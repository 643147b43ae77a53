"""Tell real frames or clips from reconstructed ones, patch by patch: PatchGAN in 2D and 3D.

Parameter names are the published ones (`main.0.weight`, ...), so discriminators of Open-Sora,
Open-Sora-Plan and pix2pix load as they are.
Source: Isola et al. 2017, Image-to-Image Translation with Conditional Adversarial Networks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from opensora.checkpoint import describe_mismatch
from opensora.config_file import suggest
from opensora.errors import UsageError, WeightsError
from opensora.models.vae.losses import fold_frames
from opensora.weight_files import locate, read_tensors

KINDS = {"NLayerDiscriminator": 2, "NLayerDiscriminator3D": 3, "N_Layer_DISCRIMINATOR_3D": 3}
_KEYS = ("type", "from_pretrained", "input_nc", "ndf", "n_layers", "use_actnorm")
_PREFIXES = ("discriminator.", "module.")


class NLayerDiscriminator(nn.Module):
    """Map frames, or whole clips, to one logit a patch.

    Kernels are 4 wide. The first convolution and the n_layers - 1 after it halve height and width;
    two more follow. Over time, in 3D, only the first one halves.

    Args:
        dims: 2, every frame for itself; or 3, clips.
        input_nc: channels of a frame.
        ndf: width of the first layer; doubled per layer, up to 8 times.
        n_layers: layers before the last.
    """

    def __init__(self, dims: int = 2, input_nc: int = 3, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        self.dims, self.n_layers = dims, n_layers
        conv: type[nn.Conv2d | nn.Conv3d] = nn.Conv2d if dims == 2 else nn.Conv3d
        norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
        halve: Any = 2 if dims == 2 else (1, 2, 2)
        layers: list[nn.Module] = [conv(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = ndf
        for index in range(1, n_layers + 1):
            wider = ndf * min(2**index, 8)
            stride = halve if index < n_layers else 1
            layers += [conv(width, wider, 4, stride, 1, bias=False), norm(wider)]
            layers += [nn.LeakyReLU(0.2)]
            width = wider
        layers.append(conv(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    @property
    def least_size(self) -> tuple[int, int]:
        """Return the fewest frames, and the fewest pixels of a side, that give a logit."""
        side = 3 * 2**self.n_layers
        return (1, side) if self.dims == 2 else (2 * (self.n_layers + 2), side)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: [N, 1, h, w] of frames [N, C, H, W], [B, 1, t, h, w] of a clip in 3D."""
        logits: Tensor = self.main(x)
        return logits

    def accepts(self, video: Tensor) -> bool:
        """Tell whether a video [B, C, T, H, W] is large enough for a logit."""
        frames, side = self.least_size
        return video.shape[2] >= frames and min(video.shape[3:]) >= side

    def require(self, video: Tensor) -> None:
        """Refuse a video [B, C, T, H, W] that is too small.

        Raises:
            UsageError: too few frames or too small frames for a single logit.
        """
        if not self.accepts(video):
            frames, side = self.least_size
            raise UsageError(
                f"discriminator: a clip of {video.shape[2]} frames of {video.shape[3]}x"
                f"{video.shape[4]} pixels is too small: with n_layers={self.n_layers} it takes at "
                f"least {frames} frames of {side}x{side}; use fewer n_layers"
                + (", type='NLayerDiscriminator', or longer clips" if self.dims == 3 else "")
            )

    def judge(self, video: Tensor) -> Tensor:
        """Return the logits of a video [B, C, T, H, W], whose frames are taken apart in 2D.

        Raises:
            UsageError: see `require`.
        """
        self.require(video)
        return self.forward(fold_frames(video) if self.dims == 2 else video)


def build_discriminator(data: Mapping[str, Any]) -> NLayerDiscriminator:
    """Build what the `discriminator` entry of a configuration describes, with its weights.

    Raises:
        UsageError: unknown type or key, or a kind that is not supported.
        WeightsError: the weights of `from_pretrained` are missing or of another network.
    """
    for key in data:
        if key not in _KEYS:
            raise UsageError(f"discriminator: unknown key {key!r}{suggest(key, _KEYS)}")
    kind = data.get("type", "NLayerDiscriminator")
    if kind not in KINDS:
        raise UsageError(
            f"discriminator: type {kind!r} is not supported; use one of {', '.join(KINDS)}"
        )
    if data.get("use_actnorm"):
        raise UsageError("discriminator: use_actnorm is not supported; leave it out")
    sizes = {key: data[key] for key in ("input_nc", "ndf", "n_layers") if key in data}
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"discriminator: {key} must be a whole number from 1, got {value!r}")
    network = NLayerDiscriminator(KINDS[kind], **sizes)
    source = data.get("from_pretrained")
    if source:
        load_discriminator(network, source)
    return network


def load_discriminator(network: NLayerDiscriminator, source: str | os.PathLike[str]) -> None:
    """Load published weights strictly; a prefix `discriminator.` or `module.` is taken off.

    Raises:
        WeightsError: a file is missing or damaged, or names or shapes differ.
    """
    tensors = read_tensors(locate(source).files)
    for prefix in _PREFIXES:
        found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        tensors = found or tensors
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        raise WeightsError(
            f"{source}: the weights do not fit this discriminator: "
            f"{describe_mismatch(wanted, given)}; check type, ndf and n_layers"
        )
    network.load_state_dict(tensors)
