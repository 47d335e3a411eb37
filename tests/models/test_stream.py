"""Layers in host memory compute what layers on the device do, and stay there.

CPUs have both kinds of memory, so that all of it but the speed is real.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import host as host_lib
from lora_jax import trees
from lora_jax.models import remat
from lora_jax.models import stream
from lora_jax.train import step as step_lib
from tests.adapters import contract

KEY = jax.random.key(5)
L, B, D = 4, 8, 16


def toy(policy, spill, key):
  """(loss of trained arrays and weights, both): a residual tanh network."""
  keys = jax.random.split(key, 5)
  draw = lambda k, *shape: jax.random.normal(k, shape) / 4
  weights = {"w": draw(keys[0], L, D, 3 * D), "v": draw(keys[1], L, 3 * D, D)}
  trained = draw(keys[2], L, D, D), draw(keys[3], B, D)
  shift = draw(keys[4], D)

  def body(shared, h, xs, keep):
    number, weights, a = xs
    up = keep("up", h @ weights["w"])
    h = h + jnp.tanh(up) @ weights["v"] + h @ a * number + shared["shift"]
    return h, h.sum()

  def loss(trained, weights):
    a, h = trained
    h, sums = stream.scan(
        body, {"shift": shift, "key": KEY}, h,
        (jnp.arange(L, dtype=jnp.float32), weights, a),
        remat=policy, spill=spill)
    return (h ** 2).sum() + (sums ** 3).sum() / 100

  return loss, trained, weights


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("policy", remat.POLICIES)
def test_values_and_gradients_are_those_of_a_scan(policy, spill):
  """Of the carry, the inputs and the outputs, whichever of them is there."""
  loss, trained, weights = toy(policy, spill, KEY)
  plain, *_ = toy(policy, False, KEY)
  expected = jax.jit(jax.value_and_grad(plain))(trained, weights)
  for where in (weights, jax.tree.map(host_lib.on_host, weights)):
    got = jax.jit(jax.value_and_grad(loss))(trained, where)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, expected))):
      np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    # Without a gradient it is the same loop.
    np.testing.assert_allclose(
        jax.jit(loss)(trained, where), expected[0], rtol=1e-6)


def scans(jaxpr):
  """Every scan in a program, at any depth."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan":
      yield eqn
    for part in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(part, "jaxpr", part)
      if hasattr(inner, "eqns"):
        yield from scans(inner)


def stacked(method, fmt, settings, host=True):
  """(shape, memory) of what the scans of a gradient give layer by layer."""
  trained, frozen, base, away = placed(method, fmt)
  data = contract.stacked(contract.batch())
  traced = jax.jit(functools.partial(
      step_lib.loss_and_grads, model=contract.CONFIG, settings=settings)
  ).trace(trained, frozen, away if host else base, data, KEY)
  return [(var.aval.shape, var.aval.memory_space)
          for eqn in scans(traced.jaxpr.jaxpr)
          if eqn.params["length"] == contract.CONFIG.n_layers
          for var in eqn.outvars
          if var.aval.shape[:1] == (contract.CONFIG.n_layers,)]


def placed(method, fmt):
  """(trained, frozen, base on the device, base in host memory)."""
  base, tree = contract.randomised(method, fmt)
  return *adapters_lib.split(tree), base, host_lib.placed(base)


@pytest.mark.parametrize("policy", remat.POLICIES)
@pytest.mark.parametrize("fmt", ["none", "nf4"])
def test_no_weight_is_kept_between_the_passes(fmt, policy):
  # The dots of DoRA are A B, too, as large as a weight, wherever that is.
  method = "lora" if policy == "dots" else "dora"
  found = stacked(method, fmt, step_lib.Settings(remat=policy, noise=True))
  *_, away = placed(method, fmt)
  weights = {w.shape for x in away.layers.values()
             if len((w := getattr(x, "weight", x)).shape) == 3}
  codes = {x.shape for x in jax.tree.leaves(away.layers) if host_lib.in_host(x)}
  # Gradients of A and B are stacked, and smaller.
  assert len(weights) >= 4 and len(codes) >= 4
  assert not {shape for shape, _ in found} & (weights | codes)
  if policy == "full":
    kept = [s for s, _ in found if s[1:3] == contract.batch().tokens.shape]
    assert kept == [(contract.CONFIG.n_layers, 2, 12, contract.CONFIG.d_model)]


@pytest.mark.parametrize("policy", ["named", "full"])
def test_what_is_spilled_is_in_host_memory(policy):
  """The layer's input too, which a policy by names would leave behind."""
  settings = step_lib.Settings(
      remat=policy, noise=True, offload=("activations",))
  c, (b, t) = contract.CONFIG, contract.batch().tokens.shape
  for host in (False, True):
    kept = [(shape[3:], space) for shape, space in stacked(
        "lora", "nf4", settings, host) if shape[:3] == (c.n_layers, b, t)]
    assert ((c.d_model,), host_lib.HOST) in kept
    # Not o: o_proj is not adapted, and nobody else reads it again.
    assert len(kept) == (1 if policy == "full" else 7)
    assert all(space == host_lib.HOST for _, space in kept)


@functools.partial(jax.jit, static_argnames="settings")
def gradient(trained, frozen, base, settings):
  data = contract.stacked(contract.batch())
  return step_lib.loss_and_grads(
      trained, frozen, base, data, KEY, model=contract.CONFIG,
      settings=settings)


def equal_gradients(method, fmt, policy, *offload):
  trained, frozen, base, away = placed(method, fmt)
  settings = step_lib.Settings(remat=policy, noise=True)
  value, grads = gradient(trained, frozen, base, settings)
  settings = step_lib.Settings(remat=policy, noise=True, offload=offload)
  got, ours = gradient(trained, frozen, away, settings)
  assert abs(got - value) <= 1e-6 * abs(value)
  ours = trees.paths(ours)
  for path, g in trees.paths(grads).items():
    scale = np.linalg.norm(g)
    assert scale > 0, path
    assert np.linalg.norm(ours[path] - g) <= 1e-6 * scale, path


def test_same_loss_and_gradients():
  """`train/test_offload.py` has full remat and DoRA."""
  equal_gradients("lora", "nf4", "named")


@pytest.mark.slow  # 32 programs: minutes.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("offload", [(), ("activations",)])
@pytest.mark.parametrize("policy", remat.POLICIES)
@pytest.mark.parametrize("fmt", ["none", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_same_in_every_case(method, fmt, policy, offload):
  equal_gradients(method, fmt, policy, *offload)
