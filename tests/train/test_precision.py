"""Number formats and dynamic loss scaling."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.models import init
from lora_jax.train import checkpoint
from lora_jax.train import optim
from lora_jax.train import precision
from lora_jax.train import step
from tests import tiny
from tests.train import test_step

CONFIG = tiny.CONFIGS["llama"]
KEY = jax.random.key(3)
BATCH = test_step.fill([[1], [3, 2], [5, 4], [7, 0, 6]], (2, 2))


@pytest.fixture(scope="module")
def model():
  """(base, trainable, frozen)."""
  base = init.random_base(jax.random.key(0), CONFIG)
  tree = tiny.random_adapters(CONFIG, base, adapters_lib.AdapterConfig(
      rank=2, alpha=4.0), scale=0.1)
  return base, *adapters_lib.split(tree)


@jax.jit
def _wide(params, frozen, base):
  return step.loss_and_grads(
      params, frozen, base, BATCH, KEY, model=CONFIG,
      settings=step.Settings(remat="none"))


@jax.jit
def _half(params, frozen, base, scale):
  return step.loss_and_grads(
      params, frozen, base, BATCH, KEY, model=CONFIG,
      settings=step.Settings(dtype="float16", remat="none"), scale=scale)


def _cosines(ours, theirs):
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  return [float((a * b).sum() / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))
          for a, b in pairs]


@pytest.mark.parametrize("scale", [1.0, 2.0**15])
def test_gradients_of_float16_are_those_of_float32(scale, model):
  base, params, frozen = model
  value, grads = _half(params, frozen, base, jnp.float32(scale))
  expected, wanted = _wide(params, frozen, base)
  assert value == pytest.approx(float(expected), rel=1e-3)
  assert min(_cosines(grads, wanted)) > 0.999
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted)):
    assert a.dtype == jnp.float32
    assert jnp.linalg.norm(a - b) < 1e-2 * jnp.linalg.norm(b)


def test_small_gradients_vanish_without_a_scale(model):
  """A head and a last norm of 1/1024 make cotangents of about 1e-9."""
  base, params, frozen = model
  base = base.replace(norm=base.norm / 1024, lm_head=base.lm_head.replace(
      weight=base.lm_head.weight / 1024))
  _, wanted = _wide(params, frozen, base)
  _, lost = _half(params, frozen, base, jnp.float32(1))
  _, kept = _half(params, frozen, base, jnp.float32(2.0**18))
  assert min(_cosines(kept, wanted)) > 0.999
  assert all((x == 0).all() for x in jax.tree.leaves(lost))


SETTINGS = step.Settings(dtype="float16", remat="none")


def _train(state, frozen, base, batch=BATCH, settings=SETTINGS, rate=0.01):
  return step.train_step(
      state, frozen, base, batch, optim.hyper(optim.OptimConfig(), rate), KEY,
      model=CONFIG, settings=settings)


def test_an_overflow_is_skipped_and_the_scale_found(model):
  base, params, frozen = model
  state = step.init_state(params, precision.Precision(
      loss_scale=2.0**24, loss_scale_interval=3), "float16")
  scales, losses = [], []
  for _ in range(16):
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    state, metrics = _train(state, frozen, base)
    scales.append(float(metrics["loss_scale"]))
    losses.append(float(metrics["loss"]))
    assert metrics["finite"] and jnp.isfinite(metrics["loss"])
    after = (state.params, state.opt_state)
    moved = [(np.asarray(a) != b).any() for a, b in zip(
        jax.tree.leaves(after), jax.tree.leaves(before))]
    assert any(moved) == bool(jnp.isfinite(metrics["grad_norm"]))
  found = scales.index(min(scales))
  assert 1 < found < 10
  # Halved at each overflow; then three steps, and it is tried again.
  assert scales[:found + 1] == [2.0**(24 - i) for i in range(found + 1)]
  assert scales[found:found + 4] == [min(scales)] * 3 + [2 * min(scales)]
  skipped = [s for s, after in itertools.pairwise(scales) if after < s]
  assert metrics["skipped"] == state.loss_scale.skipped == len(skipped)
  assert state.step == 16
  assert losses[-1] < losses[0] - 0.05
  # The optimiser counts the steps that were taken.
  counts = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
  assert counts == [16 - len(skipped)]


def test_what_no_scale_helps_is_not_finite(model):
  base, params, frozen = model
  state = step.init_state(
      params, precision.Precision(loss_scale=2.0), "float16")
  broken = base.replace(norm=base.norm * np.float32(np.nan))
  state, metrics = _train(state, frozen, broken)
  assert metrics["finite"] and metrics["skipped"] == 1
  state, metrics = _train(state, frozen, broken)
  assert not metrics["finite"]
  assert state.loss_scale.scale < precision.MIN_SCALE


@pytest.mark.parametrize("good, finite, scale, after", [
    (0, True, 8.0, (8.0, 1, 5)),
    (2, True, 8.0, (16.0, 0, 5)),
    (2, False, 8.0, (4.0, 0, 6)),
    (2, True, precision.MAX_SCALE, (precision.MAX_SCALE, 0, 5)),
])
def test_the_rule(good, finite, scale, after):
  state = precision.LossScale(
      scale=jnp.float32(scale), good=jnp.int32(good), skipped=jnp.int32(5),
      interval=jnp.int32(3))
  new = precision.adjust(state, jnp.bool_(finite))
  assert (new.scale, new.good, new.skipped) == after
  assert new.interval == 3
  assert jax.tree.map(jnp.dtype, new) == jax.tree.map(jnp.dtype, state)


def _program(dtype, params, frozen, base):
  state = step.init_state(params, None, dtype)
  settings = step.Settings(dtype=dtype, remat="none")
  return str(step.train_step.trace(
      state, frozen, base, BATCH, optim.hyper(optim.OptimConfig(), 0.1), KEY,
      model=CONFIG, settings=settings).jaxpr)


def test_compute_dtype_is_that_of_the_program(model):
  base, params, frozen = model
  programs = {d: _program(d, params, frozen, base) for d in precision.COMPUTE}
  for name, short in (("bfloat16", ":bf16["), ("float16", ":f16[")):
    has = {d for d, text in programs.items() if short in text}
    assert has == {name}
  assert step.init_state(params).loss_scale is None
  assert step.init_state(params, None, "bfloat16").loss_scale is None


STORED = precision.Precision(adapter_dtype="bfloat16", optim_dtype="bfloat16")


def test_stored_types(model):
  base, params, frozen = model
  settings = step.Settings(remat="none", optim_dtype="bfloat16")
  state = step.init_state(params, STORED)
  state, metrics = _train(state, frozen, base, settings=settings)
  adam = state.opt_state[1]
  types_of = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree)}
  assert types_of(state.params) == types_of(adam.mu) == {"bfloat16"}
  assert types_of(adam.nu) == {"float32"}
  # The gradient is of the stored values, in float32.
  near = jax.tree.map(
      lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
  value, grads = _wide(near, frozen, base)
  assert metrics["loss"] == pytest.approx(float(value), rel=1e-6)
  for mu, g in zip(jax.tree.leaves(adam.mu), jax.tree.leaves(grads)):
    clipped = g * min(1.0, 1 / float(metrics["grad_norm"]))
    np.testing.assert_allclose(
        mu.astype(np.float32), 0.1 * clipped, rtol=2**-8, atol=1e-8)


def test_updates_below_a_bfloat16_ulp_are_kept_on_average(model):
  """1e-5 is 1/100 to 1/400 of an ulp of weights of about 0.2."""
  base, params, frozen = model
  params = jax.tree.map(lambda p: jnp.full_like(p, 0.25), params)
  settings = step.Settings(remat="none", optim_dtype="bfloat16")
  state = step.init_state(params, STORED)
  size = sum(x.size for x in jax.tree.leaves(params))
  state, _ = _train(state, frozen, base, settings=settings, rate=1e-4)
  # Adam moves by 1e-4; an ulp is 2^-9 above and 2^-10 below 0.25.
  changed = sum(int((x != 0.25).sum()) for x in jax.tree.leaves(state.params))
  low, high = 1e-4 / 2**-9, 1e-4 / 2**-10
  assert 0.7 * low < changed / size < 1.3 * high


@pytest.mark.parametrize("value, down, up, share", [
    (1 + 2**-9, 1.0, 1 + 2**-7, 0.25), (-1 - 2**-9, -1.0, -1 - 2**-7, 0.25),
    (3.0, 3.0, 3.0, 0.0)])
def test_stochastic_rounding(value, down, up, share):
  wide = jnp.full((4096,), value, jnp.float32)
  like = {"x": jnp.zeros(4096, jnp.bfloat16), "y": jnp.zeros(4096)}
  got = precision.store(KEY, {"x": wide, "y": wide}, like)
  assert got["x"].dtype == jnp.bfloat16 and (got["y"] == value).all()
  found = np.asarray(got["x"], np.float64)
  assert set(found) == {down, up}
  # Four standard deviations of a share of 4096.
  assert abs((found == up).mean() - share) < 0.03 or down == up
  again = precision.store(KEY, {"x": wide, "y": wide}, like)
  np.testing.assert_array_equal(got["x"], again["x"])


def test_infinities_are_stored():
  like = jnp.zeros(4, jnp.bfloat16)
  values = np.array([np.inf, -np.inf, np.nan, np.nan], np.float32)
  values.view(np.uint32)[3] = 0x7FFFFFFF  # A carry would make it -0.
  got = precision.store(KEY, jnp.asarray(values), like)
  np.testing.assert_array_equal(np.asarray(got, np.float32), values)


@struct.dataclass
class OldState:
  """`TrainState` as it was before float16."""

  step: types.Array
  params: types.Tree
  opt_state: types.Tree


def test_checkpoints_of_before_float16_are_read(model, tmp_path):
  _, params, _ = model
  state = step.init_state(params)
  old = OldState(jnp.int32(7), state.params, state.opt_state)
  writer = checkpoint.Checkpoints(tmp_path / "checkpoints")
  writer.save(7, old, {"a": 1})
  writer.close()
  reader = checkpoint.Checkpoints(tmp_path / "checkpoints")
  restored, meta = reader.restore(state)
  reader.close()
  assert meta == {"a": 1} and restored.step == 7
  assert restored.loss_scale is None
  for a, b in zip(jax.tree.leaves(restored.params),
                  jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fields, message", [
    (dict(adapter_dtype="bfloat"), 'did you mean "bfloat16"'),
    (dict(adapter_dtype="float16"), 'compute.adapter_dtype="float16" is unk'),
    (dict(optim_dtype="fp32"), "compute.optim_dtype"),
    (dict(loss_scale=0.5), "compute.loss_scale=0.5 is out of range"),
    (dict(loss_scale_interval=0), "compute.loss_scale_interval=0 is out"),
])
def test_bad_values(fields, message):
  with pytest.raises(errors.UsageError, match=message):
    precision.Precision(**fields).validate()


def test_base_dtype():
  assert precision.base_dtype("float16") == "float16"
  assert precision.base_dtype("float16", "float32") == "float32"
  with pytest.raises(errors.UsageError, match='did you mean "float16"'):
    precision.base_dtype("flaot16")
  with pytest.raises(errors.UsageError, match=r"compute\.base_dtype"):
    precision.base_dtype("float32", "half")
