"""Which implementation computes what, and how a wrong choice is refused."""

from __future__ import annotations

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax.kernels import attention
from lora_jax.kernels.attention import api
from lora_jax.kernels.attention import base
from lora_jax.kernels.attention import tokamax
from tests.kernels import oracle

CPU = types.SimpleNamespace(platform="cpu")
TPU = types.SimpleNamespace(platform="tpu")
AMD = types.SimpleNamespace(platform="gpu", compute_capability="gfx90a")
V100, A100, H100, B200 = (
    types.SimpleNamespace(platform="gpu", compute_capability=c)
    for c in ("7.0", "8.0", "9.0", "10.0"))


@pytest.fixture
def on(monkeypatch):
  def pretend(device, installed=True):
    monkeypatch.setattr(base.Call, "device", device)
    monkeypatch.setattr(tokamax, "installed", lambda: installed)
  return pretend


def _call(layout, *, e=128, t=12, **fields):
  fields = {"dtype": jnp.bfloat16} | fields
  call = oracle.call(layout=layout, **fields)
  return dataclasses.replace(call, **{
      name: jnp.zeros((3, t, getattr(call, name).shape[2], e), call.q.dtype)
      for name in "qkv"})


def _choice(call):
  return api.chosen(call).__name__.rpartition(".")[2]


@pytest.mark.parametrize("device, layout, fields, expected", [
    (CPU, "packed", {}, "plain"),
    (AMD, "packed", {}, "plain"),
    (V100, "single", {}, "plain"),
    (A100, "single", {}, "cudnn"),
    (A100, "packed", {}, "cudnn"),  # With a mask; tokamax has no backward.
    (A100, "packed", {"e": 256}, "plain"),
    (A100, "packed", {"softcap": 5.0}, "plain"),
    (H100, "single", {}, "tokamax"),
    (H100, "single", {"window": 4}, "tokamax"),
    (H100, "single", {"softcap": 5.0}, "tokamax"),
    (H100, "single", {"e": 256}, "tokamax"),
    (H100, "packed", {}, "tokamax"),
    (H100, "packed", {"window": jnp.int32(4)}, "tokamax"),
    (H100, "packed", {"e": 256}, "tokamax"),
    (H100, "packed", {"e": 60}, "plain"),
    (H100, "packed", {"dtype": jnp.float16}, "cudnn"),
    (H100, "packed", {"t": 1}, "plain"),
    (H100, "any", {}, "plain"),
    (B200, "packed", {}, "tokamax"),
    (TPU, "packed", {}, "splash"),
    (TPU, "single", {"softcap": 5.0}, "splash"),
    (TPU, "packed", {"window": jnp.int32(4)}, "plain"),
    (TPU, "packed", {"window": jnp.int32(4), "windows": (4, 9)}, "splash"),
    (TPU, "any", {}, "plain"),
])
def test_auto(on, device, layout, fields, expected):
  on(device)
  assert _choice(_call(layout, **fields)) == expected


def test_auto_without_tokamax_and_in_float32(on):
  on(H100, installed=False)
  assert _choice(_call("packed")) == "cudnn"
  assert _choice(_call("packed", t=13)) == "plain"  # A mask must be even.
  for device in (H100, TPU):
    on(device)
    assert _choice(oracle.call(dtype=jnp.float32)) == "plain"


@pytest.mark.parametrize("device, name, layout, fields, words", [
    (CPU, "cudnn", "single", {}, "NVIDIA GPU of compute capability 8.0"),
    (H100, "cudnn", "single", {"softcap": 1.0}, "no soft cap"),
    (H100, "cudnn", "single", {"e": 512}, "at most 256, wide; it is 512"),
    (A100, "tokamax", "packed", {}, "Hopper or Blackwell"),
    (H100, "tokamax", "any", {}, "does not know that rows are packed"),
    (TPU, "tokamax", "packed", {}, "splash does"),
    (H100, "splash", "packed", {}, "runs on TPUs"),
])
def test_a_wrong_choice_says_why(on, device, name, layout, fields, words):
  on(device)
  call = _call(layout, **fields)
  call = dataclasses.replace(call, options=dataclasses.replace(
      call.options, implementation=name))
  with pytest.raises(errors.UsageError) as raised:
    api.chosen(call)
  text = str(raised.value)
  assert f'compute.attention="{name}"' in text and words in text
  assert '"auto"' in text and "\n" not in text


def test_missing_and_misspelt(on):
  on(H100, installed=False)
  call = _call("packed")
  def named(name):
    return dataclasses.replace(call, options=dataclasses.replace(
        call.options, implementation=name))
  with pytest.raises(errors.UsageError, match=r"pip install .lora_jax\[cuda"):
    api.chosen(named("tokamax"))
  with pytest.raises(errors.UsageError, match='did you mean "cudnn"'):
    api.chosen(named("cudn"))
  with pytest.raises(errors.UsageError, match='did you mean "packed"'):
    api.chosen(_call("pack"))


def test_a_mesh_that_cuts_no_heads_is_refused(on):
  on(H100)
  for shape, words in {(1, 1, 4): "2 key/value heads", (2, 1, 1): "3 rows",
                       (3, 1, 2): None}.items():
    mesh = types.SimpleNamespace(
        shape=dict(zip(("data", "fsdp", "tensor"), shape)),
        size=np.prod(shape))
    call = _call("packed")
    call = dataclasses.replace(
        call, options=dataclasses.replace(call.options, mesh=mesh))
    for name in ("cudnn", "tokamax"):
      reason = api.IMPLEMENTATIONS[name].refuses(call)
      assert reason is None if words is None else words in reason
    assert _choice(call) == ("tokamax" if words is None else "plain")


def test_entry_point_is_the_plain_path_here():
  call = oracle.call()
  found = attention.attention(
      call.q, call.k, call.v, call.q_positions, call.kv_positions,
      call.q_segments, call.kv_segments, scale=0.3, softcap=2.0,
      options=call.options)
  expected = oracle.attend(dataclasses.replace(call, scale=0.3, softcap=2.0))
  real = np.asarray(call.q_segments) > 0
  np.testing.assert_allclose(found[real], expected[real], atol=2e-6)
  assert isinstance(hash(call.options), int)  # A static argument of jit.
