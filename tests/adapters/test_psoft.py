"""PSOFT against PEFT's layer, whose A and B it is given."""

from __future__ import annotations

import collections
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import psoft
from tests import tiny
from tests.adapters import with_peft


def slot(width=3, **options):
  return base_lib.Slot(
      np.int32(width), np.float32(1), np.float32(0), target="q_proj",
      width=width, options=psoft.Options(**options))


VARIANTS = [
    ({}, {}),
    ({"symmetric": True}, {"ab_svd_init": "pissa_init"}),
    ({"neumann": True}, {"use_cayley_neumann": True}),
    ({"neumann": True, "terms": 4, "eps": 0.5},
     {"use_cayley_neumann": True, "num_cayley_neumann_terms": 4,
      "cayley_neumann_eps": 0.5}),
    ({"orth": False}, {"psoft_orth": False}),
    ({"mag_a": False}, {"psoft_mag_a": False}),
    ({"mag_b": False}, {"psoft_mag_b": False})]


@pytest.mark.parametrize("ours, theirs", VARIANTS)
def test_variants_are_those_of_peft(ours, theirs):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  torch.manual_seed(0)
  linear = torch.nn.Linear(12, 8, bias=False)
  w = linear.weight.detach().numpy().T.copy()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(torch.nn.Sequential(collections.OrderedDict(
        q_proj=linear)), peft.PsoftConfig(
            r=3, psoft_alpha=5, target_modules=["q_proj"], **theirs))
  layer = model.base_model.model.q_proj
  r = layer.psoft_R["default"]
  with torch.no_grad():
    for value in r.parameters():
      value += 0.3 * torch.randn_like(value)
  fresh = psoft.init(None, jnp.asarray(w), slot(**ours))
  # Up to signs, the same subspace; PEFT's s = 5 / 3 is in its scaling, and
  # its B is divided by it.
  a, b = (x.numpy().T for x in layer._get_psoft_ab_cache_buffers("default"))
  scale = 5 / 3
  if ours.get("symmetric"):
    a, b = a * scale**0.5, b * scale**0.5
  else:
    b = b * scale
  np.testing.assert_allclose(abs(fresh.a), abs(a), atol=1e-5)
  np.testing.assert_allclose(abs(fresh.b), abs(b), atol=1e-5)
  np.testing.assert_allclose(fresh.a @ fresh.b, a @ b, atol=1e-5)
  assert (fresh.a.max(0) > -fresh.a.min(0)).all()
  x = torch.randn(2, 3, 12)
  assert tiny.distance(fresh.apply(x.numpy(), w), x.numpy() @ w) < 1e-6
  values = {name: None if value is None else value.detach().numpy()
            for name, value in (("q", r.weight), ("vector_a", r.vector_a),
                                ("vector_b", r.vector_b))}
  adapter = fresh.replace(a=a, b=b, **values)
  assert jax.tree.structure(adapter) == jax.tree.structure(fresh)
  expected = model.eval()(x).detach().numpy()
  assert tiny.distance(adapter.apply(x.numpy(), w), expected) < 2e-6
  assert tiny.distance(expected, x.numpy() @ w) > 1e-2
  merged = model.merge_and_unload().q_proj.weight.detach().numpy().T
  assert tiny.distance(adapter.merge(jnp.asarray(w)), merged) < 2e-6


def test_a_quarter_turn_by_hand():
  """Q = [[0, 1], [-1, 0]] gives R = (I + Q) (I - Q)^-1 = Q."""
  w = np.float32([[3, 0, 0], [0, 2, 0]])
  adapter = psoft.init(None, jnp.asarray(w), slot(2)).replace(
      q=np.float32([1]), a=np.eye(2, dtype=np.float32), b=w)
  np.testing.assert_allclose(
      adapter.rotation(), [[0, 1], [-1, 0]], atol=1e-6)
  # x R' W0.
  np.testing.assert_allclose(
      adapter.apply(np.float32([[1, 10]]), w), [[30, -2, 0]], atol=1e-5)


def test_a_randomised_svd_finds_the_same_subspace():
  rng = np.random.default_rng(0)
  w = rng.standard_normal((20, 4)) @ rng.standard_normal((4, 16))
  exact, found = (psoft.init(None, jnp.asarray(w, jnp.float32), slot(
      4, niter=n)) for n in (0, 3))
  np.testing.assert_allclose(found.a @ found.b, exact.a @ exact.b, atol=1e-4)


def test_a_rank_above_the_directions_is_refused():
  with pytest.raises(errors.UsageError, match=r"rank=9 is above the 8"):
    psoft.init(None, jnp.zeros((12, 8)), slot(9))


def test_the_folder_does_not_depend_on_signs_of_the_base(tmp_path):
  """What is read is what was written, whichever SVD the reader would find."""
  config = adapters_lib.AdapterConfig(
      method="psoft", rank=4, targets="q_proj,down_proj")
  tree = with_peft.build(config)
  with_peft.write(tmp_path, config, tree)
  np.testing.assert_array_equal(
      with_peft.logits(with_peft.read(tmp_path).adapters),
      with_peft.logits(tree))


@pytest.mark.parametrize("fields, options", [
    ({"alpha": 5.0}, {}), ({"alpha": 8.0, "dropout": 0.1}, {
        "symmetric": True, "neumann": True, "terms": 4, "eps": 0.5})])
def test_folders_with_a_and_b(fields, options, tmp_path):
  found, tensors = with_peft.check(adapters_lib.AdapterConfig(
      method="psoft", rank=4, targets="q_proj,down_proj",
      options=options, **fields), tmp_path)
  assert found.config.alpha == fields["alpha"]
  assert {k.rpartition("psoft_")[2] for k in tensors} == {
      "R.weight", "R.vector_a", "R.vector_b", "A", "B"}


def test_files_without_a_and_b_are_refused(tmp_path):
  peft = pytest.importorskip("peft")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft.get_peft_model(with_peft.torch_model(), peft.PsoftConfig(
        r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
  with pytest.raises(errors.UserError, match="has no psoft_A: PEFT does"):
    with_peft.read(tmp_path)
