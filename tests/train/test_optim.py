"""Schedules by hand, AdamW against torch's."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors
from lora_jax.train import optim


def rates(steps, **fields):
  fields = {"learning_rate": 2.0, "warmup": 0} | fields
  return optim.learning_rates(optim.OptimConfig(**fields), steps)


def test_warmup_by_steps_and_by_ratio():
  # 4 of 10 steps: a quarter of the peak on the first, the peak on the last.
  expected = [0.5, 1.0, 1.5, 2.0] + [2.0] * 6
  for warmup in (4, 0.4):
    np.testing.assert_allclose(
        rates(10, schedule="constant", warmup=warmup), expected, rtol=1e-6)


def test_warmup_of_all_steps_and_none():
  np.testing.assert_allclose(
      rates(4, schedule="cosine", warmup=100), [0.5, 1.0, 1.5, 2.0])
  assert rates(0).shape == (0,)
  assert rates(3).dtype == np.float32


def test_cosine():
  # 2 of warm-up, then 8 steps: half a cosine from the peak on.
  got = rates(10, schedule="cosine", warmup=2)
  expected = [1.0, 2.0] + [1 + math.cos(math.pi * i / 8) for i in range(8)]
  # To a unit in the last place of the peak: 1 + cos cancels at the end.
  np.testing.assert_allclose(got, expected, rtol=0, atol=2.4e-7)
  assert rates(8, schedule="cosine", final=0.5)[4] == pytest.approx(1.5)


def test_linear():
  np.testing.assert_allclose(
      rates(5, schedule="linear"), [2.0, 1.6, 1.2, 0.8, 0.4], rtol=1e-6)
  np.testing.assert_allclose(
      rates(4, schedule="linear", final=0.5), [2.0, 1.75, 1.5, 1.25],
      rtol=1e-6)


def test_warmup_stable_decay():
  # 10 steps, 2 of warm-up; 8 are left, of which half decays.
  got = rates(10, schedule="wsd", warmup=2, decay=0.5)
  np.testing.assert_allclose(
      got, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5], rtol=1e-6)


def test_inverse_square_root():
  # From a warm-up of 4 on: 2 sqrt(4 / (4 + i)).
  got = rates(9, schedule="inverse_sqrt", warmup=4)
  expected = [0.5, 1.0, 1.5, 2.0] + [
      2 * math.sqrt(4 / (4 + i)) for i in range(5)]
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("field, value", [
    ("learning_rate", 1e30), ("learning_rate", -1.0),
    ("learning_rate", math.nan), ("warmup", -1.0), ("weight_decay", -0.1),
    ("clip_norm", -1.0), ("b1", 1.5), ("eps", -1e-8), ("decay", 1.5),
    ("final", -0.5), ("schedule", "cosin"), ("lora_plus_ratio", -1.0),
    ("lora_plus_embedding", 1e3)])
def test_bad_values(field, value):
  with pytest.raises(errors.UsageError, match=f"optim.{field}"):
    optim.OptimConfig(**{field: value}).validate()


def test_only_matrices_decay():
  params = {
      "layers": {"a": jnp.ones((3, 4, 2)), "magnitude": jnp.ones((3, 4)),
                 "gate": jnp.ones(3)},
      "outer": {"a": jnp.ones((4, 2)), "norm": jnp.ones(4)}}
  assert optim.decay_mask(params) == {
      "layers": {"a": True, "magnitude": False, "gate": False},
      "outer": {"a": True, "norm": False}}


@functools.partial(jax.jit, static_argnums=3)
def _steps(params, grads, hyper, n):
  """Parameters after each of n steps with the gradients `[n, ...]`."""
  state = optim.transform(hyper).init(params)
  found = []
  for i in range(n):
    updates, state = optim.transform(hyper).update(
        jax.tree.map(lambda g, i=i: g[i], grads), state, params)
    params = optax.apply_updates(params, updates)
    found.append(params)
  return found


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_against_torch(clip):
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  shapes = {"a": (5, 3), "b": (3, 4), "m": (4,)}
  params = {k: rng.normal(size=s).astype(np.float32)
            for k, s in shapes.items()}
  grads = {k: rng.normal(size=(5, *s)).astype(np.float32)
           for k, s in shapes.items()}
  config = optim.OptimConfig(
      weight_decay=0.3, clip_norm=clip, b1=0.8, b2=0.95, eps=1e-5)
  ours = _steps(params, grads, optim.hyper(config, 0.05), 5)

  theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
  optimiser = torch.optim.AdamW(
      [{"params": [theirs["a"], theirs["b"]], "weight_decay": 0.3},
       {"params": [theirs["m"]], "weight_decay": 0.0}],
      lr=0.05, betas=(0.8, 0.95), eps=1e-5)
  for i in range(5):
    for k, p in theirs.items():
      p.grad = torch.tensor(grads[k][i])
    if clip:
      torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
    optimiser.step()
    for k, p in theirs.items():
      np.testing.assert_allclose(
          ours[i][k], p.detach().numpy(), rtol=0, atol=2e-6)


def test_clipping_can_be_off():
  params = {"a": jnp.zeros((2, 2))}
  grads = {"a": jnp.full((1, 2, 2), 1e6)}
  config = optim.OptimConfig(clip_norm=0.0, b1=0.0, b2=0.0, eps=1.0)
  # Adam without memory: g / (|g| + eps).
  got = _steps(params, grads, optim.hyper(config, 1.0), 1)[0]["a"]
  np.testing.assert_allclose(got, np.full((2, 2), -1 / (1 + 1e-6)), rtol=1e-6)


def test_adam_invariance():
  """(alpha/(pq), p A, q B, p lr_A, q lr_B): the same losses, with eps=0.

  Adam's update does not depend on the gradient's scale, so that A and B stay
  p and q times what they are without, and s A B stays the same.
  """
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 4))
  a, b = rng.normal(size=(5, 2)), rng.normal(size=(2, 4)) * 0.1

  def losses(p, q):
    with jax.enable_x64(True):
      factors = {"a": jnp.asarray(p * a), "b": jnp.asarray(q * b)}
      rate = {"a": p * 0.01, "b": q * 0.01}
      scale = 2.0 / (p * q)
      fields = dict(weight_decay=0.0, clip_norm=np.inf, b1=0.9, b2=0.999,
                    eps=0.0)
      unit = optim.transform(optim.Hyper(learning_rate=1.0, **fields))
      state = unit.init(factors)
      fit = lambda f: jnp.mean((scale * x @ f["a"] @ f["b"] - y) ** 2)
      found = []
      for _ in range(6):
        value, grads = jax.value_and_grad(fit)(factors)
        found.append(float(value))
        updates, state = unit.update(grads, state, factors)
        factors = {k: v + rate[k] * updates[k] for k, v in factors.items()}
      return np.asarray(found)

  base = losses(1.0, 1.0)
  assert base[-1] < base[0]
  np.testing.assert_allclose(losses(4.0, 0.5), base, rtol=1e-12)
