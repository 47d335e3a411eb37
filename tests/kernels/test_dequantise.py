"""Every kernel, interpreted, equals numpy and plain XLA bit for bit."""

from __future__ import annotations

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import quant
from lora_jax.kernels import decode
from lora_jax.kernels import dequantise
from lora_jax.kernels import mosaic_gpu
from lora_jax.kernels import mosaic_tpu
from lora_jax.kernels import plain
from tests.quant import reference

FORMATS = ["nf4", "fp4", "int4", "int4_affine"]
try:
  GPU = plgpu.InterpretGPUParams()
except AttributeError:  # Not exported before jax 0.11.
  from jax._src.pallas.mosaic_gpu.interpret import params

  GPU = params.InterpretGPUParams()
INTERPRET = {"mosaic_tpu": True, "mosaic_gpu": GPU}

# Rows, columns and block size. The first takes every format and dtype; then
# ragged tiles, 576 columns as SmolLM2 has, small and large blocks, a tail.
SHAPES = {
    "mosaic_tpu": [(64, 200, 32), (576, 576, 64), (96, 136, 16)],
    "mosaic_gpu": [(64, 256, 64), (128, 576, 64), (96, 400, 64),
                   (32, 256, 8)],
}
# Other types of one format: they are made of what comes out of all.
CASES = [
    (name, backend, *shape, n == 0 and name == "nf4")
    for backend, shapes in SHAPES.items() for n, shape in enumerate(shapes)
    for name in (FORMATS if n == 0 else ["nf4"])]


def form(name, block_size):
  cls = quant.FORMATS[name]
  return plain.Format(cls.decode, block_size, 2, cls.levels())


