"""8-bit Adam: bitsandbytes' codes and maxima, step by step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import trees
from lora_jax.quant import dynamic
from lora_jax.train import adam8bit
from lora_jax.train import optim
from lora_jax.train import step as step_lib

RATE = 0.01
CONFIG = optim.OptimConfig(
    name="adamw8bit", weight_decay=0.1, clip_norm=0.0, b1=0.8)
# Whole blocks in a row, rows in a block, blocks across rows and a tail, few
# values; a stack of two layers, each of which is a tensor to bitsandbytes.
SHAPES = {"columns": (16, 512), "rows": (576, 16), "tail": (67, 75),
          "small": (63, 65)}
STACK = (2, 64, 96)


def params(rng, scale=1.0):
  """Random leaves over several decades."""
  def one(shape):
    wide = np.exp(rng.standard_normal(shape))
    return np.float32(scale * wide * rng.standard_normal(shape))

  return {"outer": {k: one(s) for k, s in SHAPES.items()},
          "layers": {"stack": one(STACK)}}


def tensors(tree):
  """What bitsandbytes has as tensors, by name."""
  found = {k: np.asarray(v) for k, v in tree["outer"].items()}
  stack = np.asarray(tree["layers"]["stack"])
  return found | {f"layer{i}": x for i, x in enumerate(stack)}


@jax.jit
def _step(tree, grads, state, hyper):
  updates, state = optim.transform(hyper, name=CONFIG.name).update(
      grads, state, tree)
  return optax.apply_updates(tree, updates), state


def _init(tree):
  return optim.transform(
      optim.hyper(CONFIG, RATE), name=CONFIG.name).init(tree)


@pytest.fixture
def bitsandbytes(monkeypatch):
  """AdamW8bit with the nearest codes.

  On CPU its encoder is a table that misses the nearest code for 1% of first
  and 20% of second moments. Its own branch for other types than 16- and
  32-bit floats looks for the nearest.
  """
  pytest.importorskip("torch")
  module = pytest.importorskip("bitsandbytes")
  from bitsandbytes.backends.cpu import ops

  encode = ops._quant_blockwise_fp32_direct
  monkeypatch.setattr(
      ops, "_quant_blockwise_fp32_direct",
      lambda values, *rest: encode(values.double(), *rest))
  return module


def test_codes_are_those_of_bitsandbytes(bitsandbytes):
  import torch

  rng = np.random.default_rng(0)
  tree = params(rng)
  theirs = {k: torch.nn.Parameter(torch.tensor(v))
            for k, v in tensors(tree).items()}
  adam = bitsandbytes.optim.AdamW8bit(
      theirs.values(), lr=RATE, betas=(CONFIG.b1, CONFIG.b2), eps=CONFIG.eps,
      weight_decay=CONFIG.weight_decay)
  state = _init(tree)
  hyper, room = optim.hyper(CONFIG, RATE), dict.fromkeys(theirs, 0.0)
  for number in range(5):
    before = tensors(tree)
    grads = params(rng, 10.0 ** -number)  # The maxima move.
    tree, state = _step(tree, grads, state, hyper)
    for k, g in tensors(grads).items():
      theirs[k].grad = torch.tensor(g)
    adam.step()
    ours = tensors(tree)
    moments = {field: tensors(getattr(state[1], field))
               for field in ("mu", "nu")}
    maxima = {field: state[1]._asdict()[f"{field}_absmax"]
              for field in ("mu", "nu")}
    for k, p in theirs.items():
      _compare(adam.state[p], k, moments, maxima)
      # 1 - b2 in float32 is 1.3e-5 off.
      room[k] += 1e-5 * np.abs(ours[k] - before[k]) + 3e-7 * np.abs(ours[k])
      assert (np.abs(ours[k] - p.detach().numpy()) <= room[k] + 1e-6).all(), k


def _compare(theirs, name, moments, maxima):
  for field, number in (("mu", 1), ("nu", 2)):
    codes = theirs[f"state{number}"].numpy()
    ours = moments[field][name]
    assert ours.dtype == codes.dtype, (name, field)
    if name == "small":
      np.testing.assert_allclose(
          ours, codes, rtol=2e-5, atol=1e-7 * np.abs(codes).max())
      assert maxima[field]["outer"][name] is None
      continue
    np.testing.assert_array_equal(ours, codes, err_msg=f"{name} {field}")
    absmax = (maxima[field]["layers"]["stack"][int(name[-1])]
              if name.startswith("layer") else maxima[field]["outer"][name])
    # 1 - b2 in float32 is 1.3e-5 off.
    np.testing.assert_allclose(
        np.ravel(absmax), theirs[f"absmax{number}"].numpy(), rtol=2e-5)


def test_a_negative_moment_keeps_its_sign():
  """As in bitsandbytes' CUDA kernel; its CPU path has no such line."""
  g = np.full((16, 256), 1e-9, np.float32)
  g[:, 0] = 1.0
  g[:, 1] = -1e-9
  g[:, 2] = 0.0
  tree = {"a": jnp.zeros_like(g)}
  _, state = _step(tree, {"a": g}, _init(tree), optim.hyper(CONFIG, RATE))
  zero = int(np.flatnonzero(dynamic.table() == 0)[0])
  np.testing.assert_array_equal(
      state[1].mu["a"][:, :4], [[255, zero - 1, zero, zero]] * 16)
  # Its square is 0 beside 1, as all but the first are.
  np.testing.assert_array_equal(
      state[1].nu["a"][:, :4], [[255, 0, 0, 0]] * 16)


def test_a_block_of_zeros_stays_zero():
  tree = {"a": jnp.ones((16, 512))}
  state = _init(tree)
  config = optim.hyper(optim.OptimConfig(weight_decay=0.0), RATE)
  for _ in range(2):
    tree, state = _step(tree, {"a": jnp.zeros((16, 512))}, state, config)
  np.testing.assert_array_equal(tree["a"], 1.0)
  np.testing.assert_array_equal(state[1].nu["a"], 0)
  np.testing.assert_array_equal(state[1].mu_absmax["a"], 0)


def test_two_bytes_a_parameter():
  tree = {"layers": {"a": jnp.zeros((3, 576, 16)), "b": jnp.zeros((3, 16, 512)),
                     "magnitude": jnp.zeros((3, 512))}}
  large = 3 * (576 * 16 + 16 * 512)
  state = step_lib.init_state(tree, optimizer="adamw8bit").opt_state[1]
  expected = large * (2 + 2 * 4 / 256) + 8 * 3 * 512 + 4
  assert trees.nbytes(state) == expected
  assert state.mu_absmax["layers"]["magnitude"] is None
  assert state.nu_absmax["layers"]["a"].shape == (3, 36, 1)
  assert state.nu_absmax["layers"]["b"].shape == (3, 16, 2)


def test_small_moments_follow_the_config():
  tree = {"small": jnp.zeros((4, 4)), "large": jnp.zeros((64, 64))}
  state = adam8bit.scale_by_adam(0.9, 0.999, 1e-8, "bfloat16").init(tree)
  assert state.mu["small"].dtype == jnp.bfloat16
  assert state.nu["small"].dtype == jnp.float32
  assert state.mu["large"].dtype == state.nu["large"].dtype == jnp.uint8
