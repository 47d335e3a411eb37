"""What `test_sharding` asserts on, measured on eight virtual devices.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
      python -m tests.models.eight SCRATCH_FOLDER [PART ...]

In a process of its own: a device count is fixed when JAX starts. Prints a
JSON object by the names of `PARTS`.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

import jax
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax import types
from lora_jax.adapters import lora
from lora_jax.evaluate import generate
from lora_jax.evaluate import perplexity
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load
from lora_jax.models import sharding
from lora_jax.train import adam8bit
from lora_jax.train import checkpoint
from lora_jax.train import optim
from lora_jax.train import step
from tests import tiny
from tests.adapters import contract

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 4, 2),
          "mixed": (2, 2, 2)}
# Compiling for eight devices takes seconds: the mesh that cuts along every
# axis, and one that a checkpoint of it goes on on.
CASES = {"lora nf4": ("fsdp", "mixed"), "full none": ("mixed",)}
EVERY = {f"{method} {fmt}": tuple(MESHES)
         for method in ("lora", "dora", "full") for fmt in ("nf4", "none")}
# No clipping, so that Adam's first moment is the gradient; a large epsilon,
# so that the update is no sign of a rounding error.
OPTIM = optim.OptimConfig(clip_norm=0.0, eps=1e-2, weight_decay=0.1)

WIDE = config_lib.ModelConfig(
    family="llama", vocab_size=32, d_model=256, d_ff=512, n_layers=2,
    n_heads=4, n_kv_heads=2, head_dim=64, tie_embeddings=False)
# Elements of k_proj, the smallest weight; everything else is smaller.
SMALLEST = 256 * 128
COLLECTIVE = re.compile(
    r"= ?(.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|"
    r"collective-permute)(?:-start)?\(")


def make(name):
  return mesh_lib.make(mesh_lib.MeshConfig(*MESHES[name]))


def batch():
  return jax.tree.map(
      lambda x: np.concatenate([x] * 4)[None], contract.batch())


class Run:
  """Training steps of a case on a mesh, or on one device (None)."""

  def __init__(self, case, name=None):
    self.mesh = None if name is None else make(name)
    base, tree = contract.randomised(*case.split())
    params, frozen = adapters_lib.split(tree)
    self.placed = self.put((base, frozen))
    self.params = self.put(params)
    self.state = self.put(step.init_state(self.params))

  def put(self, tree):
    return tree if self.mesh is None else sharding.put(self.mesh, tree)

  def step(self, state):
    data = batch()
    if self.mesh is not None:
      data = mesh_lib.put_batch(self.mesh, data)
    base, frozen = self.placed
    state, metrics = step.train_step(
        state, frozen, base, data, optim.hyper(OPTIM, 1e-2),
        jax.random.key(0), model=contract.CONFIG,
        settings=step.Settings(mesh=self.mesh))
    return state, float(metrics["loss"])

  def astray(self, tree):
    """Leaves that do not live where the table says."""
    where = trees.paths(sharding.shardings(self.mesh, tree))
    return [path for path, leaf in trees.paths(tree).items()
            if not leaf.sharding.is_equivalent_to(where[path], leaf.ndim)]


def distances(ours, theirs):
  """Relative norm of the difference of every leaf."""
  theirs = trees.paths(theirs)
  return {path: float(np.linalg.norm(np.asarray(x) - np.asarray(theirs[path]))
                      / max(np.linalg.norm(x), 1e-30))
          for path, x in trees.paths(ours).items()}


def equality(folder, cases):
  """Two steps of every case, and their checkpoints on other meshes."""
  found, kept = {}, {}
  for case, names in cases.items():
    one = Run(case)
    first, *losses = one.step(one.state)
    moments = jax.tree.map(np.array, first.opt_state[1].mu)
    middle = jax.tree.map(np.array, first)
    second, loss = one.step(first)
    losses.append(loss)
    if case == "lora nf4":
      kept[None] = one
    for name in names:
      run = Run(case, name)
      astray = run.astray((run.state, run.placed))
      cut = sum(not x.sharding.is_fully_replicated
                for x in jax.tree.leaves((run.placed, run.params)))
      state, start = run.step(run.state)
      astray += run.astray(state)
      grads = distances(moments, state.opt_state[1].mu)
      if case == "lora nf4" and name == "mixed":
        files = checkpoint.Checkpoints(folder / "checkpoints")
        files.save(1, state, {"loss": start})
        files.close()
      kept[name] = run if case == "lora nf4" else kept.get(name)
      state, end = run.step(state)
      found[f"{case} {name}"] = {
          "losses": [[start, end], losses], "grads": grads,
          "params": distances(second.params, state.params),
          "cut": cut, "astray": astray + run.astray(state)}
    if case == "lora nf4":
      restored = {}
      for name in (None, "fsdp"):
        files = checkpoint.Checkpoints(folder / "checkpoints")
        run = kept[name]
        fresh = run.put(step.init_state(run.params))
        state, meta = files.restore(fresh)
        files.close()
        astray = [] if name is None else run.astray(state)
        state_error = distances(middle.params, state.params)
        restored[str(name)] = {
            "first": [meta["loss"], losses[0]], "params": state_error,
            "second": [run.step(state)[1], losses[1]], "astray": astray}
      found["restored"] = restored
  return found


def offloaded():
  """A step with everything in host memory, in parts, against one device."""
  one, many = Run("lora nf4"), Run("lora nf4", "mixed")
  first, loss = one.step(one.state)
  everything = tuple(host_lib.KINDS)
  base, frozen = many.placed
  base = host_lib.placed(base)
  state = many.put(step.init_state(many.params, offload=everything))
  after, metrics = step.train_step(
      state, frozen, base, mesh_lib.put_batch(many.mesh, batch()),
      optim.hyper(OPTIM, 1e-2), jax.random.key(0), model=contract.CONFIG,
      settings=step.Settings(mesh=many.mesh, offload=everything))
  where = trees.paths(sharding.shardings(many.mesh, (after, base)))
  away = {path: x for path, x in trees.paths((after, base)).items()
          if host_lib.in_host(x)}
  return {
      "losses": [float(metrics["loss"]), loss],
      "params": distances(first.params, after.params),
      "away": list(away), "cut": sum(
          not x.sharding.is_fully_replicated for x in away.values()),
      "astray": [path for path, x in away.items()
                 if not x.sharding.is_equivalent_to(
                     host_lib.home(where[path]), x.ndim)]}


def collectives(name, remat):
  """(operation, dtype, elements) of a bfloat16 NF4 step's, by its HLO."""
  mesh = make(name)
  base = init.random_base(jax.random.key(0), WIDE)
  spec = quant.QuantSpec(block_size=32)
  base = base.replace(layers={
      target: one.replace(weight=quant.quantize(one.weight, spec))
      if isinstance(one, decoder.Linear) else one
      for target, one in base.layers.items()})
  base, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(method="dora", rank=2),
      base, tiny.paths(WIDE))
  params, frozen = adapters_lib.split(tree)
  ones = np.ones((1, 8, 4), np.int32)
  data = mesh_lib.put_batch(mesh, types.Batch(
      tokens=ones, targets=ones, loss_weights=ones.astype(np.float32),
      positions=ones, segment_ids=ones, example_ids=ones))
  placed = [sharding.put(mesh, x)
            for x in (step.init_state(params), frozen, base)]
  text = step.train_step.lower(
      *placed, data, optim.hyper(OPTIM, 1e-2), jax.random.key(0), model=WIDE,
      settings=step.Settings(dtype="bfloat16", remat=remat, mesh=mesh)
  ).compile().as_text()
  return [
      (match[2], dtype, int(np.prod([int(n) for n in dims.split(",") if n])))
      for match in COLLECTIVE.finditer(text)
      for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]


