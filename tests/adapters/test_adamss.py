"""AdaMSS: its equation, and clusters that PEFT's files do not hold."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import adamss
from lora_jax.adapters import clusters
from lora_jax.adapters import partition
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from lora_jax.models import modules
from tests import tiny
from tests.adapters import with_peft

CONFIG = adapters_lib.AdapterConfig(
    method="adamss", rank=8, targets=("q_proj", "up_proj", "down_proj"),
    options=adamss.Options(num_subspaces=3, subspace_rank=2))


@pytest.mark.parametrize("biased", [True, False])
def test_the_equation(biased):
  rng = np.random.default_rng(0)
  cluster, ranks = np.int32([1, 0, 1, 1, 0]), [2, 1]
  a, n = rng.standard_normal((2, 2, 3)), rng.standard_normal((3, 4 + biased))
  rows = {0: rng.standard_normal((2, 2)), 1: rng.standard_normal((3, 2))}
  delta = np.zeros((4 + biased, 5))
  for k, rank in enumerate(ranks):
    for row, j in enumerate(np.flatnonzero(cluster == k)):
      delta[:, j] = n.T @ a[k, :rank].T @ rows[k][row, :rank]
  adapter = adamss.AdaMSS(
      a=a.astype(np.float32),
      b=np.concatenate([rows[0], rows[1]]).astype(np.float32),
      vectors=n.astype(np.float32), sizes=np.int32([2, 3]),
      ranks=np.int32(ranks), rate=np.float32(0), rank=np.int32(3),
      cluster=cluster, biased=biased)
  x = rng.standard_normal((2, 4)).astype(np.float32)
  w, bias = np.ones((4, 5), np.float32), np.ones(5, np.float32)
  assert tiny.distance(adapter.apply(x, w), x @ (1 + delta[:4])) < 1e-6
  assert tiny.distance(adapter.merge(w), 1 + delta[:4]) < 1e-6
  expected = 1 + delta[4] if biased else bias
  assert tiny.distance(adapter.shift(bias), expected) < 1e-6
  assert adapter.shift(None) is None


@pytest.mark.parametrize("shape, rank", [
    ((40, 40), 8), ((60, 33), 20), ((33, 60), 20), ((20, 30), 20)])
def test_the_svd_is_torch_s(shape, rank):
  torch = pytest.importorskip("torch")
  a = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
  torch.manual_seed(5)
  u, _, v = torch.svd_lowrank(torch.from_numpy(a), q=rank, niter=2)
  ours, vectors = clusters.svd_lowrank(a, rank, 5)
  for mine, theirs in ((ours, u.numpy()), (vectors.T, v.numpy())):
    sign = np.sign((mine * theirs).sum(0))
    assert tiny.distance(mine * sign, theirs) < 1e-4


@pytest.mark.parametrize("n, d, count, seed", [
    (40, 8, 3, 0), (500, 20, 5, 1), (300, 100, 10, 2), (7, 3, 7, 3),
    (3000, 4, 5, 4)])
def test_clusters_are_scikit_learn_s(n, d, count, seed):
  cluster = pytest.importorskip("sklearn.cluster")
  x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
  found = cluster.KMeans(
      n_clusters=count, init="random", n_init=1, max_iter=clusters.STEPS,
      random_state=clusters.SEED).fit_predict(x)
  np.testing.assert_array_equal(clusters.kmeans(x, count), found)


def test_an_empty_cluster_gets_the_farthest_row():
  x = np.float64([[0], [1], [10], [4]])
  labels = np.int32([0, 0, 0, 2])
  centres = clusters._centres(x, labels, np.float64([[0], [0], [4]]))
  np.testing.assert_array_equal(centres, [[0.5], [10], [4]])


@pytest.fixture
def unbiased(monkeypatch):
  """The model of `with_peft` without a bias anywhere."""
  config = dataclasses.replace(
      with_peft.CONFIG, qkv_bias=False, o_bias=False, mlp_bias=False)
  monkeypatch.setattr(with_peft, "CONFIG", config)
  monkeypatch.setattr(with_peft, "PATHS", modules.paths(config))
  monkeypatch.setattr(with_peft, "base", functools.cache(
      lambda: init.random_base(jax.random.key(0), config)))


VARIANTS = [
    {}, {"random_seed": 3, "num_subspaces": 5, "subspace_rank": 1},
    # Clusters of less outputs than s, directions that are too small.
    {"num_subspaces": 20, "subspace_rank": 4},
    {"use_dynamic_rank": True, "subspace_rank": 6, "svd_threshold": 0.6}]


def check(fields, tmp_path, **more):
  pytest.importorskip("sklearn")
  options = dataclasses.replace(CONFIG.options, **fields)
  config = dataclasses.replace(CONFIG, options=options, **more)
  loaded, tensors = with_peft.check(config, tmp_path)
  assert loaded.config.options == options
  return tensors


# Others have what these have, one by one.
@pytest.mark.parametrize("fields", [
    pytest.param(x, marks=() if i % 2 else pytest.mark.slow, id=str(x))
    for i, x in enumerate(VARIANTS)])
def test_folders_are_read_and_written(fields, tmp_path):
  tensors = check(fields, tmp_path)
  ranks = {x.shape[0] for name, x in tensors.items() if "adamss_A" in name}
  # Where ranks may differ, they do.
  assert (len(ranks) > 1) == (fields in VARIANTS[2:])
  for name, x in tensors.items():
    if "adamss_newB" in name:
      assert x.shape[1] == (49 if "down_proj" in name else 33)


def test_folders_of_unbiased_projections(unbiased, tmp_path):
  tensors = check({}, tmp_path, layers="0,2")
  name = "base_model.model.model.layers.2.self_attn.q_proj.adamss_newB"
  assert tensors[name].shape == (8, 32)
  assert not any(".layers.1." in name for name in tensors)


def test_a_rank_above_the_weight_s_is_cut(unbiased, tmp_path):
  tensors = check({}, tmp_path, rank=100, targets=("up_proj",))
  assert {x.shape[0] for name, x in tensors.items() if "newB" in name} == {32}


def test_clusters_that_only_rounding_tells_are_refused(tmp_path):
  """PEFT makes some of orthonormal rows, which all are equally far apart."""
  a = np.random.default_rng(0).standard_normal((9, 9))
  u, _ = clusters.svd_lowrank(a, 9, 0)
  far = np.linalg.norm(u[:, None] - u, axis=-1)[~np.eye(9, dtype=bool)]
  np.testing.assert_allclose(far, np.sqrt(2), rtol=1e-12)
  with pytest.raises(errors.UsageError, match="has 32 outputs, which"):
    with_peft.build(dataclasses.replace(CONFIG, rank=32))
  peft = pytest.importorskip("peft")
  pytest.importorskip("sklearn")
  peft.get_peft_model(with_peft.torch_model(), peft.AdamssConfig(
      r=32, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
  with pytest.raises(errors.UserError, match="q_proj has 32 outputs, which"):
    with_peft.read(tmp_path / "a")


def test_a_starts_in_the_cluster_s_own_space():
  """With so many rows that A_k spans what the cluster's part of U does."""
  config = dataclasses.replace(CONFIG, rank=6, options=adamss.Options(
      num_subspaces=2, subspace_rank=6))
  one = partition.module(with_peft.build(config, move=0.0), "q_proj", 1)
  w = np.asarray(with_peft.base().layers["q_proj"].weight[1], np.float64)
  bias = np.asarray(with_peft.base().layers["q_proj"].bias[1])
  assert np.abs(bias).max() > 0
  u, n = clusters.svd_lowrank(np.concatenate([w, bias[None]]).T, 6, 0)
  sign = (np.asarray(one.vectors) * n).sum(1)
  np.testing.assert_allclose(np.abs(sign), 1, atol=1e-5)
  for k, rank in enumerate(one.ranks):
    own = (u * np.sign(sign))[np.asarray(one.cluster) == k]
    a = np.asarray(one.a[k])
    assert rank == min(6, len(own)) and not a[rank:].any()
    np.testing.assert_allclose(
        a[:rank] @ a[:rank].T, np.eye(rank), atol=1e-5)
    assert tiny.distance(own @ a.T @ a, own) < 1e-5
  assert not np.asarray(one.b).any()
  assert np.bincount(one.cluster).tolist() == one.sizes.tolist()


