"""Several methods in one model: any two of them, on the contract's model."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import quant
from lora_jax import trees
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import rules
from lora_jax.adapters import several
from lora_jax.models import decoder
from lora_jax.models import embedding
from tests import tiny
from tests.adapters import contract

CONFIG = contract.CONFIG
ROWS = adapters_lib.METHODS
ON_WEIGHTS = ("dora", "ia3", "lora", "vera")
METHODS = (*ON_WEIGHTS, "houlsby", "prefix", "prompt")


def each(pairs):
  """Pairs; those of DoRA, which compile longest, are slow but with LoRA."""
  return pytest.mark.parametrize("pair", [
      pytest.param(x, marks=pytest.mark.slow)
      if "dora" in x and "lora" not in x else x for x in pairs], ids="+".join)


pairs = each(itertools.combinations(METHODS, 2))
ordered = each(itertools.permutations(ON_WEIGHTS, 2))


def block(method, **fields):
  if method in ON_WEIGHTS:
    fields = {"targets": "q_proj,down_proj"} | fields
  return adapters_lib.AdapterConfig(**{
      "method": method, "rank": 2, "alpha": 4.0} | dict(ROWS[method].tiny)
      | fields)


def build(configs, base=None, key=1):
  return adapters_lib.build(
      jax.random.key(key), configs, base or contract.quantised("none"),
      tiny.paths(CONFIG), geometry=contract.GEOMETRY)


@functools.cache
def every():
  """The parts of a model with all of `METHODS`, each as a tree of its own."""
  _, tree = build({name: block(name) for name in METHODS})
  return several.apart(tree, METHODS)


def together(*names, moved=False):
  parts = {name: every()[name] for name in names}
  if moved:
    parts = {name: contract.moved(tree, 0.3) for name, tree in parts.items()}
  return adapters_lib.beside(
      several.joined(parts), contract.quantised("none"))


def run(tree, ahead=None):
  """Hidden states after the first layer; not compiled, which takes longer."""
  base, data = contract.quantised("none"), contract.batch_of(tree)
  tree = tree or adapters_lib.Adapters()
  if ahead is None:
    ahead = decoder._prefix_length(tree)
  tables = decoder.rope.tables(
      CONFIG.rope, CONFIG.head_dim, data.positions + ahead)
  context = decoder.Context(
      *tables, data.positions, data.segment_ids, data.positions,
      data.segment_ids)
  hidden = embedding.embed(
      base.embed_tokens, tree, data.tokens, jnp.float32)
  found, _ = decoder.layer(
      CONFIG, context, hidden, contract.one(base.layers, 0),
      {name: adapters_lib.module(tree, name, 0) for name in tree.layers})
  return found[data.tokens >= 0]


@functools.cache
def plain():
  return run(None)


def test_every_hook_of_an_adapter_is_passed_on():
  """A hook that is added to `Adapter` has to be added to `Several`, too."""
  hooks = {name for name, value in vars(base_lib.Adapter).items()
           if inspect.isfunction(value) or isinstance(value, property)
           or name in base_lib.Adapter.__annotations__}
  # Of a part, by itself.
  own = {"active", "_saved", "to_peft", "rank", "resized"}
  # Of those that are never one of several, as `joined` sees to.
  own |= {"guided", "guide", "by_token", "of_tokens"}
  own |= {"reads_first", "begun", "entered", "left"}
  missing = {name for name in hooks - set(vars(several.Several)) - own
             if not name.startswith("__") and name != "replace"}
  assert not missing


@pairs
def test_any_two_build_start_as_they_say_and_train(pair):
  base = contract.quantised("none")
  tree = together(*pair)
  built = jax.eval_shape(
      lambda: build({name: block(name) for name in pair}, base)[1])
  assert jax.tree.structure(built) == jax.tree.structure(tree)
  assert [x.shape for x in jax.tree.leaves(built)] == [
      x.shape for x in jax.tree.leaves(tree)]
  away = float(np.abs(run(tree) - plain()).max())
  if all(ROWS[name].identity_at_init for name in pair):
    assert away < 2e-6
  else:
    assert away > 1e-3
  trainable, frozen = adapters_lib.split(together(*pair, moved=True))
  grads = jax.grad(lambda t: jnp.sum(jnp.sin(run(
      adapters_lib.join(t, frozen)))))(trainable)
  seen = set()
  for path, leaf in trees.paths(grads).items():
    leaf = leaf if path.startswith("outer") else leaf[0]
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    seen |= {name for name in pair if f".parts.{name}." in path}
  assert seen == set(pair)


@ordered
def test_the_second_adapts_what_the_first_left(pair):
  """On a projection, with its bias, on NF4, and as one merged weight."""
  tree = together(*pair, moved=True)
  weight = contract.one(contract.quantised("nf4").layers["q_proj"].weight, 1)
  x = jax.random.normal(jax.random.key(4), (2, 3, CONFIG.d_model))
  bias = jnp.linspace(-1, 1, weight.shape[1])
  # DoRA knows the norms of the unquantised weight; here it asks this one.
  both = adapters_lib.without_constants(
      adapters_lib.module(tree, "q_proj", 1))
  first, second = (both.parts[name] for name in pair)
  between = first.merge(weight)
  expected = second.apply(x, between) + second.shift(first.shift(bias))
  found = both.apply(x, weight) + both.shift(bias)
  assert tiny.distance(found, expected) < 1e-6
  merged = jnp.matmul(x, both.merge(weight), precision="highest")
  assert tiny.distance(merged + both.shift(bias), found) < 1e-6
  assert tiny.distance(found, quant.matmul(x, weight) + bias) > 1e-2
  joint, = adapters_lib.project_all(x, [weight], [both], [None], join=True)
  assert tiny.distance(joint + both.shift(bias), found) < 1e-6


def test_by_hand():
  """l (x (W + s A B) + b) of LoRA and then (IA)^3; the other way round
  l (x W + b) + s x A B, which is another function."""
  rng = np.random.default_rng(0)
  w, x, a, b, l, bias = (rng.standard_normal(shape).astype(np.float32)
                         for shape in ((4, 3), (2, 4), (4, 2), (2, 3), 3, 3))
  one = jnp.int32(1)
  parts = {
      "lora": ROWS["lora"].adapter(
          a=a, b=b, scale=jnp.float32(2), rate=jnp.float32(0), rank=one),
      "ia3": ROWS["ia3"].adapter(l=l, rank=one)}
  for order, expected in (
      (("lora", "ia3"), l * (x @ (w + 2 * a @ b) + bias)),
      (("ia3", "lora"), l * (x @ w + bias) + 2 * x @ a @ b)):
    both = several.Several(parts=parts, order=order)
    np.testing.assert_allclose(
        both.apply(x, w) + both.shift(bias), expected, rtol=1e-5, atol=1e-5)


def test_what_only_adds_is_one_product():
  """LoRA and VeRA: their factors side by side, in the frozen product."""
  tree = together("lora", "vera", moved=True)
  adapter = adapters_lib.module(tree, "q_proj", 0)
  a, b = adapter.factors()
  assert a.shape == (CONFIG.d_model, 4) and b.shape == (4, 32)
  lora, vera = (adapter.parts[name] for name in adapter.order)
  expected = lora.delta() + jnp.matmul(
      *vera.factors(), precision="highest")
  np.testing.assert_allclose(
      jnp.matmul(a, b, precision="highest"), expected, atol=1e-5)
  # DoRA finishes the sum that it is given, and must be alone for that.
  alone = adapters_lib.module(together("dora", "ia3"), "q_proj", 0)
  assert alone.factors() is None and not alone.finishes
  dora = several.Several(parts={"dora": alone.parts["dora"]}, order=("dora",))
  assert dora.finishes and dora.reads_cross and dora.factors() is not None


def test_parts_drop_by_themselves():
  x = jnp.ones((1, 3, 4))
  noise = adapters_lib.Noise(
      jax.random.key(0), jnp.zeros((1, 3), jnp.int32), jnp.arange(3)[None])
  one = ROWS["lora"].adapter(
      a=jnp.eye(4), b=jnp.eye(4), scale=jnp.float32(1), rate=jnp.float32(0.5),
      rank=jnp.int32(4))
  both = several.Several(parts={"p": one, "q": one}, order=("p", "q"))
  found = both.apply(x, jnp.zeros((4, 4)), noise)
  masks = [noise.for_target(name).dropout(x, one.rate) for name in "pq"]
  assert (masks[0] != masks[1]).any()
  np.testing.assert_array_equal(found, masks[0] + masks[1])


def test_prefixes_and_prompts_stand_one_after_the_other():
  """Two of 3 are one of 6; one that a layer does not have is not seen."""
  configs = {"p": block("prefix"), "q": block("prefix", layers="1,2"),
             "r": block("prompt"), "s": block("prompt")}
  _, tree = build(configs)
  parts = several.apart(tree, list(configs))
  keys, values, seen = adapters_lib.module(tree, "self_attn", 0).prefix()
  assert keys.shape == values.shape == (6, 2, 8)
  assert seen.tolist() == [True] * 3 + [False] * 3
  first, second = (parts[n].layers["self_attn"] for n in "pq")
  np.testing.assert_array_equal(keys[:3], first.keys[0])
  np.testing.assert_array_equal(values[3:], second.values[0])
  assert adapters_lib.virtual_tokens(tree) == 6
  rows = adapters_lib.module(tree, "prompt", None).virtual()
  np.testing.assert_array_equal(rows[3:], parts["s"].outer["prompt"].p)
  assert (rows[:3] != rows[3:]).any()
  # In the first layer the second prefix is as if it were not there, but that
  # tokens stand at the positions after it in all layers.
  one = several.joined({n: parts[n] for n in "prs"})
  assert tiny.distance(run(tree), run(one, ahead=6)) < 1e-6
  flags = dataclasses.replace(second, rank=jnp.ones(3, jnp.int32))
  shown = several.joined({
      "p": parts["p"], "q": adapters_lib.Adapters(layers={"self_attn": flags}),
      **{n: parts[n] for n in "rs"}})
  assert tiny.distance(run(shown), run(one, ahead=6)) > 1e-3


def test_what_is_prepared_for_decoding_computes_the_same():
  """DoRA's norms are of the weight as VeRA, whose factors are shared, left
  it; the first part's as of the base."""
  base = contract.quantised("none")
  x = jax.random.normal(jax.random.key(4), (2, 3, CONFIG.d_model))
  for pair in ("vera", "dora"), ("dora", "vera"):
    tree = together(*pair, moved=True)
    ready = adapters_lib.prepared(tree, base)
    before, after = (adapters_lib.module(t, "q_proj", 1)
                     for t in (tree, ready))
    assert (before.parts["dora"].square is None) == (pair[0] == "vera")
    assert after.parts["dora"].c is not None
    weight = contract.one(base.layers["q_proj"].weight, 1)
    assert tiny.distance(
        after.apply(x, weight), before.apply(x, weight)) < 1e-6


