"""Attention: one entry point, and the implementations behind it."""

from __future__ import annotations

from lora_jax.kernels.attention.api import attention
from lora_jax.kernels.attention.api import CHOICES
from lora_jax.kernels.attention.base import Options
from lora_jax.kernels.attention.cached import attention as cached_attention
from lora_jax.kernels.attention.plain import EVERY
from lora_jax.kernels.attention.plain import visible

__all__ = [
    "CHOICES", "EVERY", "Options", "attention", "cached_attention", "visible",
]
