"""Poly by hand, its noise, and the tasks of PEFT's folders."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import partition
from lora_jax.adapters import poly
from lora_jax.adapters import registry
from lora_jax.export import peft as peft_export
from tests import tiny
from tests.adapters import contract
from tests.adapters import with_peft

I, O, Q, S, R = 6, 4, 2, 3, 2


def draw():
  rng = np.random.default_rng(0)
  a, b, z, w, x = (
      jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (
          (Q, S, I // Q, R), (Q, S, R, O // Q), (Q, S), (I, O), (2, 3, I)))
  return poly.Poly(
      a=a, b=b, logits=z, others=jnp.zeros((1, Q * S)), task=jnp.int32(0),
      scale=jnp.float32(1 / R), rank=jnp.int32(R)), w, x


def by_hand(one, w, token, noise):
  """h of one token, whose router's logits have this added."""
  g = 1 / (1 + np.exp(-(np.asarray(one.logits, np.float64) + noise)))
  shares = g / g.sum(1, keepdims=True)
  a = np.concatenate([sum(
      shares[q, s] * np.asarray(one.a[q, s]) for s in range(S))
                      for q in range(Q)], 0)
  b = np.concatenate([sum(
      shares[q, s] * np.asarray(one.b[q, s]) for s in range(S))
                      for q in range(Q)], 1)
  return token @ np.asarray(w) + token @ a @ b / R


def test_skills_are_mixed_split_by_split():
  one, w, x = draw()
  expected = [[by_hand(one, w, token, 0) for token in row]
              for row in np.asarray(x)]
  np.testing.assert_allclose(one.apply(x, w), expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
      x @ one.merge(w), expected, rtol=1e-5, atol=1e-5)
  none = dataclasses.replace(one, rank=jnp.int32(0))
  np.testing.assert_array_equal(none.apply(x, w), x @ w)


def test_noise_is_that_of_examples():
  one, w, x = draw()
  ids = jnp.int32([[4, 4, 5], [5, 4, 9]])
  noise = adapters_lib.Noise(jax.random.key(0), ids, jnp.int32(
      [[0, 1, 0], [1, 2, 0]]))
  drawn = np.asarray(noise.of_examples().logistic(
      jnp.zeros((2, 3, Q * S)))).reshape(2, 3, Q, S)
  np.testing.assert_array_equal(drawn[0, 0], drawn[1, 1])
  assert np.abs(drawn[0, 0] - drawn[0, 2]).min() > 1e-3
  expected = [[by_hand(one, w, token, e) for token, e in zip(row, es)]
              for row, es in zip(np.asarray(x), drawn)]
  found = one.apply(x, w, noise)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  none = dataclasses.replace(one, rank=jnp.int32(0))
  np.testing.assert_array_equal(none.apply(x, w, noise), x @ w)
  # Logistic: mean 0, variance pi^2 / 3.
  many = np.asarray(adapters_lib.Noise(
      jax.random.key(1), jnp.arange(5000)[None], jnp.zeros((1, 5000), int)
  ).logistic(jnp.zeros((1, 5000, 4))))
  assert abs(many.mean()) < 0.05
  np.testing.assert_allclose(many.var(), np.pi ** 2 / 3, rtol=0.05)


