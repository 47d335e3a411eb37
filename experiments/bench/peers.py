"""PyTorch's fine-tuning beside ours: same shapes, method, format, device.

The folder of --peers holds `torch_qlora.py`, which times a step

  torch_qlora.py --impl hf-bnb --model llama2-7b --shapes 4x2048:on,4x2048:off
      --rank 16 --alpha 32 --targets all-linear --warmup 2 --steps 10

of implementations such as unsloth, hf-bnb-liger (transformers, PEFT and
bitsandbytes with Liger's kernels) and hf-bnb, with gradient checkpointing on
or off, and `bnb_kernels.py`, which times kernels. Both print JSON lines; the
first has `step_ms`, `tokens_per_s`, `peak_alloc_gib`, or `error`.
"""

from __future__ import annotations

from collections.abc import Mapping
import os
import pathlib
import sys
from typing import Any

from experiments import blocks
from experiments.bench import flops
from experiments.bench import geometry
from experiments.bench import isolated
from experiments.bench import lines
from experiments.bench import settings as settings_lib
from lora_jax import errors
from lora_jax.adapters import registry

TRAIN, KERNELS = "torch_qlora.py", "bnb_kernels.py"
# Prints whether this Python has torch with a GPU; a process of its own, as
# nothing here depends on torch.
_PROBE = """
import importlib, importlib.util, json
found = importlib.util.find_spec("torch") is not None
gpu = found and importlib.import_module("torch").cuda.is_available()
print(json.dumps({"torch": found, "gpu": gpu}))
"""


def different(config: Mapping[str, Any]) -> str | None:
  """What of a config the peers cannot do alike, or None."""
  adapter, form = config["adapter"], config["quant"]
  wanted = {
      "adapter.method": (adapter["method"], "lora"),
      "adapter.targets": (_targets(config), "all-linear"),
      "adapter.dropout": (adapter["dropout"], 0.0),
      "compute.dtype": (config["compute"]["dtype"], "bfloat16"),
      "quant.format": (form["format"], "nf4"),
      "quant.block_size": (form["block_size"], 64),
      "quant.double": (form["double"], True),
      "train.packed": (config["train"]["packed"], 0),
      "train.accumulation": (config["train"]["accumulation"], 1),
  }
  for name, (value, theirs) in wanted.items():
    if value != theirs:
      return f"{name}={value}, and theirs is {theirs}"
  others = set(geometry.parse(config["model"]["changes"])) - {"n_layers"}
  if others:
    return f"model.changes has {sorted(others)[0]}; theirs can be n_layers"
  return None


def _targets(config: Mapping[str, Any]) -> str:
  return str(registry.targets(blocks.adapter(config)))


def arguments(config: Mapping[str, Any], impl: str) -> list[str]:
  """Flags of `torch_qlora.py` for one implementation."""
  train, adapter = config["train"], config["adapter"]
  policies = set(blocks.names(train["remat"]))
  modes = []
  if policies - {"none"}:
    modes.append("unsloth" if impl == "unsloth" else "on")
  # "named" keeps nearly as much as no checkpointing does.
  if policies & {"none", "named"}:
    modes.append("off")
  shapes = settings_lib.shapes("train.shapes", train["shapes"])
  cases = ",".join(
      f"{b}x{t}:{mode}" for mode in modes for b, t in shapes)
  changes = geometry.parse(config["model"]["changes"])
  return [
      "--impl", impl, "--model", config["model"]["geometry"],
      "--layers", str(changes.get("n_layers", 0)), "--shapes", cases,
      "--rank", str(adapter["rank"]), "--alpha", f"{adapter['alpha']:g}",
      "--targets", _targets(config), "--clip",
      f"{config['optim']['clip_norm']:g}", "--lr",
      f"{config['optim']['learning_rate']:g}", "--warmup",
      str(max(train["warmup"], 4)), "--steps", str(train["steps"])]


