"""Context-aware prompt tuning: its balls, its labels, and PEFT's training."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import cpt
from lora_jax.adapters import partition
from lora_jax.adapters import registry
from lora_jax.adapters import rules
from lora_jax.data import packing
from lora_jax.data import templates
from lora_jax.data import virtual
from lora_jax.train import step as step_lib
from tests import tiny
from tests.adapters import contract
from tests.adapters import with_peft

# Two examples: format, input, format, label.
IDS = (3, 7, 1, 9, 4, 11, 12, 5)
TYPES = (1, 2, 3, 4, 5, 6, 7, 8)
RATE = 3.0


def block(**options):
  return adapters_lib.AdapterConfig(method="cpt", options={
      "ids": IDS, "types": TYPES, "epsilon": 0.2, "format_epsilon": 0.1,
      "decay": 0.5} | options)


def build(config):
  _, tree = adapters_lib.build(
      jax.random.key(1), config, with_peft.base(), with_peft.PATHS,
      geometry=contract.GEOMETRY)
  return tree


def rows():
  """Two examples whose first tokens have no loss."""
  weights = np.ones(12, np.float32)
  weights[:5] = 0
  return [templates.Encoded(one, weights) for one in with_peft.TOKENS]


def batch(tree):
  data = virtual.ahead(rows(), **partition.virtual_places(tree, True))
  return contract.stacked(packing.fill([[0], [1]], data, 20))


def test_where_it_starts_and_how_far_it_goes():
  one = build(block()).outer["prompt"]
  np.testing.assert_array_equal(
      one.virtual(), np.asarray(with_peft.base().embed_tokens)[list(IDS)])
  unit = (32 / 2048) ** 0.5
  np.testing.assert_allclose(
      one.radius, unit * np.float32([.1, .2, .1, 0] * 2), rtol=1e-6)
  np.testing.assert_allclose(
      one.weights, [0, 0, 0, .25, 0, 0, 0, .5], rtol=1e-6)
  far = cpt.projected(jnp.float32([[3, 4], [.3, .4], [3, 4], [0, 0]]),
                      jnp.float32([1, 1, 0, 1]))
  np.testing.assert_allclose(far, [[.6, .8], [.3, .4], [0, 0], [0, 0]])


def test_labels_of_the_context_are_predicted_in_training_alone():
  tree = build(block())
  data = batch(tree)
  assert data.tokens[0, 0, :9].tolist() == [
      *range(-1, -9, -1), with_peft.TOKENS[0, 0]]
  found = np.nonzero(data.loss_weights[0, 0])[0].tolist()
  # Of the context, label j is predicted at j - 1; 12 more than its 8 tokens.
  assert found == [2, 6, *range(8 + 4, 8 + 11)]
  assert data.loss_weights[0, 0, [2, 6]].tolist() == [.25, .5]
  assert data.targets[0, 0, [2, 6]].tolist() == [IDS[3], IDS[7]]
  assert data.targets[0, 0, 12:19].tolist() == (
      with_peft.TOKENS[0, 5:].tolist())
  plain = virtual.ahead(rows(), **partition.virtual_places(tree))
  assert not np.any(plain[0].weights[:9])


def test_training_is_peft_s():
  """Losses, and C + D after steps that leave the balls."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  config = registry.checked(block())
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(with_peft.torch_model(), peft.CPTConfig(
        task_type="CAUSAL_LM", **{
            k: v for k, v in cpt.METHOD.form.config(config).items()
            if k != "num_virtual_tokens"}))
  tokens = torch.from_numpy(with_peft.TOKENS.astype(np.int64))
  labels = torch.where(torch.arange(12) < 5, -100, tokens)
  optimiser = torch.optim.SGD(
      [p for p in model.parameters() if p.requires_grad], RATE)
  theirs = []
  for _ in range(4):
    optimiser.zero_grad()
    loss = model(tokens, labels=labels).loss
    loss.backward()
    optimiser.step()
    theirs.append((loss.item(), model.get_prompt_embedding_to_save(
        "default").numpy()))
  tree = build(config)
  trainable, frozen = adapters_lib.split(tree)
  data = batch(tree)
  # PEFT divides by the number of labels; see `cpt`.
  share = data.loss_weights.sum() / (data.loss_weights > 0).sum()
  (rule,) = rules.of_parts({"": config}, 4, tree)
  update = rule.wrap(optax.sgd(RATE * share))
  state, outside = update.init(trainable), 0
  gradient = jax.jit(lambda params: step_lib.loss_and_grads(
      params, frozen, with_peft.base(), data, jax.random.key(0),
      model=with_peft.CONFIG, settings=step_lib.Settings()))
  for loss, prompt in theirs:
    value, grads = gradient(trainable)
    np.testing.assert_allclose(share * value, loss, rtol=1e-5)
    moved = trainable.outer["prompt"].delta - (
        RATE * share * grads.outer["prompt"].delta)
    outside += int((jnp.linalg.norm(moved, axis=-1) > (
        tree.outer["prompt"].radius)).sum())
    updates, state = update.update(grads, state, trainable, frozen=frozen)
    trainable = optax.apply_updates(trainable, updates)
    one = adapters_lib.join(trainable, frozen).outer["prompt"]
    np.testing.assert_allclose(one.virtual(), prompt, atol=2e-6)
  assert outside > 4
  assert not np.any(one.delta[3]) and not np.any(one.delta[7])
  assert (np.linalg.norm(one.delta, axis=-1) <= one.radius + 1e-6).all()
  # Far more than what the two are apart.
  assert np.abs(one.delta).max() > 1e-3


