"""Every implementation equals the definition, and nothing leaks."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.attention import base
from lora_jax.kernels.attention import cudnn
from lora_jax.kernels.attention import plain
from lora_jax.kernels.attention import splash
from lora_jax.kernels.attention import tokamax
from tests.kernels import oracle

# What each implementation does, by means that this machine has.
PATHS = {
    "plain": plain.run,
    "cudnn": functools.partial(cudnn.attend, name="xla"),
    "splash": functools.partial(splash.attend, interpret=True),
    "tokamax": functools.partial(tokamax.attend, name="xla"),
}
WINDOWS = (3, 5, 2**30)  # The last reaches over any row.
CASES = {
    "packed": {},
    "packed, window": {"window": 3},
    "packed, traced window": {"window": jnp.int32(5), "windows": WINDOWS},
    "packed, window, soft cap": {"window": 4, "softcap": 0.7, "scale": 0.3},
    "single": {"layout": "single"},
    "single, window, scale": {"layout": "single", "window": 3, "scale": 0.5},
    "single, traced window": {
        "layout": "single", "window": jnp.int32(5), "windows": WINDOWS},
}


# Interpreted, it takes seconds to compile: its other cases are made of these.
SPLASH = ("packed, traced window", "packed, window, soft cap", "single")


def _skip(path, name="single"):
  if path == "tokamax" and not tokamax.installed():
    pytest.skip("tokamax is not installed")
  if path == "cudnn" and "soft cap" in name:
    pytest.skip("cuDNN has no soft cap")
  if path == "splash" and name not in SPLASH:
    pytest.skip("made of other cases")


def _call(name):
  fields = CASES[name]
  single = fields.get("layout") == "single"
  return oracle.call(
      oracle.SINGLE if single else oracle.PACKED, **fields)


@functools.cache
def _program(path, name):
  """(q, k, v, cotangent, window) -> (output, gradients), compiled once."""
  call = _call(name)

  @jax.jit
  def run(qkv, cotangent, window):
    def attend(qkv):
      q, k, v = qkv
      return PATHS[path](dataclasses.replace(
          call, q=q, k=k, v=v, window=window if "traced" in name
          else call.window))

    out, pull = jax.vjp(attend, qkv)
    return out, pull(cotangent)[0]

  return lambda qkv, cotangent: run(qkv, cotangent, call.window)


def _inputs(name):
  """(q, k, v), a cotangent that is zero at padding, and the segments."""
  call = _call(name)
  real = np.asarray(call.q_segments) > 0
  cotangent = jax.random.normal(jax.random.key(9), call.q.shape)
  return (call.q, call.k, call.v), cotangent * real[..., None, None], real


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_definition(path, name):
  _skip(path, name)
  qkv, cotangent, real = _inputs(name)
  out, grads = _program(path, name)(qkv, cotangent)
  expected = oracle.attend(_call(name))
  np.testing.assert_allclose(out[real], expected[real], atol=2e-6, rtol=2e-6)
  # Padding means nothing, but must not spread NaN.
  assert all(bool(jnp.isfinite(x).all()) for x in (out, *grads))
  _, wanted = _program("plain", name)(qkv, cotangent)
  for found, x in zip(grads, wanted):
    np.testing.assert_allclose(found, x, atol=5e-6, rtol=5e-6)
    np.testing.assert_array_equal(found[~real], 0)


@pytest.mark.parametrize("name", ["packed", "packed, traced window", "single"])
@pytest.mark.parametrize("path", PATHS)
def test_segments_do_not_see_each_other(path, name):
  """Whatever else changes, a segment's results keep their bits."""
  _skip(path, name)
  qkv, cotangent, _ = _inputs(name)
  run = _program(path, name)
  before = run(qkv, cotangent)
  _, segments = oracle.rows(
      oracle.SINGLE if name == "single" else oracle.PACKED, qkv[0].shape[1])
  for changed in {"packed": (1, 2, 0), "single": (0,)}[name.split(",")[0]]:
    there = jnp.asarray(segments == changed)[..., None, None]
    other = tuple(jnp.where(there, 3 - x, x) for x in qkv)
    slope = jnp.where(there & (changed > 0), cotangent + 1, cotangent)
    out, grads = run(other, slope)
    for x, y in zip((before[0], *before[1]), (out, *grads)):
      kept = (segments != changed) & (segments > 0)
      np.testing.assert_array_equal(
          np.asarray(x)[kept], np.asarray(y)[kept])
      if changed:
        assert (np.asarray(x) != np.asarray(y))[segments == changed].any()