def test_parts_come_apart_as_they_were():
  base = contract.quantised("none")
  configs = [block("lora", modules_to_save=("norm",)), block("vera"),
             block("lora", targets="up_proj", rank=3)]
  _, tree = build(configs)
  assert tree.layers["q_proj"].order == ("lora", "vera")
  assert tree.layers["up_proj"].order == ("lora_2",)
  assert tree.shared.keys() == {"vera"}
  parts = several.apart(tree, ["lora", "vera", "lora_2"])
  assert parts["lora"].overrides is tree.overrides is not None
  assert parts["vera"].overrides is parts["lora_2"].overrides is None
  again = several.joined(parts)
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  # The first starts as it would alone, the others otherwise.
  _, alone = build(configs[0])
  np.testing.assert_array_equal(
      alone.layers["q_proj"].a, parts["lora"].layers["q_proj"].a)
  _, twice = build([block("lora"), block("lora")])
  a, b = twice.layers["q_proj"]
  assert (a.a != b.a).any()
  sizes = several.sizes(tree, list(parts))
  assert sizes == {
      "lora": 3 * 2 * (32 + 32 + 48 + 32) + 32, "vera": 3 * (2 + 32 + 2 + 32),
      "lora_2": 3 * 3 * (32 + 48)}
  assert adapters_lib.trainable_size(tree) == sum(sizes.values())
  changed = adapters_lib.with_rate(tree, 0.25)
  assert {float(part.rate[0]) for one in changed.layers.values()
          for part in one} == {0.25}
  assert decoder.combined(base, tree).norm is tree.overrides.norm


