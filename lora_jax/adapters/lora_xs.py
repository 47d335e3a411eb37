"""LoRA-XS: an r x r matrix between singular vectors (Balazy et al. 2405.17604).

  h = x W0 + s x A R B,  A = U_r S_r `[i, r]`,  B = V_r' `[r, o]`

of the (dequantised) weight's truncated SVD; A and B stay as they are. The paper
draws R `[r, r]` from N(0, 1e-10); here it starts at 0, which has a gradient as
well, so that h = x W0.

Trainable parameters: r^2 a matrix.
"""

from __future__ import annotations

import jax.numpy as jnp

from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import method


@struct.dataclass
class LoRAXS(additive.Additive):
  """Attributes:

    core: `[r, r]`, R.
    a, b: `[i, r]`, `[r, o]`, frozen.
    scale: `[]`, s.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
  """

  core: types.Array = base.up(None, None)
  a: types.Array = base.frozen("in", None)
  b: types.Array = base.frozen(None, "out")
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()

  def factors(self):
    core = self.active(self.scale, 0.0) * self.core
    return self.a, jnp.matmul(core, self.b, precision="highest")

  def down_up(self, x):
    core = self.active(self.scale, 0.0) * self.core
    return x @ self.a.astype(x.dtype) @ core.astype(x.dtype) @ self.b.astype(
        x.dtype)

  def to_peft(self, embedding=False):
    return {"core": self.core, "a": self.a, "b": self.b}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(**{name: jnp.asarray(tensors[name], jnp.float32)
                  for name in ("core", "a", "b")}, **slot.values())


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  r = slot.width
  u, s, vt = jnp.linalg.svd(
      quant.dequantize(weight, jnp.float32), full_matrices=False)
  return LoRAXS(core=jnp.zeros((r, r), jnp.float32), a=u[:, :r] * s[:r],
                b=vt[:r], **slot.values())


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) x A R B, A and B of W0's SVD",
    paper="arXiv 2405.17604", adapter=LoRAXS, init=init, count="r * r")
