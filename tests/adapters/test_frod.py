"""FRoD: its equation, the basis that PEFT finds too, and PEFT's own folders."""

from __future__ import annotations

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import frod
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import partition
from lora_jax.export import peft as peft_export
from tests import tiny
from tests.adapters import with_peft

CONFIG = adapters_lib.AdapterConfig(
    method="frod", targets=("q_proj", "down_proj"),
    options=frod.Options(sparse_rate=0.1, projection_key=7))


def of(i, o, n, tokens, seed=0):
  """(adapter, x, w, S + L, V, U') of random numbers."""
  rng = np.random.default_rng(seed)
  v, w = rng.standard_normal((i, i)), rng.standard_normal((i, o))
  u = np.linalg.inv(v) @ w
  l0 = np.linalg.norm(u, axis=1)
  at = rng.permutation(i * (i - 1))[:n]
  rows, columns = at // (i - 1), at % (i - 1)
  columns = columns + (columns >= rows)
  lambda_l, values = l0 + rng.standard_normal(i), rng.standard_normal(n)
  middle = np.diag(lambda_l)
  middle[rows, columns] = values
  adapter = frod.FRoD(
      lambda_l=lambda_l.astype(np.float32), values=values.astype(np.float32),
      rate=np.float32(0), rank=np.int32(1), lengths=l0.astype(np.float32),
      target="t").bound(frod.Bases(
          v={"t": v.astype(np.float32)},
          inverse={"t": np.linalg.inv(v).astype(np.float32)},
          places={"t": np.int32([rows, columns])}))
  x = rng.standard_normal((tokens, i)).astype(np.float32)
  return adapter, x, w.astype(np.float32), middle, v, u / l0[:, None]


@pytest.mark.parametrize("tokens, n", [(2, 6), (2, 0), (40, 30)])
def test_the_equation(tokens, n):
  """Where a few entries of S are moved, and where it is a matrix."""
  adapter, x, w, middle, v, u = of(8, 5, n, tokens)
  np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, rtol=1e-9)
  expected = v @ middle.T @ u
  assert tiny.distance(adapter.merge(w), expected) < 1e-5
  assert tiny.distance(adapter.apply(x, w), x @ expected) < 1e-5
  # l0 is what the weight and V tell.
  asking = dataclasses.replace(adapter, lengths=None)
  assert tiny.distance(asking.apply(x, w), x @ expected) < 1e-5
  assert tiny.distance(
      asking.prepared(w, adapter.bases).lengths, adapter.lengths) < 1e-6


def test_the_start_is_the_base_to_the_bit():
  tree = with_peft.build(CONFIG, move=0.0)
  np.testing.assert_array_equal(with_peft.logits(tree), with_peft.logits(None))


@pytest.mark.parametrize("n, i, o", [
    (1, 20, 20), (1, 20, 31), (3, 20, 20), (4, 30, 20), (5, 24, 8)])
def test_the_basis_is_the_one_peft_finds(n, i, o):
  """Signs included, although layers below the first i outputs come later."""
  torch = pytest.importorskip("torch")
  model = pytest.importorskip("peft.tuners.frod.model")
  weights = np.random.default_rng(n).standard_normal((n, i, o)).astype(
      np.float32)
  modules = method_lib.Modules(
      {"q_proj": (i, o)}, 1, frod.Options(), ranks={"q_proj": [1] * n},
      weights={"q_proj": jax.numpy.asarray(weights)})
  shared = frod.share(None, modules)
  v, inverse = shared.v["q_proj"], shared.inverse["q_proj"]
  theirs = model._projection_from_weights(
      [torch.from_numpy(w.T) for w in weights], frod.DETERMINED)
  assert tiny.distance(v, theirs) < 1e-5
  np.testing.assert_allclose(
      np.asarray(v, np.float64) @ np.asarray(inverse, np.float64),
      np.eye(i), atol=1e-5)


@pytest.mark.parametrize("fields", [
    {}, {"layers": "0,2"}, {"targets": ("k_proj", "o_proj", "down_proj")},
    {"options": frod.Options(sparse_rate=0.0)}], ids=str)
def test_folders_are_read_and_written(fields, tmp_path):
  config = dataclasses.replace(CONFIG, **fields)
  loaded, tensors = with_peft.check(config, tmp_path)
  assert loaded.config.options == config.options
  modules = len(config.targets) * (2 if config.layers else 3)
  assert len(tensors) == 2 * modules + 3 * len(config.targets)
  # Beside the base, l0 is known, and the model is the same.
  known = adapters_lib.beside(loaded.adapters, with_peft.base())
  assert partition.module(known, "down_proj", 0).lengths is not None
  assert partition.module(loaded.adapters, "down_proj", 0).lengths is None
  assert tiny.distance(with_peft.logits(known),
                       with_peft.logits(loaded.adapters)) < 1e-6


