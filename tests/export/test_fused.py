"""Adapters of q, k, v as adapters of qkv_proj: by hand, in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax import errors
from lora_jax.export import fused

LAYER = "model.layers.0.self_attn."
Q, K, V = (f"{LAYER}{name}_proj" for name in "qkv")
QKV, O = f"{LAYER}qkv_proj", f"{LAYER}o_proj"
SIZES = {Q: 4, K: 2, V: 2}
FUSED = {QKV: SIZES}
PATHS = {name: [path] for name, path in zip("qkvo", (Q, K, V, O))}
CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"],
          "rank_pattern": {}, "alpha_pattern": {}}
RNG = np.random.default_rng(0)


def _part(path, rank, magnitude=False):
  """PEFT's tensors of one part, `[r, 5]` and `[o, r]`."""
  shapes = {fused.DOWN: (rank, 5), fused.UP: (SIZES.get(path, 5), rank)}
  if magnitude:
    shapes[fused.MAGNITUDE] = (SIZES[path],)
  return {f"{fused.PREFIX}{path}.{suffix}":
          RNG.normal(size=shape).astype(np.float32)
          for suffix, shape in shapes.items()}


def _tensor(named, path, suffix):
  return named[f"{fused.PREFIX}{path}.{suffix}"]


def _delta(named, config, path):
  """s B A of a module, `[o, i]` float64, by PEFT's rules."""
  down, up = (np.asarray(_tensor(named, path, s), np.float64)
              for s in (fused.DOWN, fused.UP))
  name = path.rpartition(".")[2]
  alpha = next((config["alpha_pattern"][key] for key in (path, name)
                if key in config["alpha_pattern"]), config["lora_alpha"])
  rank = next((config["rank_pattern"][key] for key in (path, name)
               if key in config["rank_pattern"]), config["r"])
  assert len(down) == rank
  return alpha / (rank**0.5 if config.get("use_rslora") else rank) * up @ down


def _same(a, b):
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name])


def test_modules_trained_whole_keep_their_names():
  norm = {f"{fused.PREFIX}model.norm.weight": np.ones(5, np.float32)}
  named = _part(Q, 3) | norm
  joined, config, metadata = fused.join(named, CONFIG, FUSED, PATHS)
  assert joined.keys() == {
      *norm, f"{fused.PREFIX}{QKV}.{fused.DOWN}",
      f"{fused.PREFIX}{QKV}.{fused.UP}"}
  back, _ = fused.split(joined, config, FUSED, PATHS, metadata, "here")
  _same(back, named)
  whole = {f"{fused.PREFIX}{V}.weight": np.ones((2, 5), np.float32)}
  with pytest.raises(errors.UserError, match="has qkv_proj, and no v_proj"):
    fused.join(named | whole, CONFIG, FUSED, PATHS)


def test_three_are_one_of_three_times_the_rank():
  named = _part(Q, 3) | _part(K, 3) | _part(V, 3) | _part(O, 3)
  joined, config, metadata = fused.join(named, CONFIG, FUSED, PATHS)
  assert config["rank_pattern"] == {"qkv_proj": 9}
  assert config["alpha_pattern"] == {"qkv_proj": 18}
  assert config["target_modules"] == ["o_proj", "qkv_proj"]
  np.testing.assert_array_equal(
      _tensor(joined, QKV, fused.DOWN),
      np.concatenate([_tensor(named, p, fused.DOWN) for p in SIZES]))
  expected = np.zeros((8, 9), np.float32)
  expected[:4, :3] = _tensor(named, Q, fused.UP)
  expected[4:6, 3:6] = _tensor(named, K, fused.UP)
  expected[6:, 6:] = _tensor(named, V, fused.UP)
  np.testing.assert_array_equal(_tensor(joined, QKV, fused.UP), expected)
  again, plain = fused.split(joined, config, FUSED, PATHS, metadata, "file")
  _same(again, named)
  assert plain["rank_pattern"] == plain["alpha_pattern"] == {}
  assert plain["target_modules"] == sorted(
      p.rpartition(".")[2] for p in (*SIZES, O))


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_scales_and_absent_parts(rslora):
  named = _part(Q, 2) | _part(V, 4)
  config = CONFIG | {"rank_pattern": {"q_proj": 2, "v_proj": 4},
                     "alpha_pattern": {"v_proj": 1.5}, "use_rslora": rslora}
  joined, whole, metadata = fused.join(named, config, FUSED, PATHS)
  expected = np.zeros((8, 5))
  expected[:4], expected[6:] = (_delta(named, config, p) for p in (Q, V))
  np.testing.assert_allclose(
      _delta(joined, whole, QKV), expected, rtol=1e-6, atol=1e-6)
  again, parts = fused.split(joined, whole, FUSED, PATHS, metadata, "file")
  assert {len(_tensor(again, p, fused.DOWN)) for p in (Q, V)} == {2, 4}
  assert not any(K in name for name in again)
  for path in (Q, V):
    np.testing.assert_allclose(
        _delta(again, parts, path), _delta(named, config, path), rtol=1e-6,
        atol=1e-6)