def housed():
  """Targets whose weight is dequantised by parts, and those that differ."""
  mesh, found = make("mixed"), {"housed": [], "unequal": []}
  for fmt in ("nf4", "int4_affine", "llm_int8"):
    spec = quant.QuantSpec(fmt, block_size=8)
    layer = {t: x.replace(weight=quant.quantize(x.weight[0], spec), bias=None)
             for t, x in contract.quantised("none").layers.items()
             if isinstance(x, decoder.Linear)}
    cut = jax.jit(lambda layer: sharding.housed(
        mesh, sharding.gathered(mesh, layer), ("cpu",)))
    values = jax.jit(lambda layer: {
        t: x.weight.dequantize("bfloat16") for t, x in layer.items()})
    parts = cut(sharding.put(mesh, layer))
    for target, value in values(parts).items():
      if parts[target].weight.home is not None:
        found["housed"].append(f"{fmt} {target}")
      if not np.array_equal(value, layer[target].weight.dequantize("bfloat16")):
        found["unequal"].append(f"{fmt} {target}")
  return found


def loading(folder):
  """A checkpoint read onto a mesh, against one device."""
  import safetensors.numpy

  config = tiny.CONFIGS["llama"]
  base = init.random_base(jax.random.key(0), config)
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  safetensors.numpy.save_file(
      dict(hf.state(config, base, "float32")), folder / "model.safetensors")
  mesh, spec = make("mixed"), quant.QuantSpec(block_size=4)
  source = load.open_source(str(folder))
  one = load.convert(source, spec)
  # What is written into must be cut before it is written into.
  put, whole = load._put, []

  def watched(stack, value, layer):
    for path, x in trees.paths(stack).items():
      if x.size >= 500 and x.sharding.is_fully_replicated:
        whole.append(path)
    return put(stack, value, layer)

  load._put = watched
  many = load.convert(source, spec, mesh=mesh)
  load._put = put
  away = load.convert(source, spec, mesh=mesh, host=True)
  drawn = init.random_base(jax.random.key(0), config, mesh=mesh)
  where = trees.paths(sharding.shardings(mesh, many.base))
  return {
      "fingerprints": [one.fingerprint, many.fingerprint],
      "unequal": [
          path for path, x in trees.paths(many.base).items()
          if not np.array_equal(x, trees.paths(one.base)[path])],
      "astray": [
          path for path, x in trees.paths(many.base).items()
          if not x.sharding.is_equivalent_to(where[path], x.ndim)],
      "whole": whole,
      "in host memory": [
          path for path, x in trees.paths(away.base).items()
          if host_lib.in_host(x) and x.sharding.is_equivalent_to(
              host_lib.home(where[path]), x.ndim)],
      "unequal in host memory": [
          path for path, x in trees.paths(away.base).items()
          if not np.array_equal(x, trees.paths(one.base)[path])],
      "codes": {
          target: list(many.base.layers[target].weight.codes.sharding
                       .shard_shape(
                           many.base.layers[target].weight.codes.shape))
          for target in ("q_proj", "down_proj")},
      "random": max(distances(base, drawn).values()),
      "random astray": [
          path for path, x in trees.paths(drawn).items()
          if path in where and not x.sharding.is_equivalent_to(
              where[path], x.ndim)]}