@pytest.mark.parametrize("path", PATHS)
def test_prompts_into_a_larger_cache(path):
  """Keys beyond the queries' own are empty slots that nothing sees."""
  _skip(path)
  call = oracle.call(oracle.SINGLE, layout="single")
  more = ((0, 0), (0, 7))
  call = dataclasses.replace(
      call, k=jnp.pad(call.k, (*more, (0, 0), (0, 0)), constant_values=9),
      v=jnp.pad(call.v, (*more, (0, 0), (0, 0)), constant_values=9),
      kv_positions=jnp.pad(call.kv_positions, more),
      kv_segments=jnp.pad(call.kv_segments, more))
  assert call.k.shape[1] == 19 and call.aligned()[0].shape[1] == 12
  real = np.asarray(call.q_segments) > 0
  np.testing.assert_allclose(
      PATHS[path](call)[real], oracle.attend(call)[real], atol=2e-6)


@pytest.mark.parametrize("fields", [{}, {"window": 4}, {"softcap": 0.7}])
def test_one_token_reads_the_cache(fields):
  """Rows of unequal length, slots out of order, some of them empty."""
  call = oracle.call(((12,), (7,), (2,)), layout="any", **fields)
  order = np.random.default_rng(0).permutation(12)
  lengths = jnp.asarray([12, 7, 2])
  call = dataclasses.replace(
      call, q=call.q[:, :1], q_positions=lengths[:, None] - 1,
      q_segments=jnp.ones((3, 1), jnp.int32), k=call.k[:, order],
      v=call.v[:, order], kv_positions=call.kv_positions[:, order],
      kv_segments=call.kv_segments[:, order])
  np.testing.assert_allclose(
      plain.run(call), oracle.attend(call), atol=2e-6)
  if "softcap" not in fields:  # With a mask in memory.
    np.testing.assert_allclose(
        cudnn.attend(call, "xla"), oracle.attend(call), atol=2e-6)


def test_starts_of_segments_by_hand():
  segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1],
                          [0, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(
      base.starts(segments),
      [[0, 0, 2, 2, 2, 5], [0] * 6, [0] * 6])


def test_first_keys_by_hand():
  """Of two segments and padding, with the window the later of the two."""
  call = oracle.call(((3, 6),), window=4)
  np.testing.assert_array_equal(
      tokamax.first_keys(call), [[0, 0, 0, 3, 3, 3, 3, 4, 5, 9, 9, 9]])
  assert tokamax.first_keys(oracle.call(layout="single")) is None


def test_the_device_chooses_among_windows():
  call = dataclasses.replace(
      oracle.call(windows=(2, 4, 2**30)), window=None)

  def reach(window):
    return base.each_window(
        dataclasses.replace(call, window=window),
        lambda w: jnp.int32(0 if w is None else w))

  found = [int(jax.jit(reach)(jnp.int32(w))) for w in (2, 4, 2**30)]
  assert found == [2, 4, 0]
  # All windows reach over the row: there is nothing to choose.
  far = dataclasses.replace(
      call, options=base.Options(layout="packed", windows=(50, 2**30)))
  assert "cond" not in str(jax.make_jaxpr(lambda w: base.each_window(
      dataclasses.replace(far, window=w), lambda x: jnp.int32(x or 0)))(
          jnp.int32(50)))
