"""Re-export every public op."""

from __future__ import annotations

from opensora.ops.causal_conv3d import causal_conv3d
from opensora.ops.cfg_rflow_step import cfg_rflow_step
from opensora.ops.cross_attention import cross_attention
from opensora.ops.gate_residual import gate_residual
from opensora.ops.groupnorm_silu import groupnorm_silu
from opensora.ops.layernorm_modulate import layernorm_modulate
from opensora.ops.patchify import patchify
from opensora.ops.qk_norm_rope import qk_norm_rope
from opensora.ops.residual_layernorm_modulate import residual_layernorm_modulate
from opensora.ops.spatial_attention import spatial_attention
from opensora.ops.temporal_attention import temporal_attention

__all__ = [
    "causal_conv3d",
    "cfg_rflow_step",
    "cross_attention",
    "gate_residual",
    "groupnorm_silu",
    "layernorm_modulate",
    "patchify",
    "qk_norm_rope",
    "residual_layernorm_modulate",
    "spatial_attention",
    "temporal_attention",
]
