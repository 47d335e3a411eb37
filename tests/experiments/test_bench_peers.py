"""The peers' scripts beside ours: stand-ins that print what those print."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from configs import bench as bench_config
from experiments.bench import flops
from experiments.bench import geometry
from experiments.bench import peers
from experiments.bench import table

# As torch_qlora.py parses its command line and prints, a line a shape.
TRAIN = """
import argparse, json, sys
p = argparse.ArgumentParser()
for name in ("impl", "model", "shapes", "targets"):
  p.add_argument("--" + name)
for name in ("layers", "rank", "alpha", "warmup", "steps"):
  p.add_argument("--" + name, type=int)
p.add_argument("--clip", type=float)
p.add_argument("--lr", type=float)
a = p.parse_args()
print("a note")
print(json.dumps({"event": "versions", "torch": "2.11"}))
if a.impl == "broken":
  sys.exit("no such module: broken")
for case in a.shapes.split(","):
  shape, mode = case.split(":")
  b, t = map(int, shape.split("x"))
  line = {"impl": a.impl, "batch": b, "seq": t, "gc": mode, "gpu": "H100",
          "argv": sys.argv[1:]}
  if b == 8:
    line["error"] = "oom"
  else:
    line |= {"step_ms": 500.0, "step_ms_min": 490.0, "step_ms_max": 510.0,
             "tokens_per_s": b * t / 0.5, "peak_alloc_gib": 34.5,
             "loss_first": 11.0, "loss_last": 10.5, "finite": True,
             "steps": a.steps, "n_matmul": %d}
  print(json.dumps(line))
"""
KERNELS = """
import json
print(json.dumps({"section": "dequant", "shape": [4096, 4096],
                  "gb_s": 1659.0}))
print(json.dumps({"section": "matmul", "tflops": 770.0}))
"""
TORCH = """
class cuda:
  is_available = staticmethod(lambda: %s)
"""


@dataclasses.dataclass(frozen=True)
class Folder:
  """Scripts, and a torch that says whether there is a GPU."""

  path: pathlib.Path

  def run(self, arg="llama2-7b", gpu=True, folder=None, **changes):
    site = self.path / f"site-{gpu}"
    (site / "torch").mkdir(parents=True, exist_ok=True)
    (site / "torch" / "__init__.py").write_text(TORCH % gpu)
    config = bench_config.get_config(arg)
    config.peers.site, config.limit = str(site), 60
    config.peers.impls = "unsloth,hf-bnb"
    for name, value in changes.items():
      block, _, field = name.partition("__")
      config[block][field] = value
    found = []
    peers.run(str(folder or self.path),
              json.loads(config.to_json_best_effort()), found.append)
    show = table.Table(lambda text: None)
    for line in found:
      show(line)
    return found


@pytest.fixture
def folder(tmp_path):
  return make(tmp_path)


def make(tmp_path, n_matmul=6_607_077_376):
  (tmp_path / "torch_qlora.py").write_text(TRAIN % n_matmul)
  (tmp_path / "bnb_kernels.py").write_text(KERNELS)
  return Folder(tmp_path)


def test_steps_of_the_peers_in_our_words(tmp_path):
  # Four layers of 4 x 4096^2 + 3 x 4096 x 11008, and the head.
  found = make(tmp_path, 4 * 202_375_168 + 131_072_000).run(
      "llama2-7b,n_layers=4", train__shapes="4x2048,8x2048")
  steps, kernels = found[:8], found[8:]
  assert [(x["name"], x["batch"], x["checkpointing"]) for x in steps] == [
      (impl, b, mode) for impl, on in (("unsloth", "unsloth"),
                                       ("hf-bnb", "on"))
      for mode in (on, "off") for b in (4, 8)]
  first = steps[0]
  assert first["step_s"] == 0.5 and first["tokens_per_s"] == 16384
  assert first["peak_bytes"] == 34.5 * 2**30
  four = geometry.geometry("llama2-7b", "n_layers=4")
  assert first["model_tflops"] == pytest.approx(
      16384 * flops.train_token(four, [2048]) / 1e12, rel=1e-5)
  assert " ".join(first["theirs"]["argv"]) == (
      "--impl unsloth --model llama2-7b --layers 4 --shapes "
      "4x2048:unsloth,8x2048:unsloth,4x2048:off,8x2048:off --rank 16 "
      "--alpha 32 --targets all-linear --clip 0 --lr 0.001 --warmup 4 "
      "--steps 10")
  assert steps[1]["error"] == "oom" and "step_s" not in steps[1]
  assert [(x["name"], x.get("gb_per_s"), x.get("tflops")) for x in kernels
          ] == [("bnb_kernels.py dequant", 1659.0, None),
                ("bnb_kernels.py matmul", None, 770.0)]


@pytest.mark.parametrize("remat, modes", [
    ("full", "on"), ("none", "off"), ("named", "on off"), ("dots", "on")])
def test_checkpointing_follows_ours(remat, modes):
  config = bench_config.get_config("llama2-7b").to_dict()
  config["train"]["remat"] = remat
  argv = peers.arguments(config, "hf-bnb")
  shapes = argv[argv.index("--shapes") + 1]
  assert shapes == ",".join(f"4x2048:{mode}" for mode in modes.split())


def test_an_implementation_that_fails_does_not_stop_the_others(folder):
  found = folder.run(peers__impls="broken,hf-bnb", peers__kernels=False)
  assert found[0] == {"part": "peers", "name": "broken",
                      "error": "exit code 1: no such module: broken"}
  assert [x["name"] for x in found[1:]] == ["hf-bnb"] * 2


@pytest.mark.parametrize("changes, reason", [
    (dict(adapter__method="dora"), "adapter.method=dora, and theirs is lora"),
    (dict(quant__format="int4"), "quant.format=int4, and theirs is nf4"),
    (dict(train__packed=6), "train.packed=6, and theirs is 0"),
    (dict(arg="llama2-7b,d_ff=64"), "model.changes has d_ff"),
])
def test_only_what_is_alike_is_compared(folder, changes, reason):
  found = folder.run(**changes, peers__kernels=False)
  assert [x["name"] for x in found] == ["train"]
  assert found[0]["error"].startswith(f"not comparable: {reason}")


def test_models_of_one_name_are_compared(tmp_path):
  first, *_ = make(tmp_path, 1_605_632).run(peers__kernels=False)
  assert first["error"] == (
      "another model goes by this name there: 1,605,632 parameters in "
      "products, and here 6,607,077,376")


def test_why_there_are_no_peers(folder, tmp_path):
  def reason(**changes):
    line, = folder.run(**changes)
    return line["error"]

  assert reason(gpu=False) == "torch finds no CUDA device here"
  empty = tmp_path / "empty"
  empty.mkdir()
  assert reason(folder=empty) == (
      f"--peers={empty} has no torch_qlora.py; give the folder of the scripts")
  assert reason(peers__python=f"{empty}/python") == (
      f"peers.python={empty}/python: No such file or directory; name a Python "
      "with torch")
  bare = tmp_path / "python"
  bare.write_text('#!/bin/sh\necho \'{"torch": false, "gpu": false}\'\n')
  bare.chmod(0o755)
  assert reason(peers__python=str(bare)) == (
      f"{bare} has no torch; set peers.python or peers.site")
