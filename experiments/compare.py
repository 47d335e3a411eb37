"""Compares PEFT methods: same base, data and steps, each at its own best rate.

  python -m experiments.compare --output=docs/results/methods \\
      --set=data.path=gsm8k_train.jsonl,data.format=gsm8k

Every method of configs/methods/ (its paper's settings) is trained at all
learning rates of the grid at once: one compiled step trains a stack of
adapters on one frozen base. The rate is chosen on one half of the held-out
rows, the loss reported on the other. Then a step of one adapter alone is timed
(median) and its memory read off the compiled program.

  <output>/<method>.json   all rates' losses, and what is in the table
  <output>/README.md       the table, made again from all that is there

Finished methods are not run again; --part=0/4 takes every fourth method, so
that several processes can share a machine; --time times what was trained.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import os
import pathlib
import statistics as std_statistics
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from experiments import blocks
from experiments import cli
from experiments import compare_table
from experiments import rows as rows_lib
from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import pipeline
from lora_jax.data import virtual
from lora_jax.train import optim as optim_lib
from lora_jax.train import step as step_lib
from lora_jax.train import workdir as workdir_lib

# Half a decade apart: a method's best rate is seldom more than 20% from one.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class Lab:
  """What all methods share."""

  model: api.Model
  rows: dataset_lib.Dataset
  chosen_on: dataset_lib.Dataset
  reported_on: dataset_lib.Dataset
  config: dict[str, Any]


def lab(config: dict[str, Any]) -> Lab:
  """The base and the data of a config."""
  model = blocks.load(config)
  rows, held, _ = rows_lib.datasets(model, config)
  assert held is not None
  half = np.arange(len(held))
  return Lab(model, rows, held.select(half[::2]), held.select(half[1::2]),
             config)


def config_of(name: str, changes: dict[str, str]) -> dict[str, Any]:
  """A method's config with the comparison's data and length.

  Raises:
    errors.UsageError: for a field that does not exist.
  """
  module = importlib.import_module(f"configs.methods.{name}")
  config = module.get_config()
  base = defaults()
  for part in ("data", "train", "compute", "quant", "model"):
    config[part] = base[part]
  for key, value in changes.items():
    block, _, field = key.partition(".")
    if block not in config or field not in config[block]:
      raise errors.UsageError(f"--set={key}: there is no such field")
    kind = type(config[block][field])
    config[block][field] = (
        value == "True" if kind is bool else kind(value))
  return json.loads(config.to_json_best_effort())


def defaults() -> Any:
  """The comparison's own data, length and types."""
  config = common.method("lora", 1e-3)
  config.data.max_length = 512
  config.data.eval_max_length = 512
  config.data.eval_rows = 400
  config.train.steps = 150
  config.train.batch_size = 4
  config.compute.dtype = "bfloat16"
  config.compute.attention = "plain"
  return config


class Trial:
  """One method: its adapters, batches and step."""

  def __init__(self, shop: Lab, config: dict[str, Any]):
    self.shop, self.config = shop, config
    block = blocks.adapters_of(config)
    self.model = shop.model.adapt(block, seed=config["seed"], rows=shop.rows)
    self.params, self.frozen = adapters_lib.split(self.model.adapters)
    ahead = adapters_lib.virtual_tokens(self.model.adapters)
    train = config["train"]
    self.batches = pipeline.Batches(
        virtual.ahead(
            shop.rows,
            **adapters_lib.virtual_places(self.model.adapters, True)),
        train["batch_size"],
        train["accumulation"], config["data"]["max_length"] + ahead,
        config["data"]["packing"], config["seed"])
    self.optim = blocks.optim(config)
    self.settings = self.model.settings(
        layout="packed", steps=train["steps"])
    self.key = jax.random.key(config["seed"])

  @property
  def trees(self):
    return self.frozen, self.model.base

  def state(self) -> step_lib.TrainState:
    return step_lib.init_state(
        self.params, dtype=self.model.dtype, rules=self.settings.rules)

  def step(self, state, trees, batch, hyper, key):
    """`trees`: those that are frozen; held, they were constants of it."""
    # Whoever compiles it gives the compiler's options: they are for the whole.
    return inspect.unwrap(step_lib.train_step)(
        state, *trees, batch, hyper, key,
        model=self.model.config, settings=self.settings)

  def hypers(self, rates, number: int) -> optim_lib.Hyper:
    """The values of step `number` at each peak rate, stacked."""
    steps = self.config["train"]["steps"]
    found = []
    for rate in rates:
      config = dataclasses.replace(self.optim, learning_rate=rate)
      found.append(optim_lib.hyper(
          config, float(optim_lib.learning_rates(config, steps)[number])))
    return jax.tree.map(lambda *x: np.stack(x), *found)

  def train(self, rates):
    """(stacked params, losses `[steps, rates]`) of all rates at once."""
    many = jax.jit(
        jax.vmap(self.step, in_axes=(0, None, None, 0, None)), donate_argnums=0,
        compiler_options=compiler_options())
    state = jax.tree.map(
        lambda x: jnp.stack([x] * len(rates)), self.state())
    losses = []
    for number in range(self.config["train"]["steps"]):
      batch = jax.tree.map(jnp.asarray, self.batches.batch(number))
      state, metrics = many(
          state, self.trees, batch, self.hypers(rates, number), self.key)
      losses.append(metrics["loss"])
    return state.params, np.asarray(jax.device_get(losses))

  def held_out(self, params, rows):
    model = dataclasses.replace(
        self.model, adapters=adapters_lib.join(params, self.frozen))
    return model.evaluate(rows, batch_size=32)

  def timing(self, repeats: int = 10) -> dict[str, Any]:
    """Median seconds of a step of one adapter, and what it needs."""
    state, hyper = self.state(), optim_lib.hyper(self.optim, 1e-4)
    batch = jax.tree.map(jnp.asarray, self.batches.batch(0))
    start = time.perf_counter()
    compiled = jax.jit(
        self.step, donate_argnums=0, compiler_options=compiler_options()
    ).lower(state, self.trees, batch, hyper, self.key).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for number in range(repeats + 3):
      start = time.perf_counter()
      state, metrics = compiled(
          state, self.trees, batch, hyper, self.key)
      jax.block_until_ready((state, metrics))
      if number >= 3:
        seconds.append(time.perf_counter() - start)
    analysis: Any = compiled.memory_analysis()
    real = int((np.asarray(batch.tokens) >= 0).sum())
    median = std_statistics.median(seconds)
    return {
        "step_seconds": median, "tokens_per_second": real / median,
        "step_bytes": (analysis.argument_size_in_bytes
                       + analysis.temp_size_in_bytes),
        "compile_seconds": compile_seconds,
        "timed_with": os.environ.get("XLA_FLAGS", ""),
        "timed_commit": workdir_lib.git_commit()}


