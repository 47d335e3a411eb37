"""Few rows times a 4-bit weight: every kernel against float64.

The kernel for Hopper is made of instructions that jax cannot interpret; here
its very body runs on an emulator of them (`warps`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import quant
from lora_jax.kernels import dequantise
from lora_jax.kernels import matmul
from lora_jax.kernels import matmul_gpu
from lora_jax.kernels import matmul_warps
from lora_jax.kernels import thread
from lora_jax.quant import dynamic
from tests.kernels import test_dequantise as one
from tests.kernels import warps
from tests.quant import reference

Plan = matmul_gpu.Plan


def emulated(body, x, codes, named):
  """The kernel's result `[l, m, o]` in float32, before its last rounding."""
  body = dataclasses.replace(body, out="f32")
  layers, plan = len(codes), body.plan
  lead = (layers, plan.splits) if body.apart else (layers,)
  out = np.full((*lead, body.rows, body.columns), 7e7, np.float32)
  given = {"x": x, "codes": codes, **named, "out": out}
  arrays = {name: np.ascontiguousarray(given[name]).reshape(-1).view(np.uint8)
            for name in body.arrays}
  warps.run(
      body, arrays, body.shared,
      {"layer": layers, "tile": -(-body.columns // body.span),
       "split": plan.splits},
      "split" if plan.cluster and plan.splits > 1 else None)
  out = arrays["out"].view(np.float32).reshape(out.shape)
  return out.sum(1) if body.apart else out


def inputs(name, rows, ins, columns, block, dtype, layers=1):
  """`x`, codes and statistics with a leading axis, and `w` in float32."""
  parts = [one.stored(name, ins, columns, block, n) for n in range(layers)]
  codes = np.stack([c for c, _ in parts])
  named = {k: np.stack([s[k] for _, s in parts]) for k in parts[0][1]}
  x = np.random.default_rng(9).normal(size=(layers, rows, ins)).astype(dtype)
  w = np.stack([one.expected(name, c, s, block, np.float32) for c, s in parts])
  return x, codes, named, w


def check(got, x, w, level_error, out_error=0.0, nans=1):
  """`got` is `x @ w` but for roundings.

  Products of 16-bit floats are exact in float32. Each of at most n + 64
  additions in a row, a tensor core's too, and two products with statistics
  lose at most 2^-23 of the sum of magnitudes; a level, relatively,
  `level_error`; the result `out_error`. A column with a NaN scale is NaN.
  """
  x, w = x.astype(np.float64), w.astype(np.float64)
  broken = np.isnan(w).any(-2)
  want, size = x @ w, np.abs(x) @ np.abs(w)
  error = np.abs(np.asarray(got, np.float64) - want)
  bound = size * (level_error + (x.shape[-1] + 64) * 2.0**-23)
  good = np.broadcast_to(~broken[..., None, :], want.shape)
  assert (error <= bound + np.abs(want) * out_error)[good].all(), (
      np.nanmax(error / size))
  assert broken.sum() == nans * len(w) and np.isnan(np.asarray(
      got, np.float64)[~good]).all()


# What a rounding to 8 or 11 bits costs; what two terms leave is its square.
BF16, F16 = 2.0**-8, 2.0**-11


@pytest.mark.parametrize("name,rows,ins,columns,block,dtype,plan,error", [
    # Ragged chunks and columns; then each with another way and number of rows.
    ("nf4", 1, 320, 144, 64, "bfloat16", Plan(16, 1), BF16**2),
    ("nf4", 9, 576, 80, 64, "float16", Plan(8, 2), F16**2),
    ("int4_affine", 3, 256, 64, 128, "bfloat16",
     Plan(4, 3, cluster=False, ahead=2), 0),
    ("fp4", 2, 256, 64, 64, "bfloat16", Plan(8, 4, decode="prmt"), 2**-23),
    ("nf4", 32, 128, 64, 64, "bfloat16", Plan(8, 1, decode="prmt"), BF16),
    ("nf4", 17, 128, 64, 64, "float16", Plan(8, 1, terms=1, ahead=3), F16),
    ("int4", 16, 192, 128, 192, "float16", Plan(16, 2), 0),
    # The default of two groups of x, three chunks a warp.
    ("nf4", 11, 640, 128, 64, "bfloat16", Plan(16, 1), BF16**2),
])
def test_instructions(name, rows, ins, columns, block, dtype, plan, error):
  layers = 2 if name == "int4" else 1
  x, codes, named, w = inputs(name, rows, ins, columns, block, dtype, layers)
  body = matmul_gpu.body_for(
      rows, ins, columns, block, x.dtype, quant.FORMATS[name].levels(),
      "minimums" in named, plan)
  check(emulated(body, x, codes, named), x, w, error)


def test_nested_scales_are_decoded_in_the_kernel():
  """Two layers of a weight with several `nested_absmax`."""
  rows, (ins, columns) = 3, (192, 400)
  rng = np.random.default_rng(0)
  stack = quant.quantize(
      np.float32(rng.normal(size=(2, ins, columns))
                 * rng.uniform(0.1, 1, columns)),
      quant.QuantSpec("nf4", 64, True))
  x = rng.normal(size=(2, rows, ins)).astype(jnp.bfloat16)
  plan = Plan(8, 2)
  body = matmul_gpu.body_for(
      rows, ins, columns, 64, x.dtype, stack.levels(), False, plan, True)
  got = emulated(body, x, np.asarray(stack.codes), {
      "scales": np.asarray(stack.scales.codes),
      "absmax": np.asarray(stack.scales.nested_absmax),
      "offset": np.asarray(stack.scales.offset),
      "map": dynamic.table()})
  w = np.asarray(stack.dequantize())
  assert stack.scales.nested_absmax.shape == (2, 5)
  check(got, x, w, BF16**2, nans=0)


@pytest.mark.parametrize("nested", [False, True])
def test_the_kernel_is_given_the_memory_it_names(monkeypatch, nested):
  """As the emulator is: arrays in device memory, the others in a block's.

  Lowered as for a GPU, which needs none.
  """
  seen = []
  real = thread.Thread

  class Recorded(real):

    def __init__(self, arrays, shared, indices):
      seen.extend({name: str(ref.type) for name, ref in each.items()}
                  for each in (arrays, shared))
      super().__init__(arrays, shared, indices)
      with pytest.raises(ValueError, match="not in device memory"):
        real(shared, {}, indices)

  monkeypatch.setattr(thread, "Thread", Recorded)
  like = jax.ShapeDtypeStruct
  scales = ([like((2, 3, 400), jnp.uint8), like((2, 5), jnp.float32),
             like((2,), jnp.float32), like((256,), jnp.float32)]
            if nested else [like((2, 3, 400), jnp.float32)])
  levels = quant.FORMATS["nf4"].levels()
  jax.jit(functools.partial(
      matmul_gpu.matmul, levels=levels, block_size=64,
      plan=Plan(8, 2))).trace(
          like((2, 3, 192), jnp.bfloat16), like((2, 96, 400), jnp.uint8),
          *scales).lower(lowering_platforms=("cuda",))
  arrays, shared = seen
  more = {"scales": "2x3x400xi8", "absmax": "2x5xf32", "offset": "2xf32",
          "map": "256xf32"} if nested else {"scales": "2x3x400xf32"}
  assert arrays == {name: f"memref<{form}>" for name, form in {
      "x": "2x3x192xbf16", "codes": "2x96x400xi8", **more,
      "out": "2x3x400xbf16"}.items()}
  body = matmul_gpu.body_for(3, 192, 400, 64, jnp.bfloat16, levels, False,
                             Plan(8, 2), nested)
  assert shared == {
      name: f"memref<{words}xi32, #gpu.address_space<workgroup>>"
      for name, words in body.shared.items()}


def test_levels_are_sums_of_terms():
  for name, dtype, count, error in [
      ("int4", jnp.bfloat16, 1, 0), ("fp4", jnp.bfloat16, 1, 2**-23),
      ("nf4", jnp.bfloat16, 2, BF16**2), ("nf4", jnp.float16, 2, F16**2)]:
    want = np.float64(quant.FORMATS[name].levels())
    terms, unit = matmul_warps.levels_in_terms(tuple(want), dtype)
    assert terms.shape == (count, 16) and terms.dtype == dtype
    found = terms.astype(np.float64).sum(0) * unit
    assert (np.abs(found - want) <= error * np.abs(want)).all()
  # By hand: of 0.33791524 * 512 = 173.01 bfloat16 keeps 8 bits.
  terms, _ = matmul_warps.levels_in_terms(
      quant.FORMATS["nf4"].levels(), jnp.bfloat16)
  assert terms[0, 11] == 173 / 512 and terms[1, 11] == np.float64(
      reference.NF4[11] - 173 / 512).astype(jnp.bfloat16)


@pytest.mark.parametrize("terms", [1, 2])
def test_permutations_are_a_table(terms):
  """Row r, the low nibble's level, in the low half of a register."""
  body = matmul_gpu.body_for(
      1, 64, 64, 64, jnp.bfloat16, quant.FORMATS["nf4"].levels(), False,
      Plan(8, 1, terms=terms))
  assert len(body.terms) == terms
  lookup = body._permutations(warps.Warp(0, {}, {}, [], 0, {}))
  for n in range(4):
    word = np.random.default_rng(n).integers(0, 256, (32, 4), np.uint8)
    got = lookup(word.view(np.uint32)[:, 0])
    for column in range(4):
      for term in range(terms):
        halves = got[column][term].view(jnp.bfloat16).reshape(32, 2)
        code = word[:, column]
        want = body.terms[term][np.stack([code & 15, code >> 4], axis=1)]
        np.testing.assert_array_equal(halves, want)


def test_plans():
  """One wave on 132 multiprocessors, and 2 MB of codes on their way."""
  for ins, columns, splits in [
      (4096, 4096, 8), (4096, 11008, 2), (14336, 4096, 8), (8192, 28672, 1)]:
    for rows in (1, 16):
      plan = matmul_gpu.plan_for(rows, ins, columns, 2)
      assert plan == Plan(16, splits)
      blocks = columns // 128 * splits
      assert blocks <= 264 and blocks * 4 * 32 * 128 >= 2e6
  assert matmul_gpu.plan_for(17, 4096, 4096, 2) == Plan(8, 4)
  # More blocks than fit anyway; two chunks a warp; few columns.
  assert matmul_gpu.plan_for(1, 4096, 131072, 2) == Plan(16, 1)
  assert matmul_gpu.plan_for(1, 1024, 1024, 1) == Plan(16, 2, terms=1)
  assert matmul_gpu.plan_for(1, 256, 64, 1) == Plan(8, 1, terms=1)


TPU = [
    ("nf4", 1, 576, 576, 64, jnp.bfloat16),  # Ragged both ways.
    ("int4_affine", 7, 192, 200, 32, jnp.bfloat16),
    ("fp4", 32, 64, 136, 32, jnp.float32),
    ("int4", 4, 1024, 128, 16, jnp.float32),
]


def form(name, block):
  return one.form(name, block)


@pytest.mark.parametrize("name,rows,ins,columns,block,dtype", TPU)
def test_tpu(name, rows, ins, columns, block, dtype):
  x, codes, named, _ = inputs(name, rows, ins, columns, block, dtype)
  got = matmul.matmul(
      jnp.asarray(x[0]), codes[0], {k: v[0] for k, v in named.items()},
      form(name, block), backend="mosaic_tpu", interpret=True)
  assert got.dtype == dtype
  # Of the weight that the plain path has, in the same roundings.
  w = one.expected(name, codes[0], {k: v[0] for k, v in named.items()}, block,
                   dtype)
  out = BF16 if dtype == jnp.bfloat16 else 0.0
  check(got[None], x, w[None], 0, out)


def small(layers=1):
  x, codes, named, _ = inputs(
      "int4_affine", 2, 64, 128, 32, np.float32, layers)
  named["scales"] = np.nan_to_num(named["scales"], nan=1.0)
  run = functools.partial(
      matmul.matmul, form=form("int4_affine", 32))
  return x, codes, named, functools.partial(
      run, backend="mosaic_tpu", interpret=True), functools.partial(
          run, backend="xla")


def test_vmap_is_one_launch():
  x, codes, named, kernel, plainly = small(3)
  w = codes[0], {k: v[0] for k, v in named.items()}
  for args, axes in (((x, *w), (0, None, None)),
                     ((x, codes, named), (0, 0, 0)),
                     ((x[0], codes, named), (None, 0, 0))):
    many = jax.vmap(kernel, axes)
    text = str(jax.make_jaxpr(many)(*args))
    assert text.count("pallas_call") == 1 and "while" not in text
    np.testing.assert_allclose(
        many(*args), jax.vmap(plainly, axes)(*args), rtol=1e-5, atol=1e-3)
  # Too many rows together.
  text = str(jax.make_jaxpr(jax.vmap(kernel, (0, None, None)))(
      np.zeros((17, 2, 64), np.float32), *w))
  assert "pallas_call" not in text


def test_derivatives_are_plain():
  x, codes, named, kernel, plainly = small()
  codes, named = codes[0], {k: v[0] for k, v in named.items()}

  def loss(run, x, named):
    return jnp.sum(jnp.sin(run(x, codes, named) / 64))

  got, want = (jax.grad(functools.partial(loss, run), (0, 1))(x[0], named)
               for run in (kernel, plainly))
  jax.tree.map(functools.partial(
      np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


def test_leading_axes_and_who_asks(monkeypatch):
  """`QuantizedArray.matmul` asks for as many rows as `x` has in all."""
  w = quant.quantize(
      np.float32(np.random.default_rng(0).normal(size=(128, 256))),
      quant.QuantSpec("nf4", 64, True))
  x = np.float32(np.random.default_rng(1).normal(size=(40, 128)))
  want = x @ np.asarray(w.dequantize())
  assert "pallas_call" not in str(jax.make_jaxpr(quant.matmul)(x[:3], w))
  monkeypatch.setattr(matmul, "DEFAULTS", {"cpu": "mosaic_tpu"})
  monkeypatch.setattr(matmul.matmul, "__kwdefaults__", {
      "backend": None, "interpret": True})
  for given in (x[0], x[:1], x[:32].reshape(4, 8, 128)):
    assert "pallas_call" in str(jax.make_jaxpr(quant.matmul)(given, w))
    np.testing.assert_allclose(
        quant.matmul(given, w), given @ np.asarray(w.dequantize()),
        rtol=1e-4, atol=1e-4)
  assert "pallas_call" not in str(jax.make_jaxpr(quant.matmul)(x, w))
  np.testing.assert_allclose(quant.matmul(x, w), want, rtol=1e-4, atol=1e-4)
  pull = jax.vjp(lambda x: quant.matmul(x, w), x[:2])[1]
  np.testing.assert_allclose(
      pull(jnp.ones((2, 256)))[0], np.asarray(w.dequantize()).sum(1)[None]
      * np.ones((2, 1)), rtol=1e-4, atol=1e-4)
  other = quant.quantize(np.ones((128, 256), np.float32),
                         quant.QuantSpec("int8"))
  assert "pallas_call" not in str(jax.make_jaxpr(quant.matmul)(x[:1], other))


def test_who_gets_a_kernel():
  gpu = functools.partial(matmul_gpu.applies, block_size=64,
                          dtype=jnp.bfloat16)
  assert gpu(1, 4096, 4096) and gpu(32, 11008, 4096)
  assert not gpu(33, 4096, 4096) and not gpu(0, 4096, 4096)
  assert not gpu(1, 4128, 4096) and not gpu(1, 4096, 4104)
  assert not gpu(1, 4096, 4096, dtype=jnp.float32)
  assert not gpu(1, 4096, 4096, block_size=32)
  for backend, message in (("mosaic", "did you mean"),
                           ("mosaic_gpu", r"\[2, 64\] float32")):
    x, codes, named, _, _ = small()
    with pytest.raises(errors.UserError, match=message):
      matmul.matmul(x[0], codes[0], {k: v[0] for k, v in named.items()},
                    form("int4_affine", 32), backend=backend)
  assert set(matmul.KERNELS) <= set(dequantise.KERNELS)