def test_a_start_out_of_the_weights_is_the_first_parts():
  """DoRA starts beside what PiSSA's residual and factors are together."""
  base, tree = build([block("lora", init="pissa"), block("dora")])
  weights = (contract.one(b.layers["q_proj"].weight, 0)
             for b in (contract.quantised("none"), base))
  original, residual = weights
  assert tiny.distance(original, residual) > 1e-2
  both = adapters_lib.module(tree, "q_proj", 0)
  assert tiny.distance(both.merge(residual), original) < 1e-5
  np.testing.assert_allclose(
      both.parts["dora"].m, np.linalg.norm(original, axis=0), rtol=1e-5)


def test_what_stands_in_the_way_of_merging():
  tree = together("lora", "vera", "ia3")
  assert several.before(tree, "vera", ["lora"]) is None  # Both add.
  assert several.before(tree, "lora", ["vera", "ia3"]) is None
  assert several.before(tree, "ia3", ["lora"]) == ("down_proj", "lora")


def test_a_rule_of_a_part_does_what_it_does_alone():
  """AdaLoRA prunes its own, of which it has as many beside a LoRA; the
  optimiser is one for both."""
  configs = {
      "lora": block("lora"), "ada": block(
          "adalora", rank=4, targets="q_proj,down_proj",
          options={"target_r": 1, "tinit": 1, "tfinal": 1})}
  _, tree = build(configs)
  tree = contract.moved(tree)
  parts = several.apart(tree, list(configs))
  params, alone = (adapters_lib.split(t)[0] for t in (tree, parts["ada"]))
  rule, = rules.of_parts(configs, 5, tree)
  single, = rules.of_parts({"": configs["ada"]}, 5, parts["ada"])
  assert rule.penalty(params) == single.penalty(alone) > 0
  both, one = (r.wrap(optax.adam(1e-2)) for r in (rule, single))
  adam = optax.adam(1e-2)
  plain = several.apart(params, list(configs))["lora"]
  states = both.init(params), one.init(alone), adam.init(plain)
  rng = np.random.default_rng(0)
  for _ in range(5):
    grads = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
    own = several.apart(grads, list(configs))
    ours, first = both.update(grads, states[0], params, frozen=tree)
    theirs, second = one.update(own["ada"], states[1], alone, frozen=alone)
    rest, third = adam.update(own["lora"], states[2], plain)
    states = first, second, third
    found = several.apart(ours, list(configs))
    for a, b in ((found["ada"], theirs), (found["lora"], rest)):
      jax.tree.map(np.testing.assert_array_equal, a, b)
    params, alone, plain = (optax.apply_updates(*pair) for pair in (
        (params, ours), (alone, theirs), (plain, rest)))
  left = [np.asarray(one.parts["ada"].e) != 0
          for one in params.layers.values()]
  assert sum(x.sum() for x in left) == 6  # One of four, of six matrices.


