"""P-tuning (Liu et al. 2021, arXiv 2103.10385): prompts from an encoder.

  E' = [P, E[tokens]],  P = encoder(Z),  Z `[n, d]`

  mlp   P = relu(relu(Z W1 + b1) W2 + b2) W3 + b3
  lstm  P = relu(H W1 + b1) W2 + b2,  H `[n, 2 c]` of a bidirectional LSTM

Z ~ N(0, 1); weights and biases start at torch's U(-c^-1/2, c^-1/2) for c
inputs, in an LSTM for c its width. The encoder is of use in training alone:
files and decoding have P, and what is read is a `prompt.Prompt`.

Trainable parameters: n d, and with c the width of the encoder
c (2 d + c + 2) + d (mlp); of an LSTM of L layers 8 c (d + c + 2) +
8 c (3 c + 2) (L - 1) + 2 c (2 c + d + 1) + d.
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
from lora_jax.adapters import prompt

ENCODERS = {"mlp": "MLP", "lstm": "LSTM"}


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    tokens: n.
    encoder: a key of `ENCODERS`.
    hidden: width of the encoder; 0 is d.
    layers: of the LSTM.
  """

  tokens: int = 20
  encoder: str = "mlp"
  hidden: int = 0
  layers: int = 2

  def validate(self) -> None:
    prefix.check_tokens(self.tokens)
    prefix.check_hidden(self.hidden)
    errors.choose("adapter.options.encoder", self.encoder, ENCODERS)
    if not 1 <= self.layers <= 16:
      raise errors.UsageError(
          f"adapter.options.layers={self.layers} is out of range; use an "
          "integer from 1 to 16")


def _linear(x, w, b):
  return b + jnp.matmul(x, w, precision="highest")


@struct.dataclass
class MLP(base.Adapter):
  """Attributes:

    z: `[n, d]`.
    w1, w2, w3: `[d, c]`, `[c, c]`, `[c, d]`.
    b1, b2, b3: `[c]`, `[c]`, `[d]`.
    rank: `[]` int32.
  """

  z: types.Array = base.trained(None, None)
  w1: types.Array = base.trained(None, None)
  b1: types.Array = base.trained(None)
  w2: types.Array = base.trained(None, None)
  b2: types.Array = base.trained(None)
  w3: types.Array = base.trained(None, None)
  b3: types.Array = base.trained(None)
  rank: types.Array = base.frozen()

  def virtual(self):
    h = jax.nn.relu(_linear(self.z, self.w1, self.b1))
    h = jax.nn.relu(_linear(h, self.w2, self.b2))
    return _linear(h, self.w3, self.b3)

  def prepared(self, weight, shared=None):
    del weight, shared
    return prompt.Prompt(p=self.virtual(), rank=self.rank)


@struct.dataclass
class LSTM(base.Adapter):
  """Attributes:

    z: `[n, d]`.
    first: weights of the first layer's inputs, by direction `[2, d, 4 c]`.
    deeper: of the other layers', `[L - 1, 2, 2 c, 4 c]`; None if there is one.
    again: of the states, `[L, 2, c, 4 c]`.
    bias: of inputs and of states, `[L, 2, 2, 4 c]`.
    w1, w2: `[2 c, 2 c]`, `[2 c, d]`.
    b1, b2: `[2 c]`, `[d]`.
    rank: `[]` int32.
  """

  z: types.Array = base.trained(None, None)
  first: types.Array = base.trained(None, None, None)
  deeper: types.Array = base.trained(None, None, None, None)
  again: types.Array = base.trained(None, None, None, None)
  bias: types.Array = base.trained(None, None, None, None)
  w1: types.Array = base.trained(None, None)
  b1: types.Array = base.trained(None)
  w2: types.Array = base.trained(None, None)
  b2: types.Array = base.trained(None)
  rank: types.Array = base.frozen()

  def virtual(self):
    h = self.z
    for layer in range(self.again.shape[0]):
      into = self.first if layer == 0 else self.deeper[layer - 1]
      there, back = (
          _recur(x, into[i], self.again[layer, i], self.bias[layer, i].sum(0))
          for i, x in enumerate((h, h[::-1])))
      h = jnp.concatenate([there, back[::-1]], -1)
    return _linear(
        jax.nn.relu(_linear(h, self.w1, self.b1)), self.w2, self.b2)

  def prepared(self, weight, shared=None):
    del weight, shared
    return prompt.Prompt(p=self.virtual(), rank=self.rank)


