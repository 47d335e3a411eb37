"""LoRA-FA's optimiser against PEFT's, and what it trains."""

from __future__ import annotations

import dataclasses
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import lora_fa
from lora_jax.adapters import method
from lora_jax.adapters import registry
from lora_jax.train import optim
from lora_jax.train import step
from tests.adapters import contract

torch = pytest.importorskip("torch")
lorafa = pytest.importorskip("peft.optimizers.lorafa")

I, R, O, SCALE = 7, 3, 5, 2.5


def adapter(rng):
  """Two layers, of which one has a smaller rank and one none."""
  a = rng.standard_normal((3, I, R)).astype(np.float32)
  a[1, :, 2:] = 0
  a[2] = 0
  return lora_fa.LoRAFA(
      a=jnp.asarray(a), b=jnp.zeros((3, R, O)), rate=jnp.zeros(3),
      scale=jnp.asarray([SCALE, SCALE, 0.0]), rank=jnp.asarray([3, 2, 0]))


@pytest.mark.parametrize("layer, rank", [(0, 3), (1, 2)])
def test_the_projected_gradient_is_pefts(layer, rank, monkeypatch):
  """Steps of its optimiser, whose products it makes in bfloat16 otherwise."""
  monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
  rng = np.random.default_rng(0)
  one = adapter(rng)
  tree = base_lib.Adapters(layers={"q_proj": one})
  params, frozen = adapters_lib.split(tree)
  transform = lora_fa.Projection().wrap(optax.chain(
      optax.scale_by_adam(0.9, 0.999, 0.0), optax.scale(-0.01)))
  state = transform.init(params)

  class Module(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.lora_A = torch.nn.ModuleDict({
          "default": torch.nn.Linear(I, rank, bias=False)})
      self.lora_B = torch.nn.ModuleDict({
          "default": torch.nn.Linear(rank, O, bias=False)})
      self.scaling = {"default": SCALE}

  class Whole(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.q_proj = Module()
      self.active_adapters = ["default"]
      self.peft_config = {
          "default": python_types.SimpleNamespace(use_rslora=False)}

  model = Whole()
  a, b = (getattr(model.q_proj, f"lora_{x}")["default"].weight for x in "AB")
  with torch.no_grad():
    a.copy_(torch.from_numpy(np.array(one.a[layer, :, :rank].T)))
    b.zero_()
  descent = lorafa.create_lorafa_optimizer(model, rank, SCALE * rank, 0.01)
  descent.param_groups[0]["eps"] = 0.0
  update = jax.jit(transform.update)
  for _ in range(3):
    g = rng.standard_normal((3, R, O)).astype(np.float32)
    g[1, 2:] = 0
    g[2] = 0
    grads = dataclasses.replace(params, layers={
        "q_proj": dataclasses.replace(params.layers["q_proj"], b=g)})
    updates, state = update(grads, state, params, frozen=frozen)
    # Adam without eps has 0/0 where nothing is trained.
    updates = jax.tree.map(jnp.nan_to_num, updates)
    params = optax.apply_updates(params, updates)
    b.grad = torch.from_numpy(g[layer, :rank].T.copy())
    descent.step()
    found = np.asarray(params.layers["q_proj"].b)[layer, :rank].T
    np.testing.assert_allclose(
        found, b.detach().numpy(), rtol=0, atol=2e-6)
    assert np.abs(found).max() > 1e-3


def test_it_is_nearest_to_the_gradient_of_the_weight():
  """s A (s^-2 (A^T A)^-1 g) with g = s A^T G is G's projection."""
  rng = np.random.default_rng(1)
  one = adapter(rng)
  whole = rng.standard_normal((3, I, O)).astype(np.float32)
  s = np.asarray(one.scale)[:, None, None]
  g = s * np.einsum("lir,lio->lro", one.a, whole)
  found = lora_fa._projected(dataclasses.replace(one, b=jnp.asarray(g)), one)
  q, _ = np.linalg.qr(np.asarray(one.a[0], np.float64))
  np.testing.assert_allclose(
      SCALE * np.asarray(one.a[0]) @ found.b[0], q @ q.T @ whole[0],
      rtol=0, atol=1e-4)
  assert not found.b[2].any()


def test_only_b_is_trained_and_rules_come_by_option():
  base, tree = contract.built("lora_fa", "none")
  params, frozen = adapters_lib.split(tree)
  assert {f.name for a in params.layers.values()
          for f in dataclasses.fields(a)
          if getattr(a, f.name) is not None} == {"b"}
  plain, = registry.rules(contract.block("lora_fa"), 5, tree)
  assert plain.penalty(params) is None and type(plain) is method.Rule
  rules = registry.rules(
      contract.block("lora_fa", options={"projected": True}), 5, tree)
  hyper = optim.hyper(optim.OptimConfig(clip_norm=0.0, eps=1e-3), 1e-2)
  state, metrics = step.train_step(
      step.init_state(params, rules=rules), frozen, base,
      contract.stacked(contract.batch()), hyper, jax.random.key(0),
      model=contract.CONFIG, settings=step.Settings(rules=rules))
  assert metrics["finite"] and "penalty" not in metrics
  _, grads = contract.gradient(
      params, frozen, base, contract.stacked(contract.batch()),
      jax.random.key(0))
  # The first step of Adam: lr g / (|g| + eps), of the projected gradient.
  a = np.asarray(frozen.layers["q_proj"].a, np.float64)
  g = np.asarray(grads.layers["q_proj"].b, np.float64) / 4  # s = 8 / 4.
  g = np.linalg.inv(np.einsum("lir,lis->lrs", a, a)) @ g
  np.testing.assert_allclose(
      state.params.layers["q_proj"].b, -0.01 * g / (np.abs(g) + 1e-3),
      rtol=0, atol=2e-4)