def theirs(folder, **fields):
  """PEFT's model with values of its own, saved."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(with_peft.torch_model(), peft.FrodConfig(
        target_modules=["q_proj", "down_proj"], sparse_rate=0.1,
        progressbar=False, **fields)).eval()
    with torch.no_grad():
      for value in model.parameters():
        if value.requires_grad:
          value += 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
  return tiny.torch_logits(model, with_peft.TOKENS)


def test_peft_s_eigenvectors_are_read(tmp_path):
  expected = theirs(tmp_path / "a")
  loaded = with_peft.read(tmp_path / "a")
  assert loaded.config.options.regularization_alpha == 1e-3
  assert tiny.distance(with_peft.logits(None), expected) > 1e-3
  assert tiny.distance(with_peft.logits(loaded.adapters), expected) <= 2e-5


def test_peft_misreads_what_another_library_s_eigenvectors_made(tmp_path):
  """Why a start here has none: another sign of one, and what belongs to it."""
  peft = pytest.importorskip("peft")
  theirs(tmp_path / "a")
  place = tmp_path / "a" / peft_export.WEIGHTS
  tensors = safetensors.numpy.load_file(place)
  # V diag(s), diag(s) S diag(s) and L are the same function, by the equation.
  sign = np.ones(32, np.float32)
  sign[3] = -1
  tensors["base_model.frod_V.self_attn_q_proj"] *= sign
  rows, columns = tensors["base_model.frod_s_indices.self_attn_q_proj"]
  for name, value in tensors.items():
    if "q_proj.frod_lambda_s_values" in name:
      value *= sign[rows] * sign[columns]
  before = with_peft.logits(with_peft.read(tmp_path / "a").adapters)
  safetensors.numpy.save_file(tensors, place, {"format": "pt"})
  after = with_peft.logits(with_peft.read(tmp_path / "a").adapters)
  assert tiny.distance(after, before) <= 2e-5
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(
        with_peft.torch_model(), str(tmp_path / "a")).eval()
  assert tiny.distance(
      tiny.torch_logits(model, with_peft.TOKENS), before) > 1e-2


def test_above_another_method_it_starts_as_the_identity():
  lora = adapters_lib.AdapterConfig(rank=2, targets=("q_proj",))
  _, tree = adapters_lib.build(
      jax.random.key(1), [lora, CONFIG], with_peft.base(), with_peft.PATHS)
  np.testing.assert_array_equal(with_peft.logits(tree), with_peft.logits(None))


def test_what_is_trained():
  tree = with_peft.build(CONFIG)
  assert partition.trainable_size(tree) == 3 * (
      32 + 102 + 48 + 230)
  trainable, _ = adapters_lib.split(tree)
  assert not jax.tree.leaves(trainable.shared)


@pytest.mark.parametrize("fields, match", [
    ({"targets": ("down_proj",), "layers": "1"}, "down_proj has 48 inputs"),
    ({"options": {"regularization_alpha": 1e-3}}, "PEFT would misread"),
    ({"options": {"regularization_alpha": 0.0}}, "regularization_alpha=0"),
    ({"options": {"sparse_rate": 1.5}}, "sparse_rate=1.5")], ids=str)
def test_what_cannot_be_is_refused(fields, match):
  with pytest.raises(errors.UsageError, match=match):
    with_peft.build(dataclasses.replace(CONFIG, **fields))


@pytest.mark.parametrize("change, match", [
    (lambda v: None, "frod_V.mlp_down_proj is missing"),
    (lambda v: v[:9], "do not fit down_proj's 48 inputs"),
    (lambda v: 0 * v, "has no inverse")])
def test_damaged_folders_are_refused(change, match, tmp_path):
  with_peft.write(tmp_path / "a", CONFIG, with_peft.build(CONFIG))
  place = tmp_path / "a" / peft_export.WEIGHTS
  tensors = safetensors.numpy.load_file(place)
  name = "base_model.frod_V.mlp_down_proj"
  tensors[name] = change(tensors[name])
  safetensors.numpy.save_file(
      {k: v for k, v in tensors.items() if v is not None}, place)
  with pytest.raises(errors.UserError, match=match):
    with_peft.read(tmp_path / "a")


def test_a_folder_without_the_basis_is_refused(tmp_path):
  theirs(tmp_path / "a", save_projection=False)
  text = json.loads((tmp_path / "a" / peft_export.CONFIG).read_text())
  assert not text["save_projection"]
  with pytest.raises(errors.UserError, match="save_projection=False"):
    with_peft.read(tmp_path / "a")
