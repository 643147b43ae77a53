"""Re-export every public op."""

from __future__ import annotations

from opensora.ops.layernorm_modulate import layernorm_modulate

__all__ = ["layernorm_modulate"]
