"""What a compiled step must not hold, and what it must do in place."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax import types
from lora_jax.kernels import attention as attention_lib
from lora_jax.kernels.attention import base as attention_base
from lora_jax.models import config as config_lib
from lora_jax.models import init
from lora_jax.quant import joint
from lora_jax.train import optim
from lora_jax.train import step as step_lib
from tests import tiny
from tests.kernels import topologies

# No two sizes alike; more tokens than a tile of attention has.
L, D, F, B, T = 3, 256, 768, 2, 1536
MODEL = config_lib.ModelConfig(
    family="llama", vocab_size=1024, d_model=D, d_ff=F, n_layers=L, n_heads=4,
    n_kv_heads=2, head_dim=64)
LINEARS = {(D, D), (D, D // 2), (D, F), (F, D)}


@functools.cache
def arguments():
  """Of a packed bfloat16 step on NF4."""
  base = init.quantised_base(jax.random.key(0), MODEL, quant.QuantSpec("nf4"))
  base, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(rank=8), base,
      tiny.paths(MODEL))
  params, frozen = adapters_lib.split(tree)
  ones = np.ones((1, B, T), np.int32)
  return (step_lib.init_state(params), frozen, base,
          types.Batch(ones, ones, np.float32(ones), ones, ones, ones),
          optim.hyper(optim.OptimConfig(), 1e-3), jax.random.key(2))


def compiled(place=None, attention="auto", remat="named"):
  """The step for an accelerator that need not be here, or for this one."""
  args, options = arguments(), None
  if place is not None:
    if reason := topologies.missing(place):
      pytest.skip(reason)
    device = topologies.devices(place)[0]
    where = SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=where), args)
    if device.platform == "gpu":
      options = step_lib.COMPILER_OPTIONS | {"xla_gpu_autotune_level": 0}
  return step_lib.train_step.lower(
      *args, model=MODEL, settings=step_lib.Settings(
          dtype="bfloat16", remat=remat,
          attention=attention_lib.Options(attention, "packed"))).compile(
              compiler_options=options)


def stacks(text):
  """Shapes of float arrays that hold a matrix of every layer."""
  below = joint.MULTIPLE
  wanted = {(L, i + more, o) for i, o in LINEARS for more in (0, below)}
  wanted |= {(L, o, i) for _, i, o in wanted}
  found = {tuple(map(int, shape.split(","))) for shape in re.findall(
      r"(?:f32|bf16)\[([\d,]+)\]", text)}
  return wanted & found


@pytest.mark.parametrize("remat", ["named", "full"])
def test_the_base_is_never_there_in_floats(remat):
  """Neither whole nor, layer by layer, among what the backward pass reads."""
  program = compiled(remat=remat)
  text = program.as_text()
  assert not stacks(text)
  # A layer's would be seen; it stands above the rows of B.
  assert re.search(rf"bf16\[{D + joint.MULTIPLE},{F}\]", text)
  # The whole base would be seen.
  whole = jax.jit(lambda base: jax.tree.map(
      lambda w: w.dequantize(jnp.bfloat16), base.layers["up_proj"].weight,
      is_leaf=lambda w: isinstance(w, quant.QuantizedArray))).lower(
          arguments()[2]).compile().as_text()
  assert stacks(whole) == {(L, D, F)}


def test_the_state_is_updated_in_place():
  state = arguments()[0]
  size = trees.nbytes((state.params, state.opt_state))
  assert compiled().memory_analysis().alias_size_in_bytes >= size


@pytest.mark.parametrize(
    "attention, masks", [("splash", False), pytest.param(
        # That the test can fail.
        "plain", True, marks=pytest.mark.slow)])
def test_no_mask_for_packed_rows(attention, masks, monkeypatch):
  if reason := topologies.missing("v5e:2x2"):
    pytest.skip(reason)
  device = topologies.devices("v5e:2x2")[0]
  monkeypatch.setattr(
      attention_base.Call, "device", property(lambda call: device))
  text = compiled("v5e:2x2", attention).as_text()
  assert bool(re.search(rf"\[(?:\d+,)*{T},{T}\]", text)) == masks


@pytest.mark.skipif(
    jax.version.__version_info__ < (0, 11), reason="this XLA copies them")
def test_products_are_written_where_they_are_kept():
  """mid, the next layer's input and x A by cuBLAS, into their stacks: in one
  fusion with the update, and with what is added to them."""
  parts = re.split(r"\n(?=%|ENTRY|HloModule)", compiled("h100").as_text())
  found = {shape for part in parts
           if "__cublas$lt$matmul" in part and "while(" not in part
           for shape in re.findall(
               r"bf16\[([\d,]+)\]\S* dynamic-update-slice", part)}
  assert {f"{L},{B},{T},{D}", f"{L + 1},{B},{T},{D}",
          f"{L},{B},{T},{joint.MULTIPLE}"} <= found
