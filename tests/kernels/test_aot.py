"""Programs with the kernels compile for accelerators that are not here.

That the kernel's call is in the compiled program is asserted everywhere: the
plain path would compile as well.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.kernels import dequantise
from lora_jax.kernels import direct_gpu
from lora_jax.kernels import matmul
from lora_jax.kernels import matmul_gpu
from lora_jax.kernels import mosaic_gpu
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import sharding
from lora_jax.train import optim
from lora_jax.train import step as step_lib
from tests import tiny
from tests.kernels import test_dequantise as one
from tests.kernels import topologies

TPUS = ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"]
COLLECTIVES = re.compile(
    r"= (\w+)\[[\d,]*\]\S* (?:all-gather|all-reduce|all-to-all|"
    r"collective-permute|reduce-scatter)")


@functools.cache
def devices(name):
  if reason := topologies.missing(name):
    pytest.skip(reason)
  return topologies.devices(name)


def compiled(f, device, *args) -> str:
  options = ({"xla_gpu_autotune_level": 0} if device.platform == "gpu"
             else None)
  lowered = f.lower(*args) if hasattr(f, "lower") else jax.jit(f).lower(*args)
  return lowered.compile(compiler_options=options).as_text()


def calls(text: str, device) -> int:
  return text.count(f'custom_call_target="{topologies.CALLS[device.platform]}')


def arguments(shape, block, cut, names=("scales",)):
  layers, rows, columns = shape
  codes = jax.ShapeDtypeStruct(
      (layers, rows // 2, columns), jnp.uint8, sharding=cut)
  return codes, {name: jax.ShapeDtypeStruct(
      (layers, -(-rows // block), columns), jnp.float32, sharding=cut)
                 for name in names}


def run(name, block, dtype=jnp.bfloat16):
  def dequantised(codes, named):
    return dequantise.dequantise(codes, named, one.form(name, block), dtype)

  return dequantised


@pytest.mark.parametrize("name", ["nf4", "int4_affine"])
@pytest.mark.parametrize("place", [*TPUS, "h100"])
def test_kernel_compiles(place, name):
  device = devices(place)[0]
  names = ("scales", "minimums") if name == "int4_affine" else ("scales",)
  cut = jax.sharding.SingleDeviceSharding(device)
  for rows, columns, block, dtype in [
      (576, 1536, 64, jnp.bfloat16), (256, 576, 32, jnp.float32)]:
    text = compiled(run(name, block, dtype), device,
                    *arguments((2, rows, columns), block, cut, names))
    assert calls(text, device) == 1


@pytest.mark.parametrize("variant", [
    direct_gpu.DEFAULT,
    direct_gpu.Variant(rows=16, columns=4, ahead=4, warpgroups=2,
                       decode="arithmetic", load=".L2::256B", store=".cs"),
    direct_gpu.Variant(columns=16, decode="select", steps=2, load="",
                       store=".L1::no_allocate")], ids=str)
def test_programs_assemble(variant):
  """Every instruction and cache operator, with statistics of 8 bits."""
  device = devices("h100")[0]
  cut = jax.sharding.SingleDeviceSharding(device)
  codes, _ = arguments((2, 256, 1056), 64, cut)

  def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=cut)

  nested = [like(jnp.uint8, 2, 4, 1056), like(jnp.float32, 2, 17),
            like(jnp.float32, 2)]

  def dequantised(codes, scales, minimums, table):
    return direct_gpu.dequantise(
        codes, scales, minimums, levels=one.form("int4_affine", 64).levels,
        block_size=64, dtype=jnp.bfloat16, table=table, variant=variant)

  text = compiled(dequantised, device, codes, nested, nested,
                  like(jnp.float32, 256))
  assert calls(text, device) == 1


def test_mosaic_shuffles():
  """Which its interpreter cannot do."""
  device = devices("h100")[0]
  codes, named = arguments(
      (1, 64, 256), 64, jax.sharding.SingleDeviceSharding(device))

  def dequantised(codes, scales):
    return mosaic_gpu.dequantise(
        codes, scales, levels=one.form("nf4", 64).levels, block_size=64,
        dtype=jnp.bfloat16, variant=mosaic_gpu.Variant(8, "shuffle"))

  text = compiled(dequantised, device, codes, named["scales"])
  assert calls(text, device) == 1


def test_a_scan_reads_its_layer_out_of_the_stack():
  """No slice of the codes is copied before the kernel."""
  device = devices("h100")[0]
  cut = jax.sharding.SingleDeviceSharding(device)
  codes, named = arguments((3, 1024, 1024), 64, cut)
  x = jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16, sharding=cut)

  def chain(x, codes, scales, whole):
    def body(x, layer):
      given = ((codes, scales) if whole
               else (codes[layer][None], scales[layer][None]))
      w = direct_gpu.dequantise(
          *given, levels=one.form("nf4", 64).levels, block_size=64,
          dtype=jnp.bfloat16, layer=layer if whole else None)
      return x @ w[0], None

    return jax.lax.scan(body, x, jnp.arange(3))[0]

  for whole in (True, False):
    text = compiled(jax.jit(chain, static_argnums=3), device, x, codes,
                    named["scales"], whole)
    assert calls(text, device) == 1
    assert ("u8[1,512,1024]" in text) == (not whole)
FEW = {  # Format, rows of `x`, shape and block size of the weight.
    "one row": ("nf4", 1, 1024, 576, 64, jnp.bfloat16),
    "many, affine": ("int4_affine", 20, 576, 1536, 64, jnp.bfloat16),
}


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("place", [*TPUS, "h100"])
def test_few_rows_compile(place, case):
  """With the kernel, and without the weight."""
  device = devices(place)[0]
  name, rows, ins, columns, block, dtype = FEW[case]
  cut = jax.sharding.SingleDeviceSharding(device)
  names = ("scales", "minimums") if name == "int4_affine" else ("scales",)
  codes, named = arguments((1, ins, columns), block, cut, names)
  codes, named = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
      a.shape[1:], a.dtype, sharding=cut), (codes, named))
  backend = "mosaic_gpu" if place == "h100" else "mosaic_tpu"

  @jax.jit
  def product(x, codes, named):
    return matmul.matmul(
        x, codes, named, one.form(name, block), backend=backend)

  x = jax.ShapeDtypeStruct((rows, ins), dtype, sharding=cut)
  text = compiled(product, device, x, codes, named)
  assert calls(text, device) == 1
  assert f"{ins},{columns}]" not in text


@pytest.mark.parametrize("plan", [
    matmul_gpu.Plan(4, 3, cluster=False, ahead=2, terms=1),
    matmul_gpu.Plan(8, 4, decode="prmt")])
def test_every_way_of_the_product_compiles(plan):
  device = devices("h100")[0]
  cut = jax.sharding.SingleDeviceSharding(device)
  codes, named = arguments((2, 1024, 576), 64, cut)
  x = jax.ShapeDtypeStruct((2, 3, 1024), jnp.float16, sharding=cut)
  text = compiled(functools.partial(
      matmul_gpu.matmul, levels=one.form("nf4", 64).levels, block_size=64,
      plan=plan), device, x, codes, named["scales"])
  assert calls(text, device) == 1


@pytest.mark.parametrize("place", ["h100", "h100:4"])
def test_a_decoding_product_compiles(monkeypatch, place):
  """What `QuantizedArray.matmul` makes of the row in `DEFAULTS`: on one device
  scales are decoded in the kernel, on several before it."""
  monkeypatch.setattr(matmul, "DEFAULTS", {"cuda": "mosaic_gpu"})
  ds = devices(place)
  mesh = Mesh(np.asarray(ds), ("tensor",))
  w = jax.eval_shape(lambda: quant.quantize(
      jnp.zeros((512, 256)), quant.QuantSpec("nf4", 64)))
  w = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=NamedSharding(
          mesh, P("tensor") if a.ndim == 2 else P())), w)
  x = jax.ShapeDtypeStruct((3, 1, 512), jnp.bfloat16,
                           sharding=NamedSharding(mesh, P()))
  text = compiled(lambda x, w: quant.matmul(x, w), ds[0], x, w)
  assert calls(text, ds[0]) == 1 and "512,256]" not in text
  assert bool(re.search(r"f32\[(1,)?[82],256\]", text)) == (len(ds) > 1)
  # The sum over shards; as a start and an end in jax 0.10.
  assert set(COLLECTIVES.findall(text)) == ({"f32"} if len(ds) > 1 else set())


def test_shapes_without_a_kernel_compile_all_the_same():
  for place in ("v5e:2x2", "h100"):
    device = devices(place)[0]
    cut = jax.sharding.SingleDeviceSharding(device)
    text = compiled(run("nf4", 64), device, *arguments((1, 88, 120), 64, cut))
    assert calls(text, device) == 0


@pytest.mark.parametrize("spec", [
    P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")])
@pytest.mark.parametrize("place", ["v5e:2x2", "h100:4"])
def test_shards_stay_where_they_are(place, spec):
  """Under GSPMD on GPU; on TPU, whose compiler has no custom partitioner, in
  a `shard_map`, and plain XLA under GSPMD."""
  ds = devices(place)
  mesh = Mesh(np.asarray(ds).reshape(2, 2), ("fsdp", "tensor"))
  args = arguments((2, 1024, 1024), 64, NamedSharding(mesh, spec))
  f = run("nf4", 64)
  text = compiled(f, ds[0], *args)
  assert not COLLECTIVES.findall(text)
  assert calls(text, ds[0]) == (1 if place == "h100:4" else 0)
  inside = jax.shard_map(f, mesh=mesh, in_specs=(spec, spec), out_specs=spec,
                         check_vma=False)
  text = compiled(inside, ds[0], *args)
  assert not COLLECTIVES.findall(text)
  assert calls(text, ds[0]) == 1


MODEL = config_lib.ModelConfig(
    family="llama", vocab_size=512, d_model=256, d_ff=512, n_layers=2,
    n_heads=4, n_kv_heads=4, head_dim=64)


def train_step(place, shape):
  """A QLoRA step of a tiny model compiled for `shape` of (fsdp, tensor)."""
  ds = devices(place)
  mesh = mesh_lib.make(
      mesh_lib.MeshConfig(1, *shape), ds[: shape[0] * shape[1]])

  def build():
    base = init.random_base(jax.random.key(0), MODEL)
    spec = quant.QuantSpec("nf4", 64, double=False)
    layers = {
        name: x.replace(weight=quant.quantize(x.weight, spec))
        if isinstance(x, decoder.Linear) else x
        for name, x in base.layers.items()}
    return base.replace(layers=layers)

  base = build()
  base, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(rank=8), base,
      tiny.paths(MODEL))
  trainable, frozen = adapters_lib.split(tree)
  state = step_lib.init_state(trainable)
  tokens = np.zeros((1, 4, 128), np.int32)
  batch = types.Batch(
      tokens, tokens, np.float32(tokens + 1), tokens, tokens + 1, tokens)

  def described(leaf, placement):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

  replicated = NamedSharding(mesh, P())

  def like(tree):
    """Descriptions on `mesh`, cut as `sharding.put` would cut them."""
    return jax.tree.map(described, tree, sharding.shardings(mesh, tree))

  rest = jax.tree.map(
      lambda x: described(jnp.asarray(x), replicated),
      (batch, optim.Hyper(*[jnp.float32(0)] * 6), jax.random.key(0)))
  lowered = step_lib.train_step.lower(
      like(state), like(frozen), like(base), *rest, model=MODEL,
      settings=step_lib.Settings(
          dtype="bfloat16", mesh=mesh if mesh.size > 1 else None))
  options = ({"xla_gpu_autotune_level": 0} if ds[0].platform == "gpu"
             else None)
  return ds[0], lowered.compile(compiler_options=options).as_text()


@pytest.mark.parametrize("place,shape", [
    # On one chip it is a part of what four compile.
    pytest.param("v5e:2x2", (1, 1), marks=pytest.mark.slow),
    ("v5e:2x2", (2, 2)), ("h100", (1, 1))])
def test_a_training_step_compiles(place, shape):
  device, text = train_step(place, shape)
  # In the forward and in the backward scan: seven projections, or what is left
  # of them where those of the same input are one product.
  assert calls(text, device) >= (8 if shape == (1, 1) else 14)