def test_the_gates_of_training_are_peft_s():
  """In law: the means of its router's weights, and of their squares."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  from peft.tuners.poly import router

  one, *_ = draw()
  there = router.PolyRouter(peft.PolyConfig(n_skills=S, n_splits=Q))
  with torch.no_grad():
    there.module_logits[:] = torch.from_numpy(
        np.array(one.logits).reshape(1, -1))
  torch.manual_seed(0)
  theirs = there.train()(
      torch.zeros(20000, dtype=torch.long), None).detach().numpy()
  drawn = jax.random.logistic(jax.random.key(0), (20000, Q, S))
  ours = np.asarray(poly._shares(one.logits + drawn))
  for power in (1, 2):
    np.testing.assert_allclose(
        (ours ** power).mean(0), (theirs ** power).mean(0), atol=0.01)
  exact = there.eval()(torch.zeros(1, dtype=torch.long), None)
  np.testing.assert_allclose(
      poly._shares(one.logits), exact[0].detach().numpy(), rtol=1e-6)


def block(**options):
  return registry.checked(adapters_lib.AdapterConfig(
      method="poly", rank=4, targets=("q_proj", "down_proj"),
      options={"n_tasks": 3, "n_skills": 2} | options))


@pytest.mark.parametrize("options", [
    {"task": 2}, {"task": 1, "n_splits": 4}, {"n_tasks": 1, "n_skills": 5}])
def test_it_is_peft_s_at_its_task(options, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  config = block(**options)
  task = options.get("task", 0)
  keys = {"task_id": task} if task else {}
  tasks = torch.full((2,), task, dtype=torch.long)
  loaded, tensors = with_peft.check(config, tmp_path, keys, task_ids=tasks)
  assert loaded.config.options == config.options
  name = "base_model.model.model.layers.1.mlp.down_proj.poly_router."
  assert tensors[f"{name}module_logits"].shape == (
      config.options.n_tasks,
      config.options.n_skills * config.options.n_splits)
  if not task:
    return
  # Another task is something else; PEFT's own folder says none.
  model = peft.PeftModel.from_pretrained(
      with_peft.torch_model(), str(tmp_path / "theirs")).eval()
  there = tiny.torch_logits(model, with_peft.TOKENS, task_ids=0 * tasks)
  assert tiny.distance(with_peft.logits(loaded.adapters), there) > 1e-4
  place = tmp_path / "theirs" / peft_export.CONFIG
  text = json.loads(place.read_text())
  del text["task_id"]
  place.write_text(json.dumps(text))
  loaded = with_peft.read(tmp_path / "theirs")
  assert loaded.config.options.task == 0
  assert tiny.distance(with_peft.logits(loaded.adapters), there) <= 2e-5


def test_one_task_is_trained_and_the_others_stay(tmp_path):
  config = block(task=1)
  start = with_peft.build(config, move=0.0)
  tree = contract.moved(start, 0.1)
  assert partition.trainable_size(tree) == 3 * 2 * (
      4 * (32 + 32) + 1 + 4 * (48 + 32) + 1)
  with_peft.write(tmp_path / "a", config, tree)
  tensors = with_peft.tensors(tmp_path / "a")
  for layer in range(3):
    table = tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj."
                    "poly_router.module_logits"]
    one = start.layers["q_proj"]
    np.testing.assert_array_equal(
        table[[0, 2]], one.others[layer][jnp.array([0, 2])])
    np.testing.assert_array_equal(
        table[1], tree.layers["q_proj"].logits[layer, 0])
    assert 0 < np.abs(table[[0, 2]]).max() <= 1e-3
  assert json.loads((tmp_path / "a" / peft_export.CONFIG).read_text())[
      "task_id"] == 1
  assert "task_id" not in poly.METHOD.form.config(block())


def test_it_starts_as_peft_s():
  config = block(n_splits=2)
  one = with_peft.build(config, move=0.0).layers["down_proj"]
  assert one.a.shape == (3, 2, 2, 24, 4) and not np.any(one.b)
  bound = 24 ** -0.5
  assert 0.95 * bound < np.abs(one.a).max() <= bound


@pytest.mark.parametrize("options, message", [
    ({"n_skills": 0}, "adapter.options.n_skills=0"),
    ({"task": 3}, "use an integer from 0 to 2, for n_tasks=3"),
    ({"n_splits": 5}, "n_splits=5 does not divide down_proj's 48 x 32")])
def test_what_cannot_be(options, message):
  with pytest.raises(errors.UsageError, match=message):
    with_peft.build(block(**options))