def evaluation():
  """Row losses and answers on a mesh, against one device."""
  base, tree = contract.randomised("dora", "nf4")
  mesh = make("mixed")
  data = jax.tree.map(lambda x: x[0], batch())
  prompts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
  found = {}
  for name, where in (("one", None), ("mesh", mesh)):
    placed, rows = (tree, base), data
    if where is not None:
      placed = sharding.put(mesh, placed)
      rows = mesh_lib.put_batch(mesh, data)
    losses = perplexity.row_losses(
        *placed, [(rows, np.arange(7))], model=contract.CONFIG, mesh=where)
    found[name] = {
        "nll": losses.nll.tolist(), "weight": losses.weight.tolist(),
        "tokens": generate.generate(
            contract.CONFIG, placed[1], placed[0], prompts, max_new_tokens=6,
            mesh=where)}
  return found


def moments(name):
  """Two updates of 8-bit moments on a mesh, against one device."""
  mesh = make(name)
  shapes = {"a": (2, 256, 16), "b": (2, 16, 512)}
  rng = np.random.default_rng(0)
  draw = lambda: {"layers": {"q_proj": lora.LoRA(
      scale=None, rate=None, rank=None, **{
          k: np.float32(rng.standard_normal(s)) for k, s in shapes.items()})}}
  params, *grads = draw(), draw(), draw()
  adam = adam8bit.scale_by_adam(0.9, 0.999, 1e-8)
  found = {"unequal": [], "astray": []}

  def update(grads, state):
    return sharding.constrain(mesh, adam.update(grads, state))

  state, placed = adam.init(params), sharding.put(mesh, adam.init(params))
  cut = jax.jit(update)
  for g in grads:
    one, state = jax.jit(adam.update)(g, state)
    many, placed = cut(sharding.put(mesh, g), placed)
  where = trees.paths(sharding.shardings(mesh, placed))
  found["updates"] = max(distances(one, many).values())
  theirs = trees.paths(state)
  for path, x in trees.paths(placed).items():
    if not np.array_equal(x, theirs[path]):
      found["unequal"].append(path)
    if not x.sharding.is_equivalent_to(where[path], x.ndim):
      found["astray"].append(path)
  node = placed.mu["layers"]["q_proj"], placed.mu_absmax["layers"]["q_proj"]
  found["shards"] = {
      f"{k} {getattr(x, k).dtype}": list(
          getattr(x, k).sharding.shard_shape(getattr(x, k).shape))
      for k in shapes for x in node}
  text = cut.lower(sharding.put(mesh, grads[0]), placed).compile().as_text()
  found["collectives"] = [m[2] for m in COLLECTIVE.finditer(text)]
  return found


PARTS = {
    "equality": lambda folder: equality(folder, CASES),
    "loading": lambda folder: loading(folder / "model"),
    "offloaded": lambda folder: offloaded(),
    "evaluation": lambda folder: evaluation(),
    "housed": lambda folder: housed(),
    "moments": lambda folder: moments("mixed"),
    # Without rematerialisation nothing gathered may be kept either.
    "collectives fsdp": lambda folder: collectives("fsdp", "none"),
    "collectives mixed": lambda folder: collectives("mixed", "named"),
}


# Minutes, and only by name.
LONG = {"every case": lambda folder: equality(folder, EVERY),
        "collectives tensor": lambda folder: collectives("tensor", "named")}


def main() -> None:
  folder, *names = sys.argv[1:]
  print(json.dumps({
      name: (PARTS | LONG)[name](pathlib.Path(folder))
      for name in names or PARTS}))


if __name__ == "__main__":
  main()
