"""A step with everything offloaded, as an H100 would run it.

Devices of a topology have no memories that jax knows of: the program is
lowered for an abstract mesh, whose shardings say where an array is, and
compiled for the card. Kernels that ask for devices while they are lowered are
left out.
"""

from __future__ import annotations

import re
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.kernels import attention as attention_lib
from lora_jax.kernels import dequantise
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.train import optim
from lora_jax.train import step as step_lib
from tests import tiny
from tests.kernels import topologies

CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=512, d_model=256, d_ff=512, n_layers=6,
    n_heads=4, n_kv_heads=4, head_dim=64)
B, T = 4, 256
NEAR = NamedSharding(AbstractMesh((1,), ("x",)), P(), memory_kind="device")
FAR = NEAR.with_memory_kind(host_lib.PINNED)


def described(tree, far=lambda x: False):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=FAR if far(x) else NEAR), tree)


def lowered(offload):
  base = init.random_base(jax.random.key(0), CONFIG, jnp.bfloat16)
  base = base.replace(layers={
      name: x.replace(weight=quant.quantize(x.weight, quant.QuantSpec()))
      if isinstance(x, decoder.Linear) else x
      for name, x in base.layers.items()})
  base, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(rank=8), base,
      tiny.paths(CONFIG))
  params, frozen = adapters_lib.split(tree)
  state = step_lib.init_state(params)
  layers = described(
      base.layers, lambda x: "base" in offload and not host_lib.stays(x))
  moments = described(
      state.opt_state, lambda x: "optimiser" in offload and x.ndim > 0)
  ones = np.ones((1, B, T), np.int32)
  rest = (types.Batch(ones, ones, np.float32(ones), ones, ones, ones),
          optim.hyper(optim.OptimConfig(), 1e-3), jax.random.key(0))
  traced = step_lib.train_step.trace(
      described(state).replace(opt_state=moments), described(frozen),
      described(base).replace(layers=layers), *described(rest), model=CONFIG,
      settings=step_lib.Settings(
          dtype="bfloat16", remat="full", offload=offload,
          attention=attention_lib.Options("plain", "packed")))
  return traced.lower(lowering_platforms=("cuda",))


@pytest.fixture(scope="module")
def compiled():
  if reason := topologies.missing("h100"):
    pytest.skip(reason)
  device = topologies.devices("h100")[0]
  with mock.patch.dict(dequantise.DEFAULTS, clear=True):
    program = lowered(tuple(host_lib.KINDS))
  # An abstract mesh has no backend; the default one cannot compile for it.
  program._lowering.compile_args["backend"] = device.client
  return program.compile(
      device_assignment=(device,), compiler_options={
          "xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False})


def loops(text):
  """Lines of the bodies of the loops that copy layers in."""
  return [part.splitlines() for part in text.split("\n\n")
          if "dynamic-slice-start" in part and "ENTRY" not in part]


# Compiles a step for an H100; test_offload.py has its values.
@pytest.mark.slow
def test_a_layer_is_copied_while_another_computes(compiled):
  bodies = loops(compiled.as_text())
  assert len(bodies) == 2  # Forward and backward.
  for lines in bodies:
    at = lambda pattern, lines=lines: [
        i for i, line in enumerate(lines) if re.search(pattern, line)]
    starts = at(r"%dynamic-slice-start[\w.]* = ")
    dones = at(r"%dynamic-slice-done[\w.]* = ")
    products = at(r'custom_call_target="__cublas')
    assert len(starts) == len(dones) >= 14  # Codes and scales of 7 matrices.
    hidden = [n for n in products if starts[0] < n < dones[-1]]
    assert len(hidden) >= 0.9 * len(products)


# Compiles a step for an H100; test_offload.py has its values.
@pytest.mark.slow
def test_the_copy_engine_copies_them(compiled):
  """What is linear in the loop's counter is no kernel; see `stream._copy`."""
  text = compiled.as_text()
  called = {name for lines in loops(text) for line in lines
            for name in re.findall(
                r"dynamic-slice-start.*calls=%([\w.-]+)", line)}
  assert len(called) >= 28
  for part in text.split("\n\n"):
    if (name := part.split(" ")[0].lstrip("%")) in called:
      assert "S(5)" in part and '"byte_stride"' in part, name


# As above.
@pytest.mark.slow
def test_what_is_offloaded_is_in_host_memory(compiled):
  text = compiled.as_text()
  for shape in (f"u8[{CONFIG.n_layers},128,512]",  # Codes of gate_proj.
                f"f32[{CONFIG.n_layers},256,8]",  # Moments of its A.
                f"bf16[{CONFIG.n_layers},{B},{T},256]"):  # Inputs of layers.
    found = re.findall(re.escape(shape) + r"\{[\d,]*(:S\(5\))?\}", text)
    assert ":S(5)" in found, shape
  assert "" not in re.findall(
      rf"bf16\[{CONFIG.n_layers},{B},{T},256\]" + r"\{[\d,]*(:S\(5\))?\}",
      text)
  size = compiled.memory_analysis()
  kept = 2 * CONFIG.n_layers * B * T * CONFIG.d_model
  assert size.host_temp_size_in_bytes >= kept
