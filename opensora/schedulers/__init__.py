"""Hold the samplers and their training losses, one module each."""

from __future__ import annotations

from opensora.schedulers.rflow import RFlow

__all__ = ["RFlow"]