def stored(name, rows, columns, block_size, seed=0):
  """Every code; a zero, a NaN and a subnormal-making scale among them."""
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, 256, (rows // 2, columns)).astype(np.uint8)
  scales = rng.uniform(1e-3, 2, (-(-rows // block_size), columns))
  scales = scales.astype(np.float32)
  scales[0, :3] = 0.0, np.nan, 1e-7
  named = {"scales": scales}
  if name == "int4_affine":
    named["minimums"] = -rng.uniform(0, 9, scales.shape).astype(np.float32)
  return codes, named


def expected(name, codes, named, block_size, dtype):
  nibbles = reference.nibbles(codes, block_size)
  table = reference.TABLES.get(name, np.arange(16, dtype=np.float32))
  block = np.arange(len(nibbles)) // block_size
  values = table[nibbles] * named["scales"][block]
  if "minimums" in named:
    values = values + named["minimums"][block]
  return values.astype(dtype)


def bits(x):
  """Integers that are equal where the numbers are the same, bit for bit; one
  for every NaN."""
  x = np.asarray(x)
  view = x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)
  return np.where(np.isnan(x.astype(np.float32)), -1, view.astype(np.int64))


@pytest.mark.parametrize("name,backend,rows,columns,size,every", CASES)
def test_bits_equal_numpys(name, backend, rows, columns, size, every):
  codes, named = stored(name, rows, columns, size)
  dtypes = [jnp.bfloat16]
  if every:
    dtypes += [jnp.float32] if backend == "mosaic_tpu" else [
        jnp.float32, jnp.float16]
  kernel = dequantise.KERNELS[backend]
  for dtype in dtypes:
    assert kernel.applies(rows, columns, size, jnp.dtype(dtype))
    # Directly: the GPU's interpreter has effects, which the entry's wrappers
    # refuse.
    got = kernel.dequantise(
        codes[None], *[x[None] for x in named.values()],
        levels=form(name, size).levels, block_size=size, dtype=dtype,
        interpret=INTERPRET[backend])[0]
    assert got.dtype == dtype and got.shape == (rows, columns)
    plainly = dequantise.dequantise(
        codes, named, form(name, size), dtype, backend="xla")
    np.testing.assert_array_equal(bits(got), bits(plainly))
    want = expected(name, codes, named, size, dtype)
    # The sign of zero aside: the reference's FP4 has one zero, ours two.
    np.testing.assert_array_equal(bits(np.asarray(got) + dtype(0)),
                                  bits(want + dtype(0)))
    assert np.isnan(np.float32(got)).sum() == size


def test_fewer_rows_are_the_same_values():
  codes, named = stored("nf4", 64, 256, 64)

  def run(**fields):
    return bits(mosaic_gpu.dequantise(
        codes[None], named["scales"][None], levels=form("nf4", 64).levels,
        block_size=64, dtype=jnp.bfloat16, interpret=GPU,
        variant=mosaic_gpu.Variant(**fields))[0])

  want = expected("nf4", codes, named, 64, jnp.bfloat16)
  np.testing.assert_array_equal(run(rows=16), bits(want))
  with pytest.raises(errors.UsageError, match='did you mean "shuffle"'):
    run(lookup="shuffel")


@pytest.mark.parametrize("name", FORMATS)
def test_lookup_is_the_table(name):
  levels = quant.FORMATS[name].levels()
  got = decode.lookup(jnp.arange(16, dtype=jnp.int32), levels)
  np.testing.assert_array_equal(bits(got), bits(np.float32(levels)))
  table = reference.TABLES.get(name, np.arange(16, dtype=np.float32))
  np.testing.assert_array_equal(got, table)


def test_layers_and_vmap_are_one_launch():
  codes, named = stored("nf4", 64, 256, 32)
  stack = np.stack([codes, codes ^ 255])
  scales = named["scales"]

  def run(codes, scales):
    return dequantise.dequantise(
        codes, {"scales": scales}, form("nf4", 32), jnp.bfloat16,
        backend="mosaic_tpu", interpret=True)

  want = [bits(run(c, scales)) for c in stack]
  both = jax.vmap(run, (0, None))
  np.testing.assert_array_equal(bits(both(stack, scales)), want)
  np.testing.assert_array_equal(
      bits(run(stack, np.stack([scales] * 2))), want)
  text = str(jax.make_jaxpr(both)(stack, scales))
  assert text.count("pallas_call") == 1 and "while" not in text


def test_statistics_have_a_derivative():
  """That of the plain path: the weight is linear in them."""
  codes, named = stored("int4_affine", 64, 256, 32)
  named["scales"][0, 1] = 1.0
  cotangent = np.float32(np.random.default_rng(1).normal(size=(64, 256)))

  def loss(named, **how):
    values = dequantise.dequantise(
        codes, named, form("int4_affine", 32), **how)
    return jnp.sum(values * cotangent)

  got = jax.grad(loss)(named, backend="mosaic_tpu", interpret=True)
  want = jax.grad(loss)(named, backend="xla")
  jax.tree.map(np.testing.assert_array_equal, got, want)
  blocks = cotangent.reshape(2, 32, 256)
  np.testing.assert_allclose(got["minimums"], blocks.sum(1), rtol=1e-4,
                             atol=1e-4)


def test_backward_pass_saves_codes_only(monkeypatch):
  """With a kernel on the path of `quant.matmul`, forwards and backwards."""
  w = quant.quantize(
      np.float32(np.random.default_rng(0).normal(size=(256, 384))),
      quant.QuantSpec("nf4", 64, False))
  x = jnp.ones((2, 256))
  want = jax.vjp(lambda x: quant.matmul(x, w), x)[1](jnp.ones((2, 384)))
  monkeypatch.setattr(dequantise, "dequantise", functools.partial(
      dequantise.dequantise, backend="mosaic_tpu", interpret=True))

  def f(x):
    return jax.vjp(lambda x: quant.matmul(x, w), x)

  saved = jax.tree.leaves(jax.eval_shape(f, x)[1])
  assert max(a.size for a in saved
             if jnp.issubdtype(a.dtype, jnp.floating)) < 256 * 384 // 32
  y, pull = f(x)
  for part, given in ((lambda x: f(x)[0], x), (pull, y)):
    assert "pallas_call" in str(jax.make_jaxpr(part)(given))
  got = jax.jit(lambda x, g: f(x)[1](g))(x, jnp.ones((2, 384)))
  # Sums of 384 terms of order 1.
  np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)


def test_who_gets_a_kernel():
  bf16, f16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
  assert mosaic_tpu.applies(576, 576, 64, bf16)
  assert not mosaic_tpu.applies(576, 576, 128, bf16)  # A tail.
  assert not mosaic_tpu.applies(576, 576, 64, f16)
  assert not mosaic_tpu.applies(48, 576, 24, bf16)  # Half a register.
  assert mosaic_gpu.applies(576, 576, 128, f16)
  assert not mosaic_gpu.applies(576, 584, 64, bf16)  # 8 bytes off.
  assert not mosaic_gpu.applies(576, 128, 64, bf16)  # Less than a tile.


def test_other_shapes_and_formats_are_plain(caplog):
  """Never an error by default: odd columns, and a format without levels."""
  codes, named = stored("nf4", 64, 33, 32)
  with caplog.at_level("DEBUG"):
    got = dequantise.dequantise(codes, named, form("nf4", 32))
  assert "[32, 33]" in caplog.text
  np.testing.assert_array_equal(
      bits(got), bits(expected("nf4", codes, named, 32, np.float32)))
  text = str(jax.make_jaxpr(lambda c: dequantise.dequantise(
      c, named, form("nf4", 32)))(codes))
  assert "platform_index" not in text
  w = quant.quantize(np.ones((64, 256), np.float32), quant.QuantSpec("int8"))
  text = str(jax.make_jaxpr(lambda w: w.dequantize())(w))
  assert "platform_index" not in text


def test_wrong_backends_are_named():
  codes, named = stored("nf4", 64, 33, 32)
  with pytest.raises(errors.UsageError, match='did you mean "mosaic_tpu"'):
    dequantise.dequantise(codes, named, form("nf4", 32), backend="mosaic-tpu")
  with pytest.raises(errors.UserError, match=r'"mosaic_gpu".*\[32, 33\]'):
    dequantise.dequantise(codes, named, form("nf4", 32), backend="mosaic_gpu")