@pytest.mark.parametrize("options", [
    {"types": (1,), "decay": 1.0}, {"types": (0, 2, 3, 3, 5, 6, 8, 8)}])
def test_files_come_back(options, tmp_path):
  config = registry.checked(block(**options))
  tree = contract.moved(build(config), 0.01)
  with_peft.write(tmp_path / "a", config, tree)
  loaded = with_peft.read(tmp_path / "a")
  found = loaded.config.options
  assert found.each.tolist() == config.options.each.tolist()
  assert (found.ids, found.epsilon, found.format_epsilon, found.decay) == (
      IDS, 0.2, 0.1, options.get("decay", 0.5))
  one, back = tree.outer["prompt"], loaded.adapters.outer["prompt"]
  assert np.any(one.delta) and not np.any(back.delta)
  np.testing.assert_array_equal(one.virtual(), back.virtual())
  for name in ("radius", "weights", "ids"):
    np.testing.assert_array_equal(getattr(one, name), getattr(back, name))


def test_what_peft_gets_wrong():
  """PEFT 0.21.2: why types end with a label here, and what its own state is."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")

  def model(kinds):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return peft.get_peft_model(with_peft.torch_model(), peft.CPTConfig(
          task_type="CAUSAL_LM", cpt_token_ids=[3, 7, 1, 9],
          cpt_tokens_type_mask=kinds))

  tokens = torch.from_numpy(with_peft.TOKENS.astype(np.int64))
  # Rows are of type 4 + the largest of the context: of its default 1, that is
  # 5, a format. Nothing is learned; the mean of nothing is no number.
  assert torch.isnan(model(None)(tokens, labels=tokens).loss)
  assert torch.isfinite(model([1, 2, 3, 4])(tokens, labels=tokens).loss)
  # What it saves is C + D, which it reads into C and leaves D.
  one = model([1, 2, 3, 4])
  with torch.no_grad():
    one.prompt_encoder["default"].delta_embedding.weight += 1e-3
  before = one.get_prompt_embedding_to_save("default")
  peft.set_peft_model_state_dict(one, peft.get_peft_model_state_dict(one))
  away = one.get_prompt_embedding_to_save("default") - before
  np.testing.assert_allclose(away[:3], 1e-3, atol=1e-6)


def test_beside_another_prompt():
  """Its labels are where its virtual tokens are."""
  parts = {
      name: build(config) for name, config in (
          ("prompt", adapters_lib.AdapterConfig(
              method="prompt", options={"tokens": 2})),
          ("cpt", block()))}
  tree = adapters_lib.several.joined(parts)
  found = partition.virtual_places(tree, True)
  assert found["n"] == 10
  ids, weights = found["labels"]
  assert ids.tolist() == [0, 0, *IDS]
  assert weights.tolist() == [0] * 5 + [.25, 0, 0, 0, .5]
  assert partition.virtual_places(parts["prompt"], True)["labels"] is None
  assert tiny.distance(tree.outer["prompt"].virtual()[2:],
                       parts["cpt"].outer["prompt"].virtual()) == 0


@pytest.mark.parametrize("options, text", [
    ({"ids": (3, 31), "types": (1,)}, "vocabulary of 31"),
    ({"ids": "3+x"}, "no list of int"),
    ({"types": (1, 2)}, "types of 8 tokens"),
    ({"epsilon": -1.0}, "adapter.options.epsilon=-1.0"),
    ({"ids": (-1,), "types": (1,)}, "use integers from 0")])
def test_what_cannot_be_is_refused(options, text):
  with pytest.raises(errors.UsageError, match=text):
    build(block(**options))
