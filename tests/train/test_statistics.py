"""Sums over rows against torch's hooks and autograd, and what PEFT makes of
them: EVA, CorDA and LoRA-GA on the same model and the same rows."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import quant
from lora_jax.data import packing
from lora_jax.data import templates
from lora_jax.kernels import attention
from lora_jax.models import init
from lora_jax.train import statistics
from lora_jax.train import step
from tests import devices
from tests import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
loraga = pytest.importorskip("peft.tuners.lora.loraga")
lora_configs = pytest.importorskip("peft.tuners.lora.config")

CONFIG = tiny.CONFIGS["llama"]
PATHS = tiny.paths(CONFIG)
SETTINGS = step.Settings(
    remat="full", attention=attention.Options(layout="single"))
LENGTHS, T = (9, 14, 12, 13), 14
# Every other token carries a loss, but never the first: 24 of them, no more
# than a projection has inputs, so that PEFT's randomised SVDs are exact.
ROWS = [templates.Encoded(
    tokens=np.random.default_rng(n).integers(0, 61, n).astype(np.int32),
    weights=(np.arange(n) % 2 > 0).astype(np.float32) if n != 13
    else np.asarray([0] + [1, 0] * 6, np.float32)) for n in LENGTHS]
FLAT = packing.fill([[0], [1], [2], [3]], ROWS, T)
BATCHES = [jax.tree.map(lambda x, n=n: x[n:n + 2], FLAT) for n in (0, 2)]
NAMES = ("q_proj", "o_proj", "gate_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def base():
  """With inputs that vary more along some directions than along others."""
  random = init.random_base(jax.random.key(0), CONFIG)
  return random.replace(
      embed_tokens=random.embed_tokens * 0.8 ** np.arange(24))


@pytest.fixture
def torch_model(base, tmp_path):
  return tiny.to_torch(CONFIG, base, tmp_path / "m")


def torch_batch(which, pad=True):
  """Rows for transformers: labels are -100 where no loss is."""
  t = max(len(ROWS[n].tokens) for n in which) if not pad else T
  ids, mask = np.zeros((2, len(which), t), np.int64)
  labels = np.full((len(which), t), -100)
  for k, n in enumerate(which):
    length = len(ROWS[n].tokens)
    ids[k, :length], mask[k, :length] = ROWS[n].tokens, 1
    labels[k, :length] = np.where(ROWS[n].weights > 0, ROWS[n].tokens, -100)
  return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask),
          "labels": torch.tensor(labels)}


def gather(base, **block):
  block = adapters_lib.AdapterConfig(**block)
  return statistics.gather(
      block, BATCHES, base=base, paths=PATHS, model=CONFIG, settings=SETTINGS)


def modules(model):
  return {name.removeprefix("base_model.model."): m
          for name, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("kind", ["all tokens", "labelled", "by row"])
def test_sums_of_the_inputs(kind, base, torch_model):
  seen = {}

  def hook(name, module, args, output):
    seen[name] = args[0].detach().numpy().astype(np.float64)

  for name in NAMES:
    for path in PATHS[name]:
      torch_model.get_submodule(path).register_forward_hook(
          functools.partial(hook, path))
  batch = torch_batch([0, 1, 2, 3])
  torch_model(input_ids=batch["input_ids"],
              attention_mask=batch["attention_mask"])
  mask = batch["attention_mask"].numpy() > 0
  informed = {
      "all tokens": adapters_lib.AdapterConfig(
          init="eva", init_options={"use_label_mask": False}),
      "labelled": adapters_lib.AdapterConfig(init="eva"),
      "by row": adapters_lib.AdapterConfig(init="corda"),
  }[kind].start().informed
  if kind == "labelled":
    mask &= batch["labels"].numpy() != -100
  ours = [statistics.inputs(
      base, b, names=NAMES, informed=informed, model=CONFIG,
      settings=SETTINGS) for b in BATCHES]
  for name in NAMES:
    for layer, path in enumerate(PATHS[name]):
      x = seen[path]
      if kind == "by row":
        x = x / np.abs(np.max(
            np.where(mask[..., None], x, -np.inf), (1, 2), keepdims=True))
      x = x[mask]
      for key, expected in (
          ("gram", x.T @ x), ("total", x.sum(0)),
          ("count", 4 if kind == "by row" else len(x))):
        found = sum(np.asarray(one[name][key]) for one in ours)
        found = found if name == "lm_head" else found[layer]
        np.testing.assert_allclose(
            found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def with_weight(base, name, weight):
  return base.replace(layers=base.layers | {
      name: base.layers[name].replace(weight=weight)})


@pytest.mark.parametrize("fmt", ["none", "nf4"])
def test_gradients(fmt, base, tmp_path):
  """Of the dequantised product, where the weight is quantised."""
  plain = base
  if fmt != "none":
    spec = quant.QuantSpec(format=fmt, block_size=8)
    weight = jax.tree.map(lambda *x: jnp.stack(x), *(
        quant.quantize(w, spec) for w in base.layers["down_proj"].weight))
    base = with_weight(base, "down_proj", weight)
    plain = with_weight(base, "down_proj", weight.dequantize())
  model = tiny.to_torch(CONFIG, plain, tmp_path / "m")
  model(**torch_batch([0, 1])).loss.backward()
  weights = dict(model.named_parameters())
  names = ("v_proj", "down_proj", "lm_head")
  ours = statistics.gradients(
      base, BATCHES[0], names=names, model=CONFIG, settings=SETTINGS)
  for name in names:
    for layer, path in enumerate(PATHS[name]):
      found = ours[name] if name == "lm_head" else ours[name][layer]
      expected = weights[f"{path}.weight"].grad.numpy().T
      assert tiny.distance(found, expected) < 2e-5


@pytest.mark.parametrize("targets", [
    ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ["v_proj", "down_proj", "lm_head"]])
def test_eva_is_that_of_peft(targets, base, torch_model):
  fields = dict(
      rank_pattern={"down_proj": 3}, alpha_pattern={"down_proj": 4})
  model = peft.get_peft_model(torch_model, peft.LoraConfig(
      r=4, lora_alpha=8, target_modules=targets, init_lora_weights="eva",
      eva_config=peft.EvaConfig(rho=3.0), **fields))
  peft.initialize_lora_eva_weights(
      model, [torch_batch([0, 1, 2, 3])], show_progress_bar=False)
  block, stats = gather(
      base, rank=4, alpha=8, init="eva", init_options={"rho": 3.0},
      targets=tuple(targets), **fields)
  theirs, config = modules(model), model.peft_config["default"]
  assert set(block.targets) == set(theirs)
  assert any(m.r["default"] != (3 if "down" in path else 4)
             for path, m in theirs.items())  # They did move.
  assert block.rank_pattern == config.rank_pattern
  assert block.alpha_pattern == pytest.approx(config.alpha_pattern)
  _, tree = adapters_lib.build(
      jax.random.key(0), block, base, PATHS, stats=stats)
  for name, group in PATHS.items():
    for layer, path in enumerate(group):
      if path not in theirs:
        continue
      ours = adapters_lib.module(
          tree, name, None if name == "lm_head" else layer)
      rank = theirs[path].r["default"]
      assert int(ours.rank) == rank
      assert float(ours.scale) == pytest.approx(
          theirs[path].scaling["default"])
      a = theirs[path].lora_A["default"].weight.detach().numpy().T
      # The sign, too.
      np.testing.assert_allclose(ours.a[:, :rank], a, atol=2e-5)
      assert not np.any(ours.a[:, rank:]) and not np.any(ours.b)


def replaced(base, block, stats):
  tree, adapters = adapters_lib.build(
      jax.random.key(0), block, base, PATHS, stats=stats)
  for name, one in adapters.layers.items():
    for layer, path in enumerate(PATHS[name]):
      yield path, np.asarray(tree.layers[name].weight[layer]), jax.tree.map(
          lambda x, n=layer: np.asarray(x[n]), one)


@pytest.fixture
def corda(monkeypatch):
  """PEFT's module. It imports `attr`, which PEFT does not ask for, to make one
  dataclass."""
  monkeypatch.setitem(sys.modules, "attr", dataclasses)
  return importlib.import_module("peft.tuners.lora.corda")


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_that_of_peft(method, base, torch_model, corda):
  targets = ["q_proj", "v_proj", "down_proj"]
  config = peft.LoraConfig(
      r=4, lora_alpha=8, target_modules=targets, init_lora_weights="corda",
      rank_pattern={"v_proj": 3},
      corda_config=lora_configs.CordaConfig(corda_method=method))
  def run():
    for n in range(4):
      torch_model(input_ids=torch_batch([n], pad=False)["input_ids"])

  corda.preprocess_corda(torch_model, config, run_model=run)
  theirs = modules(peft.get_peft_model(torch_model, config))
  block, stats = gather(
      base, rank=4, alpha=8, init="corda", targets=tuple(targets),
      rank_pattern={"v_proj": 3}, init_options={"corda_method": method})
  for path, weight, ours in replaced(base, block, stats):
    r = theirs[path].r["default"]
    a, b = (getattr(theirs[path], n)["default"].weight.detach().numpy().T
            for n in ("lora_A", "lora_B"))
    assert tiny.distance(
        weight, theirs[path].base_layer.weight.detach().numpy().T) < 1e-3
    signs = np.sign((ours.a[:, :r] * a).sum(0))
    assert tiny.distance(ours.a[:, :r] * signs, a) < 2e-3
    assert tiny.distance(ours.b[:r] * signs[:, None], b) < 2e-3
    np.testing.assert_array_equal(ours.a, ours.a0)


@pytest.mark.parametrize("direction, scale", [
    ("ArB2r", "stable"), ("A2rBr", "gd_scale"), ("ArBr", "weight_svd"),
    ("ArB2r", "unit")])
def test_lora_ga_is_that_of_peft(direction, scale, base, torch_model):
  targets = ["q_proj", "v_proj", "down_proj"]
  options = {"direction": direction, "scale": scale, "stable_gamma": 4}
  config = peft.LoraConfig(
      r=8, lora_alpha=12, target_modules=targets, init_lora_weights="lora_ga",
      rank_pattern={"v_proj": 6},
      lora_ga_config=peft.LoraGAConfig(**options))
  def train():
    for which in ([0, 1], [2, 3]):
      torch_model(**torch_batch(which)).loss.backward()

  originals = {n: w.detach().numpy().T.copy()
               for n, w in torch_model.named_parameters()}
  loraga.preprocess_loraga(torch_model, config, train)
  theirs = modules(peft.get_peft_model(torch_model, config))
  block, stats = gather(
      base, rank=8, alpha=12, init="lora_ga", targets=tuple(targets),
      rank_pattern={"v_proj": 6}, init_options=options)
  for path, weight, ours in replaced(base, block, stats):
    r = theirs[path].r["default"]
    a, b = (getattr(theirs[path], n)["default"].weight.detach().numpy().T
            for n in ("lora_A", "lora_B"))
    # Vectors are known up to a sign, of A and of B by themselves.
    a = a * np.sign((ours.a[:, :r] * a).sum(0))
    b = b * np.sign((ours.b[:r] * b).sum(1))[:, None]
    assert tiny.distance(ours.a[:, :r], a) < 2e-3
    assert tiny.distance(ours.b[:r], b) < 2e-3
    s = theirs[path].scaling["default"]
    assert float(ours.scale) == pytest.approx(s)
    np.testing.assert_allclose(
        weight, originals[f"{path}.weight"] - s * ours.a @ ours.b, atol=1e-5)


def test_groups_of_targets_make_no_difference(base, monkeypatch):
  _, together = gather(base, rank=4, init="lora_ga")
  monkeypatch.setattr(statistics, "LIMIT", 1)
  _, alone = gather(base, rank=4, init="lora_ga", targets="v_proj,down_proj")
  for name, found in alone.items():
    # Singular vectors, in A's columns and B's rows, are defined up to signs.
    for factor, other, axis in zip(
        found, together[name], (-2, -1), strict=True):
      signs = np.sign(np.sum(factor * other, axis, keepdims=True))
      np.testing.assert_allclose(factor, signs * other, atol=1e-5)


def test_a_tied_head_has_no_weight_of_its_own(base):
  tied = CONFIG.__class__(**vars(CONFIG) | {"tie_embeddings": True})
  with pytest.raises(errors.UsageError, match="adapt embed_tokens instead"):
    statistics.gather(
        adapters_lib.AdapterConfig(init="eva", targets="lm_head"), BATCHES,
        base=base.replace(lm_head=None), paths=PATHS, model=tied,
        settings=SETTINGS)


# A process of eight devices.
@pytest.mark.slow
def test_sums_over_rows_that_are_cut_over_devices():
  done = subprocess.run(
      [sys.executable, "-m", "tests.train.statistics_mesh"],
      cwd=pathlib.Path(__file__).parents[2], text=True, capture_output=True,
      timeout=240, check=False,
      env=devices.environ(2, JAX_PLATFORMS="cpu"))
  assert done.returncode == 0, done.stderr
  for distances in json.loads(done.stdout.splitlines()[-1]).values():
    assert max(distances) < 1e-5