def _recur(x, into, again, bias):
  """States `[n, c]` of an LSTM in one direction, gates as torch orders them."""

  def step(carry, new):
    h, cell = carry
    i, f, g, o = jnp.split(
        new + jnp.matmul(h, again, precision="highest"), 4)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return (h, cell), h

  zero = jnp.zeros(again.shape[0])
  return jax.lax.scan(step, (zero, zero), _linear(x, into, bias))[1]


def kind(slot: base.Slot) -> type[base.Adapter]:
  """Which encoder the options ask for."""
  return LSTM if slot.options.encoder == "lstm" else MLP


def init(key, weight, slot, shared=None):
  """The encoder and its inputs before the first step."""
  del shared
  options, d = slot.options, weight.shape[-1]
  c, l = options.hidden or d, options.layers
  keys = iter(jax.random.split(key, 9))
  z = jax.random.normal(next(keys), (options.tokens, d))

  def draw(*shape, fan_in):
    return prefix.uniform(next(keys), shape, fan_in)

  if kind(slot) is MLP:
    return MLP(
        z=z, w1=draw(d, c, fan_in=d), b1=draw(c, fan_in=d),
        w2=draw(c, c, fan_in=c), b2=draw(c, fan_in=c),
        w3=draw(c, d, fan_in=c), b3=draw(d, fan_in=c), rank=slot.rank)
  return LSTM(
      z=z, first=draw(2, d, 4 * c, fan_in=c),
      deeper=draw(l - 1, 2, 2 * c, 4 * c, fan_in=c) if l > 1 else None,
      again=draw(l, 2, c, 4 * c, fan_in=c),
      bias=draw(l, 2, 2, 4 * c, fan_in=c),
      w1=draw(2 * c, 2 * c, fan_in=2 * c), b1=draw(2 * c, fan_in=2 * c),
      w2=draw(2 * c, d, fan_in=2 * c), b2=draw(d, fan_in=2 * c),
      rank=slot.rank)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return {"num_virtual_tokens": options.tokens,
          "encoder_reparameterization_type": ENCODERS[options.encoder],
          "encoder_hidden_size": options.hidden or None,
          "encoder_num_layers": options.layers, "encoder_dropout": 0.0}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  names = {value: name for name, value in ENCODERS.items()}
  kind = config.get("encoder_reparameterization_type", "MLP")
  return {"options": {
      "tokens": int(config["num_virtual_tokens"]), "encoder": names[kind],
      "hidden": int(config.get("encoder_hidden_size") or 0),
      "layers": int(config.get("encoder_num_layers", 2))}}


_C = "(hidden or d)"
METHOD = method.Method(
    summary="E' = [encoder(Z), E[tokens]]", paper="arXiv 2103.10385",
    adapter=MLP, init=init, kind=kind,
    count=f"tokens * d + d + ({_C} * (2 * d + {_C} + 2) if encoder == 'mlp' "
          f"else 8 * {_C} * (d + {_C} + 2) + 2 * {_C} * (2 * {_C} + d + 1) "
          f"+ (layers - 1) * 8 * {_C} * (3 * {_C} + 2))",
    options=Options, targets="prompt", sites=("prompt",), ranked=False,
    identity_at_init=False, mergeable=False,
    tiny={"options": {"tokens": 3, "hidden": 16}},
    form=method.Form(
        peft_type="P_TUNING", config=_config, block=_block,
        lists_targets=False, tensors=prompt.tensors_of,
        adapters=prompt.adapters_of))