def test_what_peft_trained_shares_a_and_comes_back_as_it_was():
  magnitudes = {p: _part(p, 3, magnitude=True) for p in SIZES}
  named = {f"{fused.PREFIX}{QKV}.{s}": x.astype(np.float32) for s, x in {
      fused.DOWN: RNG.normal(size=(3, 5)), fused.UP: RNG.normal(size=(8, 3)),
      fused.MAGNITUDE: RNG.normal(size=8)}.items()}
  parts, config = fused.split(named, CONFIG, FUSED, PATHS, {}, "file")
  assert parts.keys() == {n for p in magnitudes.values() for n in p}
  for path, rows in zip(SIZES, (slice(4), slice(4, 6), slice(6, 8))):
    np.testing.assert_array_equal(
        _tensor(parts, path, fused.DOWN), _tensor(named, QKV, fused.DOWN))
    for suffix in (fused.UP, fused.MAGNITUDE):
      np.testing.assert_array_equal(
          _tensor(parts, path, suffix), _tensor(named, QKV, suffix)[rows])
  joined, whole, metadata = fused.join(parts, config, FUSED, PATHS)
  _same(joined, named)
  assert not metadata and whole["rank_pattern"] == {}


def test_blocks_that_peft_trained_further_are_whole():
  named = _part(Q, 1) | _part(K, 1) | _part(V, 1)
  joined, config, metadata = fused.join(named, CONFIG, FUSED, PATHS)
  assert metadata
  _tensor(joined, QKV, fused.UP)[7, 0] = 1.0
  parts, split = fused.split(joined, config, FUSED, PATHS, metadata, "file")
  for path, rows in zip(SIZES, (slice(4), slice(4, 6), slice(6, 8))):
    np.testing.assert_allclose(
        _delta(parts, split, path), _delta(joined, config, QKV)[rows],
        rtol=1e-6, atol=1e-7)


def test_refused():
  dora = _part(Q, 2, magnitude=True) | _part(K, 2, magnitude=True)
  with pytest.raises(errors.UserError, match=r"v_proj is not.*--format=hf"):
    fused.join(dora, CONFIG, FUSED, PATHS)
  other = _part(Q, 2) | {f"{fused.PREFIX}{Q}.lora_E": np.ones(2)}
  with pytest.raises(errors.UserError, match=r"lora_E cannot.*--format=hf"):
    fused.join(other, CONFIG, FUSED, PATHS)
  for edit, message in (
      ({fused.UP: np.ones((7, 3))}, r"file.*lora_B.*\(7, 3\).*\(8, 3\)"),
      ({"lora_C.weight": np.ones(2)}, r"lora_C.weight has shape \(2,\).*None"),
      ({fused.MAGNITUDE: np.ones(7)}, r"\(7,\).*needs \(8,\)"),
      ({fused.DOWN: np.ones(3)}, "no lora_A")):
    named = {f"{fused.PREFIX}{QKV}.{s}": x for s, x in ({
        fused.DOWN: np.ones((3, 5)), fused.UP: np.ones((8, 3))} | edit).items()}
    with pytest.raises(errors.UserError, match=message):
      fused.split(named, CONFIG, FUSED, PATHS, {}, "file")


def test_models_without_fused_modules_are_left_alone():
  named = _part(Q, 3)
  joined, config, metadata = fused.join(named, CONFIG, {}, PATHS)
  assert joined is named and config == CONFIG and not metadata
