"""DoRA on a GPU: the norms right, then a step's time beside LoRA's.

    python -m tests.adapters.dora_gpu [norms] [named] [full]

`norms`: c by the joint product, of every format that a kernel decodes, against
the dequantised weight's in float32. `named` and `full`: Llama-2-7B's geometry,
NF4, r=16 on all linears, 4 x 2048 packed tokens in bfloat16, under that remat
policy; the same tokens again and again, so that both losses fall. One line a
variant; one that fails says so, and the others go on. Not collected by pytest,
whose machines have no GPU.
"""

from __future__ import annotations

import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax.adapters import dora
from lora_jax.models import config as config_lib
from lora_jax.models import init
from lora_jax.models import modules
from tests.train import gpu_check

SEVEN = config_lib.ModelConfig(
    family="llama", vocab_size=32000, d_model=4096, d_ff=11008, n_layers=32,
    n_heads=32, n_kv_heads=32, head_dim=128, tie_embeddings=False)
I, O, R = 4096, 1024, 16


def attempt(label: str, run) -> None:
  """Prints the line that `run()` returns, or why there is none."""
  jax.clear_caches()
  try:
    found = run()
  except Exception as error:  # The other variants are still of interest.
    found = f"{type(error).__name__}: {str(error)[:300]}"
  print(f"{label:24}{found}", flush=True)


def norms(fmt: str) -> str:
  """The largest relative error of c for a delta of 30% of the weight."""
  keys = jax.random.split(jax.random.key(0), 3)
  w = 0.02 * jax.random.normal(keys[0], (I, O))
  w = quant.quantize(w, quant.QuantSpec(fmt))
  a = jax.random.normal(keys[1], (I, R)) / I**0.5
  b = 0.3 * 0.02 * (I / R) ** 0.5 * jax.random.normal(keys[2], (R, O))
  one = dora.DoRA(
      a=a, b=b, scale=jnp.float32(1), rate=jnp.float32(0), rank=jnp.int32(R),
      m=jnp.ones(O), square=jax.jit(dora.squares)(w))
  want = np.linalg.norm(
      np.float64(quant.dequantize(w)) + np.float64(a) @ np.float64(b), axis=0)

  @jax.jit
  def joint(one, w):
    (_, cross), = quant.joint_matmul(
        jnp.ones((256, I), jnp.bfloat16), [w], [one.factors()], crosses=True)
    return one.norms(w, jnp.bfloat16, cross)

  apart = jax.jit(lambda one, w: one.norms(w, jnp.bfloat16))
  errors = [float(np.abs(np.float64(f(one, w)) / want - 1).max())
            for f in (joint, apart)]
  verdict = "ok" if max(errors) < 1e-4 else "WRONG"
  return f"{verdict}: joint {errors[0]:.1e}, apart {errors[1]:.1e} of 1e-4"


@functools.cache
def base():
  return init.quantised_base(
      jax.random.key(0), SEVEN, quant.QuantSpec("nf4"), jnp.bfloat16)


def step(method: str, remat: str) -> str:
  _, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(
          method=method, rank=16, alpha=32.0), base(), modules.paths(SEVEN))
  with mock.patch.object(gpu_check, "CONFIG", SEVEN):
    return gpu_check.run(base(), tree, "bfloat16", "auto", remat=remat)


def main() -> None:
  print(jax.devices()[0].device_kind, jax.__version__, flush=True)
  for what in sys.argv[1:] or ("norms", "named", "full"):
    if what == "norms":
      for fmt in ("nf4", "int4", "int4_affine", "int8"):
        attempt(f"norms, {fmt}", functools.partial(norms, fmt))
    else:
      for method in ("lora", "dora"):
        attempt(f"{method}, {what}", functools.partial(step, method, what))


if __name__ == "__main__":
  main()
