"""The kernel of threads at device memory, run by numpy, bit for bit.

The interpreter runs the very instructions that a GPU would be given, for all
threads of the grid, and checks that accesses are aligned; that a GPU's
assembler takes them is `test_aot`'s.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from lora_jax.kernels import dequantise
from lora_jax.kernels import direct_gpu
from lora_jax.kernels import ptx
from lora_jax.kernels import ptx_levels
from lora_jax.quant import double
from lora_jax.quant import dynamic
from tests.kernels import test_dequantise as one

Variant = direct_gpu.Variant
VARIANTS = [
    Variant(), Variant(rows=4, columns=4, ahead=1), Variant(rows=32, ahead=8),
    Variant(columns=16, warpgroups=2, store=".cs"),
    Variant(decode="select", rows=2), Variant(decode="arithmetic"),
    Variant(steps=3), Variant(rows=4, steps=7, warpgroups=2)]
# Rows, columns, block size. Threads end inside a warp, a half block is 2 rows,
# and a column of threads is no power of two.
SHAPES = [(128, 272, 64), (36, 48, 4), (64, 592, 32)]


@pytest.mark.parametrize("name", one.FORMATS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bits_equal_numpys(name, variant):
  shapes = SHAPES if variant == Variant() else SHAPES[:1]
  for rows, columns, size in shapes:
    assert direct_gpu.applies(rows, columns, size, jnp.bfloat16, variant)
    codes, named = one.stored(name, rows, columns, size)
    for dtype in (jnp.bfloat16, jnp.float16):
      got = direct_gpu.dequantise(
          codes[None], *[x[None] for x in named.values()],
          levels=one.form(name, size).levels, block_size=size, dtype=dtype,
          variant=variant, interpret=True)[0]
      assert got.dtype == dtype and got.shape == (rows, columns)
      with np.errstate(over="ignore"):
        want = one.expected(name, codes, named, size, dtype)
      # The sign of zero aside, as in `test_dequantise`.
      np.testing.assert_array_equal(
          one.bits(np.asarray(got) + dtype(0)), one.bits(want + dtype(0)))


@pytest.fixture(scope="module", params=["nf4", "int4_affine"])
def stack(request):
  """Three layers of a weight, doubly quantised, and its values."""
  draws = np.random.default_rng(0).normal(size=(3, 128, 200))
  weights = [quant.quantize(w, quant.QuantSpec(request.param, 64))
             for w in np.float32(draws)]
  values = [one.bits(w.dequantize(jnp.bfloat16)) for w in weights]
  return jax.tree.map(lambda *x: jnp.stack(x), *weights), np.stack(values)


@pytest.mark.parametrize("nested", [False, True])
def test_layers_of_a_stack(stack, nested):
  """All at once, and each straight out of the stack, by a traced index; with
  statistics of 8 bits or unnested before."""
  weights, want = stack
  statistics = [weights.scales]
  if hasattr(weights, "minimums"):
    statistics.append(weights.minimums)
  how = {}
  if nested:
    how["table"] = jnp.asarray(dynamic.table())
    statistics = [(s.codes, s.nested_absmax, s.offset) for s in statistics]
  else:
    statistics = [jax.vmap(double.unnest)(s) for s in statistics]

  def run(layer=None, below=0):
    return direct_gpu.dequantise(
        weights.codes, *statistics, levels=weights.levels(), block_size=64,
        dtype=jnp.bfloat16, interpret=True, layer=layer, below=below, **how)

  np.testing.assert_array_equal(one.bits(run()), want)
  taller = one.bits(run(below=7))
  np.testing.assert_array_equal(taller[:, :128], want)
  assert np.isnan(np.asarray(run(below=7)[:, 128:], np.float32)).all()
  each = jax.lax.map(run, jnp.arange(3))
  np.testing.assert_array_equal(one.bits(each[:, 0]), want)


def test_entry_point_takes_it():
  """By name, batched, inside jit; the derivative is the plain path's."""
  codes, named = one.stored("nf4", 64, 256, 32)
  named["scales"][0, 1] = 1.0
  stack = np.stack([codes, codes ^ 255])

  def run(codes, scales, **how):
    return dequantise.dequantise(
        codes, {"scales": scales}, one.form("nf4", 32), jnp.bfloat16, **how)

  how = {"backend": "direct_gpu", "interpret": True}
  text = str(jax.make_jaxpr(lambda c: run(c, named["scales"], **how))(codes))
  assert "pure_callback" in text
  got = jax.jit(jax.vmap(lambda c: run(c, named["scales"], **how)))(stack)
  want = run(stack, np.stack([named["scales"]] * 2), backend="xla")
  np.testing.assert_array_equal(one.bits(got), one.bits(want))
  slopes = [
      jax.grad(lambda s, how=how: run(codes, s, **how).astype(
          jnp.float32).sum())(named["scales"])
      for how in (how, {"backend": "xla"})]
  np.testing.assert_array_equal(*slopes)


