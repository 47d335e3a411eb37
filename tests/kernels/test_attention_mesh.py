"""Rows and heads are cut by a mesh, and no device gathers another's."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from tests import devices

PROGRAM = """
import dataclasses, re
import jax, jax.numpy as jnp, numpy as np
from lora_jax import mesh as mesh_lib
from lora_jax.kernels.attention import base
from lora_jax.kernels.attention import cudnn
from tests.kernels import oracle

mesh = mesh_lib.make(mesh_lib.MeshConfig(data=2, tensor=2))
call = oracle.call(oracle.PACKED[:2])
real = np.asarray(call.q_segments) > 0
put = lambda x, axes: mesh_lib.put(mesh, x, axes)
qkv = [put(x, ("batch", None, "heads", None))
       for x in (call.q, call.k, call.v)]
first = put(base.starts(call.q_segments), ("batch", None))

def kernel(q, k, v, first):
  assert q.shape[0] == 1 and q.shape[2] == 2 and k.shape[2] == 1
  at = jnp.arange(q.shape[1])
  seen = (at[:, None] >= at) & (at >= first[..., None])
  return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])

@jax.jit
def run(q, k, v, first):
  out, pull = jax.vjp(lambda *qkv: base.sharded(
      mesh, kernel, *qkv, first, axes=(*[base.HEADS] * 3, base.TOKENS)),
                      q, k, v)
  return out, *pull(out)

text = run.lower(*qkv, first).compile().as_text()
assert not re.search("all-gather|all-to-all|collective-permute|all-reduce",
                     text)
out = run(*qkv, first)[0]
assert out.sharding.spec == qkv[0].sharding.spec, out.sharding
np.testing.assert_allclose(np.asarray(out)[real], oracle.attend(call)[real],
                           atol=2e-6)

# cuDNN's call is cut by jax, as this is by XLA, from what it is given.
for layout in "packed", "single":
  lengths = oracle.PACKED if layout == "packed" else oracle.SINGLE
  call = oracle.call(lengths[:2], layout=layout)
  call = dataclasses.replace(
      call, options=dataclasses.replace(call.options, mesh=mesh))
  run = jax.jit(lambda q, k, v: cudnn.attend(
      dataclasses.replace(call, q=q, k=k, v=v), "xla"))
  text = run.lower(*qkv).compile().as_text()
  assert not re.search("all-gather|all-to-all|all-reduce", text)
  real = np.asarray(call.q_segments) > 0
  np.testing.assert_allclose(
      np.asarray(run(*qkv))[real], oracle.attend(call)[real], atol=2e-6)
print("done")
"""


def test_cut_by_rows_and_heads():
  run = subprocess.run(
      [sys.executable, "-c", PROGRAM], text=True, timeout=300,
      cwd=pathlib.Path(__file__).parents[2], capture_output=True,
      env=devices.environ(4))
  assert run.stdout.strip() == "done", run.stderr[-3000:]
