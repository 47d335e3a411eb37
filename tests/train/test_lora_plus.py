"""LoRA+ against Hugging Face PEFT's optimiser, on the same gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import trees
from lora_jax.adapters import partition
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from lora_jax.train import optim
from tests import tiny

CONFIG = dataclasses.replace(tiny.CONFIGS["llama"], n_layers=1)
PATHS = tiny.paths(CONFIG)


@jax.jit
def _step(params, grads, hyper):
  transform = optim.transform(hyper)
  updates, _ = transform.update(grads, transform.init(params), params)
  return optax.apply_updates(params, updates)


def _random(tree, key):
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(key), len(leaves))
  return structure.unflatten([
      jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def _trees(method):
  base = init.random_base(jax.random.key(0), CONFIG)
  block = adapters_lib.AdapterConfig(
      method=method, rank=2, targets="embed_tokens,q_proj,lm_head")
  _, tree = adapters_lib.build(jax.random.key(1), block, base, PATHS)
  return base, adapters_lib.split(tree)


def _by_peft_name(params, frozen):
  named = peft_export.tensors(adapters_lib.join(params, frozen), PATHS)
  return {k.replace(".weight", ""): v for k, v in named.items()}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_step_is_that_of_peft(method, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  from peft import optimizers

  base, (params, frozen) = _trees(method)
  params, grads = _random(params, 3), _random(params, 4)
  ours = _step(params, grads, optim.hyper(optim.OptimConfig(
      learning_rate=0.05, clip_norm=0.0, lora_plus_ratio=16.0,
      lora_plus_embedding=0.003), 0.05))

  model = peft.get_peft_model(
      tiny.to_torch(CONFIG, base, tmp_path), peft.LoraConfig(
          r=2, target_modules=["embed_tokens", "q_proj", "lm_head"],
          use_dora=method == "dora"))
  theirs = {
      name.replace(".default", "").replace(".weight", ""): p
      for name, p in model.named_parameters() if p.requires_grad}
  start, gradients = (_by_peft_name(x, frozen) for x in (params, grads))
  assert theirs.keys() == start.keys()
  with torch.no_grad():
    for name, p in theirs.items():
      p.copy_(torch.tensor(start[name]))
      p.grad = torch.tensor(gradients[name])
  optimizers.create_loraplus_optimizer(
      model, torch.optim.AdamW, lr=0.05, loraplus_lr_ratio=16.0,
      loraplus_lr_embedding=0.003).step()
  for name, value in _by_peft_name(ours, frozen).items():
    np.testing.assert_allclose(
        value - start[name], theirs[name].detach().numpy() - start[name],
        rtol=0, atol=5e-7, err_msg=name)


def test_what_is_trained_whole_is_in_the_groups_of_peft():
  """Matrices go with A, vectors with B: as in PEFT's grouping by `ndim`."""
  params = {"layers": {"norm": jnp.ones((3, 4)), "w": jnp.ones((3, 4, 2))},
            "norm": jnp.ones(4), "lm_head": jnp.ones((4, 2))}
  hyper = optim.hyper(optim.OptimConfig(
      learning_rate=0.5, clip_norm=0.0, eps=0.0, lora_plus_ratio=8.0), 0.5)
  # Adam's first step is sign(g).
  after = _step(params, jax.tree.map(jnp.ones_like, params), hyper)
  moved = {k: float(1 - v.mean()) for k, v in trees.paths(after).items()}
  assert moved == pytest.approx({
      "layers.norm": 4.0, "layers.w": 0.5, "norm": 4.0, "lm_head": 0.5})


def test_rows_of_tokens_learn_at_the_rate_of_a():
  base = init.random_base(jax.random.key(0), CONFIG)
  _, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(
          targets="q_proj", rank=2, trainable_token_indices=(3, 5)),
      base, PATHS)
  groups = partition.rate_groups(tree)
  assert groups.outer["embed_tokens"].rows is None
  assert groups.layers["q_proj"].b == "up"
  assert groups.layers["q_proj"].a is None


def test_the_ratio_is_data():
  _, (params, _) = _trees("lora")
  _step(params, params, optim.hyper(optim.OptimConfig(), 0.1))
  before = _step._cache_size()
  for ratio in (1.0, 4.0, 16.0):
    config = optim.OptimConfig(lora_plus_ratio=ratio)
    _step(params, params, optim.hyper(config, 0.1))
  assert _step._cache_size() == before


def test_embeddings_have_their_rate_under_lora_plus_only():
  def rate(**fields):
    config = optim.OptimConfig(learning_rate=1e-3, **fields)
    return float(optim.hyper(config, 5e-4).embedding) * 5e-4

  assert rate() == pytest.approx(5e-4)
  assert rate(lora_plus_ratio=16.0) == pytest.approx(5e-7)  # half of the peak
  assert rate(lora_plus_ratio=16.0, lora_plus_embedding=0.0) == pytest.approx(
      5e-4)
