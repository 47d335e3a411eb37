"""What the device can do at best: copies, products, transfers."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import lines
from experiments.bench import timing
from lora_jax import errors
from lora_jax.kernels.attention import base as attention_base


def copy(config: Mapping[str, Any]) -> lines.Line:
  """Bytes read and written a second; negated, lest nothing be copied."""
  size = config["ceilings"]["copy_bytes"]
  x = jnp.ones(size // 4, jnp.float32)
  run = jax.jit(jnp.negative)
  times = timing.repeated(lambda: run(x))
  return times.row("call_s") | {
      "bytes": 2 * x.nbytes, "gb_per_s": 2 * x.nbytes / times.median / 1e9}


@functools.partial(jax.jit, static_argnames="products")
def _chain(x, w, products):
  return jax.lax.fori_loop(0, products, lambda _, x: x @ w, x)


def matmul(config: Mapping[str, Any]) -> lines.Line:
  """bfloat16 products n x n, each of the result of the one before."""
  n, products = config["ceilings"]["matmul"], config["ceilings"]["products"]
  keys = jax.random.split(jax.random.key(0))
  x, w = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys)
  w = w / n**0.5
  # The config's dtype may ask for exact products; these are not.
  with jax.default_matmul_precision("default"):
    times = timing.repeated(lambda: _chain(x, w, products))
  return _tflops(times, (n, n, n), products)


@jax.jit
def _fp8(x, w):
  def one(x):  # Both contracted along their last axis, as the hardware wants.
    return jax.lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

  return jax.lax.map(one, x)


def fp8(config: Mapping[str, Any]) -> lines.Line:
  """float8_e4m3fn products to bfloat16, `[n, n/2]` by `[n/2, n/2]`.

  Raises:
    errors.UserError: if the device has none.
  """
  device = jax.devices()[0]
  capability = attention_base.compute_capability(device)
  if capability is None or capability < (8, 9):
    raise errors.UserError(f"{device.device_kind} has no products in float8")
  n, products = config["ceilings"]["matmul"], config["ceilings"]["products"]
  keys = jax.random.split(jax.random.key(0))
  # Of as many activations as there are products: none is computed once only.
  x, w = (jax.random.normal(key, shape, jnp.bfloat16).astype(
      jnp.float8_e4m3fn) for key, shape in zip(keys, (
          (products, n, n // 2), (n // 2, n // 2))))
  times = timing.repeated(lambda: _fp8(x, w))
  return _tflops(times, (n, n // 2, n // 2), products)


def _tflops(times, shape, products) -> lines.Line:
  m, k, n = shape
  return times.row("call_s") | {
      "shape": list(shape), "products": products,
      "tflops": products * 2 * m * k * n / times.median / 1e12}


def pinned(config: Mapping[str, Any]) -> lines.Line:
  """Bytes a second from pinned memory of the host to the device.

  Raises:
    errors.UserError: if the device has no such memory.
  """
  device = jax.devices()[0]
  kinds = {memory.kind for memory in device.addressable_memories()}
  if "pinned_host" not in kinds:
    raise errors.UserError(
        f"{device.device_kind} has no pinned_host memory, only "
        f"{', '.join(sorted(kinds))}")
  host, here = (jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
                for kind in ("pinned_host", device.default_memory().kind))
  x = jax.device_put(
      jnp.ones(config["ceilings"]["copy_bytes"] // 4, jnp.float32), host)
  times = timing.repeated(lambda: jax.device_put(x, here))
  return times.row("call_s") | {
      "bytes": x.nbytes, "gb_per_s": x.nbytes / times.median / 1e9}


CEILINGS = {
    "copy": copy, "matmul bfloat16": matmul, "matmul float8": fp8,
    "pinned host to device": pinned}


def run(config: Mapping[str, Any], emit: lines.Emit) -> None:
  """Emits a line for each ceiling."""
  for name, measure in CEILINGS.items():
    lines.attempt(emit, {"part": "ceilings", "name": name},
                  functools.partial(measure, config))
