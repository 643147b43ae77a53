"""Turn prompts into text states with T5 or ByT5 (transformers does the work)."""

from __future__ import annotations

from opensora.models.text_encoder.growth import grow, grow_to_fit
from opensora.models.text_encoder.t5 import T5TextEncoder

__all__ = ["T5TextEncoder", "grow", "grow_to_fit"]
