"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199).

  o' = o + g softmax(s q (P W_k)^T) (P W_v)   before o_proj

with P `[n, d]` ~ N(0, 1) trained in every adapted layer, the layer's own frozen
k_proj and v_proj (biases included), q rotated and P's keys not. The softmax is
P's own, beside that over the tokens, so that a gate of zero leaves the model as
it was:

  llama_adapter    g = tanh(gate), gate `[h]` = 0    as in the paper
  adaption_prompt  g = gate, `[1]` = 0               as in PEFT

The paper adapts the last layers: adapter.layers="last 30" of LLaMA-7B's 32.

Trainable parameters: n d + h a layer (n d + 1).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import prefix
from lora_jax.kernels.attention import base as attention_base


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    tokens: n.
  """

  tokens: int = 10

  def validate(self) -> None:
    prefix.check_tokens(self.tokens)


@struct.dataclass
class LlamaAdapter(base.Adapter):
  """Attributes:

    prompt: `[n, d]`.
    gate: `[h]`.
    rank: `[]` int32.
  """

  prompt: types.Array = base.trained(None, None)
  gate: types.Array = base.up("heads")
  rank: types.Array = base.frozen()

  def gates(self) -> jax.Array:
    """g `[h]`, or `[1]` for all heads."""
    return jnp.tanh(self.gate)

  def attended(self, q, o, project, scale):
    b, t, h, e = q.shape
    p = self.prompt.astype(q.dtype)
    k, v = (project(p, name).reshape(p.shape[0], -1, e)
            for name in ("k_proj", "v_proj"))

    def attend(q, k, v):
      grouped = q.reshape(b, t, k.shape[1], -1, e)
      logits = scale * jnp.einsum(
          "btkge,nke->btkgn", grouped, k, preferred_element_type=jnp.float32)
      found = jnp.einsum(
          "btkgn,nke->btkge", jax.nn.softmax(logits).astype(v.dtype), v)
      return found.reshape(b, t, h, e)

    found = attention_base.wide_on_cpu(
        attend, q, k, v, dtypes=(jnp.float16, jnp.bfloat16))
    gates = self.active(self.gates(), 0.0)
    return o + gates[:, None].astype(o.dtype) * found


@struct.dataclass
class AdaptionPrompt(LlamaAdapter):
  """Attributes:

    prompt: `[n, d]`.
    gate: `[1]`.
    rank: `[]` int32.
  """

  gate: types.Array = base.up(None)

  def gates(self):
    return self.gate

  def to_peft(self, embedding=False):
    return {"adaption_prompt": self.prompt[None], "adaption_gate": self.gate}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(
        prompt=jnp.asarray(tensors["adaption_prompt"][0], jnp.float32),
        gate=jnp.asarray(tensors["adaption_gate"], jnp.float32),
        rank=slot.rank)


def _init(cls):
  def init(key, weight, slot, shared=None):
    """The adapter of one layer before the first step."""
    del weight, shared
    g = slot.geometry
    return cls(
        prompt=jax.random.normal(key, (slot.options.tokens, g.d)),
        gate=jnp.zeros(g.h if cls is LlamaAdapter else 1), rank=slot.rank)

  return init


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"adapter_len": config.options.tokens}


def _places(ranks: Mapping[str, list[int]]) -> dict[str, Any]:
  """PEFT counts the adapted layers from the top.

  Raises:
    errors.UserError: if they are not the last ones.
  """
  adapted = [rank > 0 for rank in ranks["self_attn"]]
  n = sum(adapted)
  if not all(adapted[-n:]):
    raise errors.UserError(
        "PEFT's adaption prompts are in the last layers, and these are in "
        f'others; use adapter.layers="last {n}"')
  return {"target_modules": "self_attn", "adapter_layers": n}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"options": {"tokens": int(config["adapter_len"])}}


def _method(summary, cls, count, form=None):
  return method.Method(
      summary=summary, paper="arXiv 2303.16199", adapter=cls, init=_init(cls),
      count=count, options=Options, targets="self_attn", sites=("self_attn",),
      ranked=False, mergeable=False, zero_gradients=("prompt",),
      tiny={"options": {"tokens": 3}}, form=form)


METHOD = _method(
    "o' = o + tanh(gate) softmax(q (P W_k)^T) P W_v", LlamaAdapter,
    "tokens * d + h")
ADAPTION_PROMPT = _method(
    "o' = o + gate softmax(q (P W_k)^T) P W_v", AdaptionPrompt,
    "tokens * d + 1", method.Form(
        peft_type="ADAPTION_PROMPT", config=_config, block=_block,
        places=_places, lists_targets=False))
