"""bitsandbytes' serialised form: both ways, and against the library."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import quant
from lora_jax.quant import bnb


def weight(rows=192, out=130, seed=0):
  rng = np.random.default_rng(seed)
  return np.float32(0.05 * rng.standard_normal((rows, out)))


def make(name="nf4", nested=True, rows=192):
  return quant.quantize(weight(rows), quant.QuantSpec(name, 64, nested))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_round_trip(name, nested):
  w = make(name, nested)
  tensors = bnb.to_bnb(w)
  assert tensors["weight"].shape == (192 * 130 // 2, 1)
  assert tensors["weight.absmax"].shape == (390,)
  back = bnb.from_bnb(tensors)
  assert type(back) is type(w) and back.shape == (192, 130)
  np.testing.assert_array_equal(back.codes, w.codes)
  np.testing.assert_array_equal(back.dequantize(), w.dequantize())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bitsandbytes_reads_ours(name, nested, dtype):
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("bitsandbytes.functional")
  w = make(name, nested)
  tensors = {
      key.removeprefix("weight."): torch.from_numpy(np.array(value))
      for key, value in bnb.to_bnb(w, dtype).items()}
  packed = tensors.pop("weight")
  state = functional.QuantState.from_dict(tensors, device="cpu")
  values = functional.dequantize_4bit(packed, state)
  assert values.dtype == getattr(torch, dtype)
  np.testing.assert_array_equal(
      values.float().numpy().T,
      np.asarray(w.dequantize(jnp.dtype(dtype)), np.float32))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_we_read_bitsandbytes(name, nested, storage):
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("bitsandbytes.functional")
  packed, state = functional.quantize_4bit(
      torch.from_numpy(weight().T.copy()), blocksize=64, quant_type=name,
      compress_statistics=nested, quant_storage=getattr(torch, storage))
  tensors = {"weight": packed.view(torch.uint16).numpy()
             if storage == "bfloat16" else packed.numpy()}
  for key, value in state.as_dict(packed=True).items():
    tensors["weight." + key] = value.numpy()
  got = bnb.from_bnb(tensors)
  expected = functional.dequantize_4bit(packed, state).numpy().T
  np.testing.assert_array_equal(got.dequantize(), expected)
  if storage == "uint8":
    again = bnb.to_bnb(got)
    assert set(again) == set(tensors)
    for key in set(again) - {"weight.quant_state.bitsandbytes__" + name}:
      np.testing.assert_array_equal(again[key], tensors[key])


def test_errors_of_writing():
  with pytest.raises(errors.UserError, match=r"in_features=96.*64"):
    bnb.to_bnb(make(rows=96))
  with pytest.raises(errors.UserError, match=r"Int4 .*no bitsandbytes form"):
    bnb.to_bnb(make("int4"))
  stack = quant.quantize(weight()[None], quant.QuantSpec())
  with pytest.raises(errors.UserError, match=r"NF4 .*1, 192, 130"):
    bnb.to_bnb(stack)


def test_errors_of_reading():
  tensors = bnb.to_bnb(make())
  state = "weight.quant_state.bitsandbytes__nf4"

  def without(key):
    return {k: v for k, v in tensors.items() if k != key}

  with pytest.raises(errors.UserError, match="quant_state"):
    bnb.from_bnb(without(state))
  for key in set(tensors) - {state}:
    with pytest.raises(errors.UserError, match=f'"{key}" is missing'):
      bnb.from_bnb(without(key))
  with pytest.raises(errors.UserError, match="12479 bytes"):
    bnb.from_bnb(tensors | {"weight": tensors["weight"][1:]})
  for key in ("weight.quant_map", "weight.nested_quant_map"):
    with pytest.raises(errors.UserError, match=f"{key} is not"):
      bnb.from_bnb(tensors | {key: tensors[key] * 2})
  text = bytes(tensors[state]).replace(
      b'"nested_blocksize": 256', b'"nested_blocksize": 128')
  with pytest.raises(errors.UserError, match="nested_blocksize=128"):
    bnb.from_bnb(tensors | {state: np.frombuffer(text, np.uint8)})
