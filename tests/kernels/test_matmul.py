from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from lora_jax.kernels import matmul_gpu
from tests.kernels import test_dequantise as one
from tests.kernels import warps


def emulated(body, x, codes, named):
  """The kernel's result `[l, m, o]` on the instructions' emulator."""
  layers = len(codes)
  plan = body.plan
  lead = (layers, plan.splits) if body.apart else (layers,)
  out = np.full((*lead, body.rows, body.columns), np.nan,
                warps.KINDS[body.out])
  given = {"x": x, "codes": codes, **named,
           "table": matmul_gpu.table(body.terms), "out": out}
  arrays = {name: np.ascontiguousarray(given[name]).reshape(-1).view(np.uint8)
            for name in body.arrays}
  warps.run(
      body, arrays, body.shared,
      {"layer": layers, "tile": -(-body.columns // body.span),
       "split": plan.splits},
      "split" if plan.cluster and plan.splits > 1 else None)
  out = arrays["out"].view(out.dtype).reshape(out.shape)
  return out.sum(1) if body.apart else out

PLANS = {
    "wide": matmul_gpu.Plan(width=16, splits=1),
    "cluster": matmul_gpu.Plan(width=8, splits=2, terms=2),
    "apart": matmul_gpu.Plan(width=4, splits=3, cluster=False, ahead=2),
    "prmt": matmul_gpu.Plan(width=8, splits=2, decode="prmt", ahead=2),
}


@pytest.mark.parametrize("name,rows,ins,columns,block,dtype,how", [
    ("nf4", 1, 320, 144, 64, "bfloat16", "wide"),
    ("nf4", 9, 320, 144, 64, "float16", "cluster"),
    ("int4_affine", 3, 256, 64, 128, "bfloat16", "apart"),
    ("fp4", 2, 128, 64, 64, "bfloat16", "prmt"),
    ("nf4", 2, 128, 64, 64, "bfloat16", "prmt"),
])
def test_instructions(name, rows, ins, columns, block, dtype, how):
  codes, named = one.stored(name, ins, columns, block)
  named["scales"][0, :3] = 0.0, 1.0, 1e-7
  x = np.random.default_rng(1).normal(size=(rows, ins)).astype(dtype)
  body = matmul_gpu.body_for(
      rows, ins, columns, block, x.dtype, quant.FORMATS[name].levels(),
      "minimums" in named, PLANS[how])
  got = emulated(body, x[None], codes[None], named)[0]
  w = one.expected(name, codes, named, block, np.float32)
  want = x.astype(np.float64) @ w
  size = np.abs(x.astype(np.float64)) @ np.abs(w)
  print(np.max(np.abs(got.astype(np.float64) - want) / size))
