"""What a layer keeps is written once, read again, and not computed again."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import keep as keep_lib
from lora_jax.models import remat
from lora_jax.models import tape

L, B, D = 4, 3, 8
# As users run it, which orders the sums of both alike; see tests/conftest.py.
OPTIMISED = {"xla_backend_optimization_level": 3}


def body(name, shared, h, xs, keep):
  """Two products; the first is kept if `name` is one of `remat.NAMES`."""
  number, w, a = xs
  up, low = keep(name, (h @ w, h @ a))
  h = h + jnp.tanh(up) * shared["shift"] + jnp.sin(low) * number
  return h, h.sum()


def operands():
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, *shape: jax.random.normal(key, shape) / D**0.5
  return (draw(keys[0], B, D), draw(keys[1], L, D, D),
          draw(keys[2], L, D, D), {"shift": draw(keys[3], D)})


def loss(run, h, a, w, shared):
  h, sums = run(shared, h, (jnp.arange(L, dtype=jnp.float32), w, a))
  return (h**2).sum() + (sums**3).sum() / 100


def plain(shared, h, xs):
  return jax.lax.scan(
      lambda h, xs: body("up", shared, h, xs, keep_lib.nothing), h, xs)


def taped(name):
  return functools.partial(tape.scan, functools.partial(body, name))


@pytest.mark.parametrize("name", ["up", "not a name"])
def test_values_and_gradients_are_those_of_a_scan(name):
  h, a, w, shared = operands()
  for arguments in ((0,), (1,), (0, 1), (0, 1, 2)):
    got, want = (jax.jit(jax.value_and_grad(
        functools.partial(loss, run), arguments), compiler_options=OPTIMISED)(
            h, a, w, shared)
                 for run in (taped(name), plain))
    jax.tree.map(functools.partial(
        np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
  np.testing.assert_allclose(
      jax.jit(functools.partial(loss, taped(name)))(h, a, w, shared),
      loss(plain, h, a, w, shared), rtol=1e-6)


def test_a_kept_product_is_not_computed_again():
  """Forwards two products; back two for h and one for a, and those that are
  not kept once more."""
  h, a, w, shared = operands()

  def products(name):
    text = jax.jit(jax.grad(functools.partial(loss, taped(name)), (0, 1))
                   ).lower(h, a, w, shared).compile().as_text()
    return len(re.findall(r" dot\(", text))

  assert products("up") == 5
  assert products("not a name") == 7


def test_stacks_have_what_was_kept():
  h, a, w, shared = operands()
  _, pull = jax.vjp(
      lambda h: loss(taped("up"), h, a, w, shared), h)
  shapes = [x.shape for x in jax.tree.leaves(pull)]
  assert shapes.count((L, B, D)) == 2  # up and low,
  assert shapes.count((L + 1, B, D)) == 1  # and every layer's input.


def test_values_come_back_in_order():
  stacks = [jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.bfloat16)]
  record = tape.Record(stacks, jnp.int32(1))
  record("q", jnp.ones(3))
  record("nothing", jnp.ones(3))
  record("mid", jnp.full(3, 2, jnp.bfloat16))
  np.testing.assert_array_equal(record.stacks[0], [[0] * 3, [1] * 3])
  assert record.stacks[1].dtype == jnp.bfloat16
  replay = tape.Replay([stack[1] for stack in record.stacks])
  np.testing.assert_array_equal(replay("q", jnp.zeros(3)), [1] * 3)
  np.testing.assert_array_equal(replay("nothing", jnp.zeros(3)), [0] * 3)
  np.testing.assert_array_equal(
      replay("mid", jnp.zeros(3, jnp.bfloat16)), [2] * 3)
  assert {"q", "mid"} <= set(remat.NAMES)


@pytest.mark.parametrize("axes", [
    (None, 0, None), (None, None, 0), (0, 0, 0), (0, None, None)])
def test_under_vmap(axes):
  """Members have their own stacks, whatever of theirs is their own."""
  h, a, w, shared = operands()
  many = [jax.tree.map(lambda x: jnp.stack([x, 2 * x, x[::-1]]), tree)
          if axis == 0 else tree
          for tree, axis in zip((h, a, shared), axes, strict=True)]

  def members(run):
    def one(h, a, shared):
      return jax.value_and_grad(functools.partial(loss, run), (0, 1))(
          h, a, w, shared)
    return jax.jit(jax.vmap(one, axes), compiler_options=OPTIMISED)(*many)

  jax.tree.map(functools.partial(
      np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
               members(taped("up")), members(plain))


def test_under_vmap_values_stand_as_of_one_batch():
  """A layer's values of all members are neighbours, written where they stay."""
  h, a, w, shared = operands()
  lowered = jax.jit(jax.vmap(
      jax.grad(functools.partial(loss, taped("up")), 1),
      (0, None, None, None))).lower(jnp.stack([h] * 5), a, w, shared)
  stacks = re.findall(
      r"dynamic_update_slice.*-> tensor<([0-9x]+)xf32>", lowered.as_text())
  assert f"{L}x5x{B}x{D}" in stacks and f"5x{L}x{B}x{D}" not in stacks
  # Not whole stacks, for each layer.
  text = lowered.compile(compiler_options=OPTIMISED).as_text()
  assert f"f32[{L},5,{B},{D}]" in text
  assert not re.findall(
      rf"f32\[(?:{L},5|5,{L}),{B},{D}\]\S* copy\(%(?:get-tuple|bitcast)", text)
