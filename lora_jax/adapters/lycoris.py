"""What the methods of LyCORIS (Yeh et al. 2023, arXiv 2309.14859) share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import types
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import noise as noise_lib


def dropped(
    y: types.Array, noise: noise_lib.Noise, rate: types.Array,
    module_rate: float, rescaled: bool,
) -> jax.Array:
  """What an adapter adds, `[..., o]`, with its dropout.

  Both kinds are drawn once a step, for all tokens. PEFT's scaling divides by
  zero where no output is left; here nothing is added then.

  Args:
    y: x times the change of the weight.
    noise: of the step and the place.
    rate: `[]`, of outputs that stay as they are ("rank dropout").
    module_rate: of steps in which this place stays as it is.
    rescaled: whether the other outputs make up for those.
  """
  first, second = jax.random.split(noise.key)
  keep = (jax.random.uniform(first, y.shape[-1:]) >= rate).astype(jnp.float32)
  if rescaled:
    keep = keep / jnp.maximum(jnp.mean(keep), 1 / keep.size)
  if module_rate:
    keep = keep * (jax.random.uniform(second) >= module_rate)
  return y * keep.astype(y.dtype)


def peft_config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  """The keys that PEFT's configs of these methods share."""
  alpha = float(config.alpha)
  return {
      "r": config.rank,
      "alpha": int(alpha) if alpha.is_integer() else alpha,
      "rank_dropout": float(config.dropout),
      "module_dropout": config.options.module_dropout,
      "use_effective_conv2d": False,
      "init_weights": True,
      "rank_pattern": dict(config.rank_pattern),
      "alpha_pattern": dict(config.alpha_pattern),
  }


def block(config: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `peft_config`."""
  return {
      "rank": int(config["r"]), "alpha": config.get("alpha", 8),
      "dropout": float(config.get("rank_dropout") or 0.0),
      "rank_pattern": config.get("rank_pattern") or {},
      "alpha_pattern": config.get("alpha_pattern") or {},
      "options": {"module_dropout": config.get("module_dropout") or 0.0}}