@pytest.mark.parametrize("configs, message", [
    ([], "there is no adapter block"),
    ({"q_proj": block("lora")}, '"q_proj" is a module'),
    ({"a b": block("lora")}, '"a b" is no name'),
    ([block("full"), block("lora")], "adapter.method=full makes no adapter"),
    ([block("lora"), block("none")], "hybrid.none.method=none makes no"),
    ([block("lora"), block("lora", rank=0)], "hybrid.lora_2.rank=0 is out"),
    ([block("lora"), block("dora", targets="x_proj")],
     'hybrid.dora.targets: "x_proj" matches no module'),
    ([block("lora"), block("dora", init="pissa")],
     "hybrid.dora.init=pissa replaces weights"),
    ([block("lora"), block("lora", init="eva")],
     "hybrid.lora_2.init=eva replaces weights of the base or looks at rows"),
    ([block("lora"), block("dora", modules_to_save=("norm",))],
     "hybrid.dora.modules_to_save belongs to the first"),
    ([block("lora", modules_to_save=("up_proj",)),
      block("dora", targets="up_proj")],
     'hybrid.dora.targets: "up_proj" is trained whole'),
    ([block("lora", trainable_token_indices=(3,)),
      block("dora", targets="embed_tokens")],
     'hybrid.dora.targets: "embed_tokens" is trained whole'),
    ([block("ln_tuning"), block("ln_tuning", layers="0")],
     'hybrid.ln_tuning_2.targets: "input_layernorm" is trained by ln_tuning'),
])
def test_parts_that_cannot_be(configs, message):
  with pytest.raises(errors.UsageError) as caught:
    build(configs)
  assert message in str(caught.value)