def test_who_gets_it():
  assert direct_gpu.applies(576, 576, 64, jnp.float16)
  assert direct_gpu.applies(576, 8, 64, jnp.bfloat16)
  assert not direct_gpu.applies(576, 576, 128, jnp.bfloat16)  # A tail.
  assert not direct_gpu.applies(576, 580, 64, jnp.bfloat16)  # 4 bytes off.
  assert not direct_gpu.applies(576, 576, 2, jnp.bfloat16)
  assert not direct_gpu.applies(576, 576, 64, jnp.float32)


def test_first_kernel_that_applies_is_the_default(monkeypatch):
  """float32 is one that only the second takes."""
  taken = []
  monkeypatch.setitem(
      dequantise.DEFAULTS, "cuda", ("direct_gpu", "mosaic_gpu"))
  monkeypatch.setattr(dequantise, "_compiled", lambda call, platforms: (
      taken.append(dict(platforms)) or call.plain))
  codes, named = one.stored("nf4", 128, 256, 64)
  for dtype in (jnp.bfloat16, jnp.float32):
    dequantise.dequantise(codes, named, one.form("nf4", 64), dtype)
  assert [found["cuda"] for found in taken] == ["direct_gpu", "mosaic_gpu"]


def test_arithmetic_levels_only_where_they_are():
  nf4, int4 = (one.form(name, 64).levels for name in ("nf4", "int4"))
  for levels, found in ((nf4, "shuffle"), (int4, "arithmetic")):
    assert ptx_levels.lookup("arithmetic", levels) is (
        ptx_levels.LOOKUPS[found])


@pytest.mark.parametrize("by", [1, 2, 3, 7, 43, 511, 1376, 3584, 2**20 + 7])
def test_division_is_exact(by):
  p = ptx.Program(1)
  result = p.divide(p.do("mov.u32", "%ctaid.x"), by)
  p.store(p.at(p.operand(0), p.do("mov.u32", "%tid.x"), 4), [result])
  multiples = np.arange(0, 2**31, max(by, 2**20) // by * by)
  numbers = np.unique(np.concatenate(
      [multiples, multiples[1:] - 1, [2**31 - 1, 2**31 - by]]))
  for code in p.code:  # Numbers in the place of blocks.
    assert "div" not in code.op
  out = np.empty(len(numbers), np.uint32)
  ptx.interpret(p, [], out, {"%ctaid.x": numbers,
                             "%tid.x": np.arange(len(numbers))})
  np.testing.assert_array_equal(out, numbers // by)


def test_programs_as_text():
  """By hand, from the manual's syntax."""
  p = ptx.Program(2)
  lane = p.do("mov.u32", "%laneid")
  first, second = p.load(p.at(p.operand(0), lane, 8), 16, 2, ".L2::128B")
  p.store(p.operand(1), [p.do("cvt.rn.bf16x2.f32", second, first)])
  assert p.text().splitlines() == [
      "{", ".reg .b32 w<4>;", ".reg .b64 a<3>;", "mov.u32 w0, %laneid;",
      "cvta.to.global.u64 a0, $0;", "mad.wide.u32 a1, w0, 8, a0;",
      "ld.global.nc.L2::128B.v2.b32 {w1, w2}, [a1+16];",
      "cvta.to.global.u64 a2, $1;", "cvt.rn.bf16x2.f32 w3, w2, w1;",
      "st.global.b32 [a2+0], w3;", "}"]


def test_interpreter_sees_misaligned_accesses():
  p = ptx.Program(1)
  base = p.operand(0)
  p.store(base, p.load(base, 4, 2))
  with pytest.raises(AssertionError, match="misaligned"):
    ptx.interpret(p, [], np.zeros(8, np.uint32), ptx.grid(1, 32))