def line(config: Mapping[str, Any], found: lines.Line) -> lines.Line | None:
  """A line of `torch_qlora.py` in our words; None for its notes."""
  if "impl" not in found or not ("step_ms" in found or "error" in found):
    return None
  about = {
      "part": "peers", "name": found["impl"],
      "geometry": config["model"]["geometry"],
      "changes": config["model"]["changes"], "method": "lora",
      "rank": config["adapter"]["rank"], "format": "nf4", "double": True,
      "dtype": "bfloat16", "batch": found.get("batch"),
      "length": found.get("seq"), "checkpointing": found.get("gc"),
      "device": found.get("gpu"), "theirs": found}
  if "error" in found:
    return about | {"error": found["error"]}
  model = geometry.chosen(config["model"])
  theirs, ours = found["n_matmul"], flops.matmul_parameters(model)
  if theirs != ours:
    return about | {"error": (
        f"another model goes by this name there: {theirs:,} parameters in "
        f"products, and here {ours:,}")}
  # By our count, so that both stand in one column.
  per_token = flops.train_token(model, [found["seq"]])
  peak = found.get("peak_alloc_gib")
  return about | lines.tidy({
      "step_s": found["step_ms"] / 1e3,
      "step_s_min": found["step_ms_min"] / 1e3,
      "step_s_max": found["step_ms_max"] / 1e3, "n": found["steps"],
      "tokens_per_s": found["tokens_per_s"],
      "model_tflops": found["tokens_per_s"] * per_token / 1e12,
      "peak_bytes": None if peak is None else int(peak * 2**30),
      "loss_first": found["loss_first"], "loss_last": found["loss_last"],
      "finite": found["finite"]})


def run(
    folder: str, config: Mapping[str, Any], emit: lines.Emit) -> None:
  """Emits a line for every case of the peers, or why there is none."""
  block = config["peers"]
  python = block["python"] or sys.executable
  env = {}
  if block["site"]:
    env["PYTHONPATH"] = os.pathsep.join(
        filter(None, [block["site"], os.environ.get("PYTHONPATH", "")]))

  def fail(name, reason):
    emit({"part": "peers", "name": name, "error": reason})

  try:
    ready(folder, python, env)
  except (errors.UserError, isolated.Failed) as error:
    fail("all", str(error))
    return
  script = pathlib.Path(folder)
  difference = different(config)
  if difference:
    fail("train", f"not comparable: {difference}")
  else:
    for impl in blocks.names(block["impls"]):
      argv = [python, str(script / TRAIN), *arguments(config, impl)]
      try:
        for found in isolated.json_lines(argv, config["limit"], env=env):
          ours = line(config, found)
          if ours is not None:
            emit(ours)
      except isolated.Failed as error:
        fail(impl, str(error))
  if not block["kernels"]:
    return
  try:
    argv = [python, str(script / KERNELS)]
    if "unsloth" in blocks.names(block["impls"]):
      argv.append("--unsloth")
    for found in isolated.json_lines(argv, config["limit"], env=env):
      about = {"part": "peers", "name": f"{KERNELS} {found.get('section')}"}
      emit(about | {"theirs": found} | {
          to: found[name] for name, to in (("gb_s", "gb_per_s"),
                                           ("tflops", "tflops"),
                                           ("shape", "shape"),
                                           ("error", "error"))
          if name in found})
  except isolated.Failed as error:
    fail(KERNELS, str(error))


def ready(folder: str, python: str, env: Mapping[str, str]) -> None:
  """Raises if the peers cannot be run.

  Raises:
    errors.UserError: if the folder or torch is not there, or no GPU.
    isolated.Failed: if Python itself fails.
  """
  for name in (TRAIN, KERNELS):
    if not (pathlib.Path(folder) / name).is_file():
      raise errors.UserError(
          f"--peers={folder} has no {name}; give the folder of the scripts")
  try:
    found = next(iter(isolated.json_lines(
        [python, "-c", _PROBE], 120, env=env)), {})
  except OSError as error:
    raise errors.UserError(
        f"peers.python={python}: {error.strerror}; name a Python with torch"
    ) from None
  if not found.get("torch"):
    raise errors.UserError(
        f"{python} has no torch; set peers.python or peers.site")
  if not found.get("gpu"):
    raise errors.UserError("torch finds no CUDA device here")
