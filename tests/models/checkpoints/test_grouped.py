"""GPTQ and AWQ: tensors of their own libraries, and whole folders.

`golden.npz` holds modules that GPTQModel 7.7.0 packed (`TorchLinear.pack`,
`convert_gptq_v2_to_v1_format_module`) and AutoAWQ 0.2.9 reads
(`packing_utils.dequantize_gemm`, random words), each with the float16 weight
`[i, o]` that the library dequantises it to.
"""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import errors
from lora_jax import quant
from lora_jax.models import config as config_lib
from lora_jax.models import hf
from lora_jax.models import load
from lora_jax.models.checkpoints import awq
from lora_jax.models.checkpoints import gptq
from lora_jax.models.checkpoints import scheme
from lora_jax.quant import grouped
from tests import tiny

GOLDEN = np.load(pathlib.Path(__file__).with_name("golden.npz"))
MODULES = sorted({name.split("/")[0] for name in GOLDEN})
CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=61, d_model=32, d_ff=64, n_layers=2, n_heads=4,
    n_kv_heads=2, head_dim=8, max_position=16)
GROUP = 16


def module(name):
  return {key.split("/")[1]: GOLDEN[key] for key in GOLDEN
          if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", MODULES)
def test_weights_equal_the_librarys_bit_for_bit(name):
  parts = module(name)
  expected = parts.pop("weight")
  zeros_v1 = parts.pop("qzeros_v1", None)
  if name.startswith("awq"):
    got = [awq.decode(parts)]
  else:
    got = [gptq.decode(parts, offset=0),
           gptq.decode(parts | {"qzeros": zeros_v1}, offset=1)]
    # Zeros read as of the other version are one off: it matters.
    wrong = gptq.decode(parts, offset=1).dequantize(jnp.float16)
    assert (np.asarray(wrong) != expected).mean() > 0.9
  bits = int(name.split()[1])
  for w in got:
    assert type(w) is (grouped.Grouped8 if bits == 8 else grouped.Grouped)
    assert w.shape == expected.shape == (64, 32)
    assert (w.rows is not None) == name.endswith("act")
    stack = jax.tree.map(lambda x: np.stack([x, x]), w)
    for dtype in (jnp.float16, jnp.float32):
      values = w.dequantize(dtype)
      assert values.dtype == dtype
      np.testing.assert_array_equal(values, expected.astype(dtype))
    # float32 and an addition, which XLA must not contract.
    scanned = jax.jit(lambda s: jax.lax.scan(
        lambda c, x: (c, x.dequantize(jnp.float32) + 1.0), 0, s)[1])(stack)
    np.testing.assert_array_equal(
        scanned, np.stack([expected.astype(np.float32) + 1] * 2))
    np.testing.assert_array_equal(
        stack.dequantize(), np.stack([expected.astype(np.float32)] * 2))


def test_products_and_gradients_follow_act_order():
  w = gptq.decode({k: v for k, v in module("gptq 4 16 act").items()
                   if k != "weight"}, offset=0)
  dense = module("gptq 4 16 act")["weight"].astype(np.float32)
  rng = np.random.default_rng(0)
  x, g = (np.float32(rng.standard_normal(s)) for s in ((5, 64), (5, 32)))
  y, pull = jax.vjp(lambda x: quant.matmul(x, w), x)
  np.testing.assert_allclose(y, x @ dense, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(pull(g)[0], g @ dense.T, rtol=1e-5, atol=1e-5)


def test_without_g_idx_the_groups_follow_each_other():
  parts = module("gptq 4 32 plain")
  expected = parts.pop("weight")
  del parts["g_idx"]
  np.testing.assert_array_equal(
      gptq.decode(parts, 0).dequantize(jnp.float16), expected)


def test_groups_of_unequal_size_are_dequantised():
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 16, (8, 4)).astype(np.uint8)
  zeros = rng.integers(0, 16, (2, 4)).astype(np.uint8)
  scales = rng.standard_normal((2, 4)).astype(np.float16)
  index = np.int32([0, 0, 1, 1, 1, 1, 0, 1])
  got = scheme.groups(codes, zeros, scales, index, 4)
  expected = np.empty((8, 4), np.float32)
  for r, g in enumerate(index):
    for c in range(4):
      step = np.float16(int(codes[r, c]) - int(zeros[g, c]))
      expected[r, c] = np.float16(scales[g, c] * step)
  assert isinstance(got, np.ndarray) and got.dtype == np.float32
  np.testing.assert_array_equal(got, expected)
  # A short last group is one of ours.
  tail = scheme.groups(codes[:6], zeros, scales, np.int32([0, 0, 0, 0, 1, 1]),
                       4)
  assert tail.block_size == 4 and tail.shape == (6, 4)
  np.testing.assert_array_equal(
      tail.dequantize(), np.float32(
          (codes[:6].astype(np.float16) - zeros[[0, 0, 0, 0, 1, 1]])
          * scales[[0, 0, 0, 0, 1, 1]]))


def pack(codes, bits, axis):
  """Little-endian fields, a word at a time with Python's integers."""
  codes = np.moveaxis(codes, axis, -1)
  words = np.zeros((*codes.shape[:-1], codes.shape[-1] * bits // 32), np.int64)
  for place in np.ndindex(codes.shape[:-1]):
    number = sum(int(c) << (bits * k) for k, c in enumerate(codes[place]))
    for k in range(words.shape[-1]):
      words[place][k] = (number >> (32 * k)) & 0xFFFFFFFF
  return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


def write(folder, method="gptq", act=(True, True), **config):
  """A folder with random codes; returns its weights `[i, o]` by module."""
  rng = np.random.default_rng(1)
  tensors, weights = {}, {}
  for slot in hf.slots(CONFIG):
    for layer in range(CONFIG.n_layers) if slot.stacked else (None,):
      name = hf.hf_name(layer, slot.target, slot.leaf)
      if layer is None or not slot.linear:
        tensors[name] = rng.standard_normal(slot.shape, np.float32)
        continue
      path = name.removesuffix(".weight")
      out, rows = slot.shape
      codes = rng.integers(0, 16, (rows, out))
      zeros = rng.integers(0, 16, (rows // GROUP, out))
      scales = (0.05 * rng.uniform(1, 2, zeros.shape)).astype(np.float16)
      index = np.arange(rows) // GROUP
      if method == "gptq" and act[layer]:
        index = rng.permutation(index)
      weights[path] = ((codes - zeros[index]).astype(np.float16)
                       * scales[index]).astype(np.float32)
      if method == "gptq":
        stored = {"qweight": pack(codes, 4, 0),
                  "qzeros": pack((zeros - 1) % 16, 4, 1),
                  "scales": scales, "g_idx": index.astype(np.int32),
                  "bias": np.zeros(out, np.float16)}
      else:
        order = np.arange(out).reshape(-1, 8)[:, list(awq.ORDER)].reshape(-1)
        stored = {"qweight": pack(codes[:, order], 4, 1),
                  "qzeros": pack(zeros[:, order], 4, 1), "scales": scales}
      tensors |= {f"{path}.{key}": np.ascontiguousarray(value)
                  for key, value in stored.items()}
  (folder / "config.json").write_text(json.dumps(
      CONFIG.to_hf() | {"quantization_config": {
          "quant_method": method, "bits": 4, "group_size": GROUP} | config}))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return tensors, weights


def logits(loaded):
  tokens = np.arange(12, dtype=np.int32)[None]
  return tiny.logits(
      loaded.config, loaded.base, tokens, tokens, np.ones_like(tokens))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_folder(tmp_path, method):
  tensors, weights = write(tmp_path, method)
  loaded = load.load(tmp_path, quant.QuantSpec())
  dense = load.load(tmp_path, quant.QuantSpec(format="none"))
  assert loaded.fingerprint == dense.fingerprint
  for path, expected in weights.items():
    layer, target = int(path.split(".")[2]), path.split(".")[-1]
    weight = loaded.base.layers[target].weight
    assert type(weight) is grouped.Grouped and weight.shape[0] == 2
    assert weight.scales.dtype == np.float16
    np.testing.assert_array_equal(weight.dequantize()[layer], expected)
    np.testing.assert_array_equal(
        dense.base.layers[target].weight[layer], expected)
    assert loaded.base.layers[target].bias is None
  assert tiny.distance(logits(loaded), logits(dense)) < 1e-5
  # Every stored tensor counts.
  name = next(n for n in tensors if n.endswith("v_proj.scales"))
  tensors[name][0, 0] += np.float16(1)
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  assert load.load(tmp_path).fingerprint != loaded.fingerprint


def test_layers_of_two_kinds_become_floats(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(
      load.logging, "warning", lambda text, *args: said.append(text % args))
  _, weights = write(tmp_path, act=(True, False))
  loaded = load.load(tmp_path, quant.QuantSpec(), dtype="bfloat16")
  assert "gptq, 4 bits" in said[0] and "quant.format=nf4" in said[0]
  assert len(said) == 8 and "q_proj is quantised in some layers" in said[1]
  for path, expected in weights.items():
    layer, target = int(path.split(".")[2]), path.split(".")[-1]
    weight = loaded.base.layers[target].weight
    assert isinstance(weight, jax.Array) and weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        weight[layer].astype(np.float32),
        expected.astype(jnp.bfloat16).astype(np.float32))


def test_the_config_of_autogptq(tmp_path):
  _, weights = write(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  del config["quantization_config"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "quantize_config.json").write_text(
      json.dumps({"bits": 4, "group_size": GROUP, "desc_act": True}))
  up = load.load(tmp_path).base.layers["up_proj"].weight
  np.testing.assert_array_equal(
      up.dequantize()[1], weights["model.layers.1.mlp.up_proj"])


def test_errors(tmp_path):
  def fails(*parts, tensors=None, method="gptq", **config):
    made, _ = write(tmp_path, method, **config)
    if tensors:
      tensors(made)
      safetensors.numpy.save_file(made, tmp_path / "model.safetensors")
    with pytest.raises(errors.UserError) as caught:
      load.load(tmp_path)
    assert "\n" not in str(caught.value)
    for part in parts:
      assert part in str(caught.value), str(caught.value)

  name = "model.layers.0.self_attn.q_proj."
  fails("bits=5", "2, 3, 4, 8", bits=5)
  fails('"marlin"', "gptq, gptq_v2", checkpoint_format="marlin")
  fails('version="gemv"', method="awq", version="gemv")
  fails("bits=8", method="awq", bits=8)
  fails(name + "weight", '"scales" is missing',
        tensors=lambda t: t.pop(name + "scales"))
  fails(name + "weight", "do not belong together", tensors=lambda t: t.update(
      {name + "g_idx": t[name + "g_idx"] + np.int32(2)}))
  fails(name + "weight", "do not belong together", tensors=lambda t: t.update(
      {name + "qzeros": t[name + "qzeros"][:, :3].copy()}))
  fails(name + "bias", "is not of a llama", tensors=lambda t: t.update(
      {name + "bias": np.ones(32, np.float16)}))
