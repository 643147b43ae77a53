"""STDiT, the diffusion transformers of Open-Sora."""

from __future__ import annotations

from opensora.models.stdit.config import PRESETS, STDiT3Config
from opensora.models.stdit.model import STDiT3, build_stdit

__all__ = ["PRESETS", "STDiT3", "STDiT3Config", "build_stdit"]