def saved(tmp_path, config=CONFIG):
  with_peft.write(tmp_path / "a", config, with_peft.build(config))
  return tmp_path / "a"


def test_what_is_read_must_see_its_own_base(tmp_path):
  loaded = with_peft.read(saved(tmp_path))
  with pytest.raises(ValueError, match="has yet to see its weight"):
    with_peft.logits(loaded.adapters)
  other = init.random_base(jax.random.key(9), with_peft.CONFIG)
  with pytest.raises(errors.UserError, match="made for another base"):
    adapters_lib.beside(loaded.adapters, other)


def test_subspaces_given_up_in_training_are_refused(tmp_path):
  place = saved(tmp_path) / peft_export.CONFIG
  place.write_text(json.dumps(
      json.loads(place.read_text()) | {"use_asa": True}))
  with pytest.raises(errors.UserError, match="use_asa=True is not supported"):
    with_peft.read(tmp_path / "a")


@pytest.mark.parametrize("suffix, change", [
    ("adamss_newB", lambda x: x[:, 1:]),
    ("adamss_A.1", lambda x: x[:, 1:]),
    ("adamss_B.1", lambda x: x[1:]),
    ("adamss_B.2", lambda x: None),
    ("adamss_B.0", lambda x: np.concatenate([x, x], 1))])
def test_damaged_folders_are_refused(suffix, change, tmp_path):
  place = saved(tmp_path) / peft_export.WEIGHTS
  tensors = safetensors.numpy.load_file(place)
  name = f"base_model.model.model.layers.1.mlp.up_proj.{suffix}"
  tensors[name] = change(tensors[name])
  safetensors.numpy.save_file(
      {k: np.ascontiguousarray(v) for k, v in tensors.items()
       if v is not None}, place)
  with pytest.raises(errors.UserError, match=r"up_proj.adamss_.* has shape"):
    with_peft.read(tmp_path / "a")


@pytest.mark.parametrize("fields", [
    {"num_subspaces": 0}, {"subspace_rank": 0}], ids=str)
def test_options_out_of_range_are_refused(fields):
  with pytest.raises(errors.UsageError, match=next(iter(fields))):
    with_peft.build(dataclasses.replace(CONFIG, options=fields))
