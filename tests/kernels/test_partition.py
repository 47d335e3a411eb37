"""A kernel on eight devices runs on their shards, and gathers nothing."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lora_jax.kernels import dequantise
from lora_jax.kernels import matmul
from lora_jax.kernels import partition
from tests import devices
from tests.kernels import test_dequantise as one

COLLECTIVE = r"= (\w+)\[[\d,]*\]\S* (all-gather|all-reduce|all-to-all|"\
    r"collective-permute|reduce-scatter)"
# Of a weight `[2, 512, 256]`, or (the last) of 9 blocks.
SPECS = {
    "rows fsdp": P(None, "fsdp", "tensor"),
    "rows tensor": P(None, "tensor", "fsdp"),
    "both on rows": P("data", ("fsdp", "tensor"), None),
    "columns": P(None, None, "tensor"),
    "replicated": P(),
    "nine blocks": P(None, "fsdp", "tensor"),
}
# Of `x [8, 512]` and a weight `[512, 256]`, and the collectives of a product.
PRODUCTS = {
    "columns": (P("data"), P(None, "tensor"), []),
    "rows": (P("data", "tensor"), P("tensor"), ["f32 all-reduce"]),
    "both": (P("data", "fsdp"), P("fsdp", "tensor"), ["f32 all-reduce"]),
    "replicated": (P("data"), P(), []),
}


@pytest.fixture(scope="module")
def report():
  run = subprocess.run(
      [sys.executable, "-m", "tests.kernels.test_partition"],
      cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True,
      timeout=300, env=devices.environ(8))
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", SPECS)
def test_shards_are_the_whole(report, case):
  found = report[case]
  assert found["equal"]
  if case == "nine blocks":
    # Its bytes are gathered along rows; columns stay cut.
    assert found["collectives"] == ["u8 all-gather"]
    assert found["shard"] == [2, 288, 128]
  else:
    assert not found["collectives"]
    rows, columns = {
        "rows fsdp": (256, 128), "rows tensor": (256, 128),
        "both on rows": (128, 256), "columns": (512, 128),
        "replicated": (512, 256)}[case]
    assert found["shard"][1:] == [rows, columns]


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_of_shards_add_up(report, case):
  """Few rows travel, and the weight does not."""
  found = report[f"product, {case}"]
  assert found["error"] < 1e-5
  assert found["collectives"] == PRODUCTS[case][2]
  # A batch stays cut, and so do columns.
  columns = 128 if "tensor" in PRODUCTS[case][1][1:] else 256
  assert found["shard"] == [4, columns]


def test_only_whole_blocks_are_cut():
  devices = np.asarray(jax.devices()[:1] * 8)
  mesh = Mesh(devices.reshape(4, 2), ("fsdp", "tensor"))
  cut = functools.partial(partition.allowed, mesh, block_size=64)
  assert cut(P("fsdp", "tensor"), (512, 96)) == P("fsdp", "tensor")
  assert cut(P("fsdp", "tensor"), (576, 96)) == P(None, "tensor")
  assert cut(P("fsdp", "tensor"), (544, 97)) == P(None, None)
  assert cut(P(("fsdp", "tensor")), (512, 96)) == P(("fsdp", "tensor"), None)
  assert cut(P("tensor", None, "fsdp"), (2, 544, 96)) == P(
      "tensor", None, "fsdp")


def main() -> None:
  mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2),
              ("data", "fsdp", "tensor"))
  found = {}
  for case, spec in SPECS.items():
    rows, block = (288, 32) if case == "nine blocks" else (512, 64)
    codes, named = one.stored("nf4", rows, 256, block)
    stack = np.stack([codes, codes ^ 255])
    scales = np.stack([named["scales"]] * 2)
    form = one.form("nf4", block)

    def run(codes, scales, form=form):
      return dequantise.dequantise(
          codes, {"scales": scales}, form, np.float32, backend="mosaic_tpu",
          interpret=True)

    want = one.bits(jax.jit(run)(stack, scales))
    cut = NamedSharding(mesh, spec)
    odd = NamedSharding(mesh, P(*spec[:1], None, *spec[2:]))
    placed = (jax.device_put(stack, cut),
              jax.device_put(scales, odd if rows < 512 else cut))
    compiled = jax.jit(run).lower(*placed).compile()
    got = compiled(*placed)
    found[case] = {
        "equal": bool((one.bits(got) == want).all()),
        "shard": list(got.sharding.shard_shape(got.shape)),
        "collectives": [" ".join(m) for m in re.findall(
            COLLECTIVE, compiled.as_text())]}
  codes, named = one.stored("nf4", 512, 256, 64)
  scales = np.nan_to_num(named["scales"])
  x = np.random.default_rng(2).normal(size=(8, 512)).astype(np.float32)
  w = one.expected("nf4", codes, {"scales": scales}, 64, np.float32)
  for case, (of_x, of_w, _) in PRODUCTS.items():

    def multiply(x, codes, scales):
      return matmul.matmul(
          x, codes, {"scales": scales}, one.form("nf4", 64),
          backend="mosaic_tpu", interpret=True)

    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in (
        (x, of_x), (codes, of_w), (scales, of_w))]
    compiled = jax.jit(multiply).lower(*placed).compile()
    got = compiled(*placed)
    found[f"product, {case}"] = {
        "error": float(np.abs(got - x @ w).max() / np.abs(x @ w).max()),
        "shard": list(got.sharding.shard_shape(got.shape)),
        "collectives": [" ".join(m) for m in re.findall(
            COLLECTIVE, compiled.as_text())]}
  print(json.dumps(found))


if __name__ == "__main__":
  main()