@functools.cache
def compiler_options() -> dict[str, Any] | None:
  gpu = jax.devices()[0].platform == "gpu"
  return dict(step_lib.COMPILER_OPTIONS) if gpu else None


def run(shop: Lab, name: str, config: dict[str, Any]) -> dict[str, Any]:
  """Trains a method at every rate, and says what came of it."""
  trial = Trial(shop, config)
  start = time.perf_counter()
  params, losses = trial.train(RATES)
  seconds = time.perf_counter() - start
  members = [jax.tree.map(lambda x, i=i: x[i], params)
             for i in range(len(RATES))]
  chosen = [trial.held_out(m, shop.chosen_on).loss for m in members]
  best = int(np.nanargmin(chosen))
  before = trial.held_out(trial.params, shop.reported_on)
  after = trial.held_out(members[best], shop.reported_on)
  return {
      "method": name, "rates": RATES, "chosen_on": chosen,
      "train_loss": losses[-10:].mean(0).tolist(), "rate": RATES[best],
      "start_loss": before.loss, "loss": after.loss,
      "rows": {"nll": after.nll.tolist(), "weight": after.weight.tolist()},
      "parameters": adapters_lib.trainable_size(
          trial.model.adapters),
      "train_seconds": seconds, "config": config,
      "environment": workdir_lib.environment(config["seed"]) | {
          "command": [
              "python", "-m", "experiments.compare", *sys.argv[1:]]}}


def main() -> None:
  values = flags.FLAGS
  folder = pathlib.Path(values.output)
  folder.mkdir(parents=True, exist_ok=True)
  changes = dict(part.split("=", 1) for part in values.set.split(",") if part)
  names = (blocks.names(values.methods) if values.methods != "all" else
           sorted(p.stem for p in pathlib.Path(
               common.__file__).parent.glob("methods/[a-z]*.py")))
  mine, of = map(int, values.part.split("/"))
  shop = None
  for name in names[mine::of]:
    path = folder / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if ("step_seconds" in known) if values.time else ("loss" in known):
      continue
    config = config_of(name, changes)
    shop = shop or lab(config)
    try:
      found = known | (Trial(shop, config).timing() if values.time
                       else run(shop, name, config))
    except Exception as error:  # One method's fault is not the others'.
      print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
      continue
    workdir_lib.write_json(path, found)
    print(name, {k: found[k] for k in (
        "loss", "rate", "tokens_per_second") if k in found}, flush=True)
  compare_table.write(folder)


if __name__ == "__main__":
  flags.DEFINE_string("output", "docs/results/methods", "Where results go.")
  flags.DEFINE_string("methods", "all", "Names with commas, or all.")
  flags.DEFINE_string("part", "0/1", "Which share of the methods: k/n.")
  flags.DEFINE_string("set", "", "block.field=value,... for all methods.")
  flags.DEFINE_bool("time", False, "Time steps instead of training.")
  cli.run(main)
