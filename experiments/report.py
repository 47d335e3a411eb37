"""What is left of a run: summary.json, samples.md, loss.png."""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
import resource
import statistics as std_statistics
import sys
from typing import Any

import jax
import numpy as np

from experiments import advice
from experiments import finder
from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import quant
from lora_jax import trees
from lora_jax.evaluate import statistics
from lora_jax.models import hf
from lora_jax.train import loop
from lora_jax.train import workdir


def peak_host_bytes() -> int:
  """Peak resident memory of this process."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
  """Peak memory of the first device; None where it is not counted (CPU)."""
  return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _rows(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  value = json.loads((folder / "evals" / f"{step}.json").read_text())
  return {k: np.asarray(v) for k, v in value.items()}


def summary(
    model: api.Model, outcome: loop.Outcome, folder: pathlib.Path
) -> dict[str, Any]:
  """The result of a run; losses in nats a token, memory in bytes."""
  progress = outcome.progress
  lines = workdir.read_metrics(folder / "metrics.jsonl")
  speeds = [x["tokens_per_s"] for x in lines if "tokens_per_s" in x]
  trained = adapters_lib.trainable_size(model.adapters)
  total = sum(int(np.prod(s)) for s in hf.names(model.config).values())
  evals = [x for x in lines if "eval_loss" in x]
  found: dict[str, Any] = {
      "steps": progress.step,
      "stopped_early": outcome.stopped_early,
      "tokens": progress.tokens,
      "tokens_per_s": (
          round(std_statistics.median(speeds), 1) if speeds else None),
  }
  if evals:
    last = evals[-1]["step"]
    before, after = _rows(folder, 0), _rows(folder, last)
    change = statistics.paired_difference(
        before["nll"], after["nll"], before["weight"])
    found |= {
        "initial_eval_loss": evals[0]["eval_loss"],
        "final_eval_loss": evals[-1]["eval_loss"],
        "eval_loss_change": change.mean,
        "eval_loss_change_95": [change.low, change.high],
        "eval_rows": int(before["nll"].size),
        "perplexity": evals[-1]["perplexity"],
        "best_step": progress.best_step,
        "best_eval_loss": progress.best_loss,
    } | _advice(lines, workdir.read_json(folder / "config.json"))
  if model.parts:
    found["trainable_by_part"] = adapters_lib.several.sizes(
        model.adapters, list(model.parts))
  bits = quant.bits_per_parameter(model.base)
  return found | {
      "trainable_parameters": trained,
      "total_parameters": total,
      "bits_per_parameter": None if np.isnan(bits) else bits,
      "base_bytes": trees.nbytes(model.base),
      "base_fingerprint": model.fingerprint,
      "wall_seconds": round(progress.seconds, 1),
      "compile_seconds": round(outcome.compile_seconds, 1),
      "compiles": outcome.compiles,
      "peak_host_bytes": peak_host_bytes(),
      "peak_device_bytes": peak_device_bytes(),
      # Predicted; None where nothing was asked.
      "step_device_bytes": outcome.plan and outcome.plan.need,
  }


def _advice(lines, config):
  if config and config["optim"]["schedule"] == "range":
    return finder.advice(lines)
  return advice.advice(lines, config)


def samples(
    prompts: Sequence[tuple[str, str]], texts: dict[str, list[str]]
) -> str:
  """Markdown: every prompt, its reference, and the answers by step."""
  parts = ["# Samples\n"]
  for i, (prompt, reference) in enumerate(prompts):
    parts.append(f"## {i + 1}\n\n{_quote(prompt)}\n\n"
                 f"**Reference**\n\n{_quote(reference)}\n")
    for step, answers in sorted(texts.items(), key=lambda x: int(x[0])):
      when = "Before training" if step == "0" else f"After {step} steps"
      parts.append(f"**{when}**\n\n{_quote(answers[i])}\n")
  return "\n".join(parts)


def _quote(text: str) -> str:
  return "\n".join(f"> {line}".rstrip() for line in text.strip().split("\n"))


def plot(folder: pathlib.Path) -> None:
  """Draws `loss.png` from `metrics.jsonl`."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  lines = workdir.read_metrics(folder / "metrics.jsonl")
  train = [(x["step"], x["loss"]) for x in lines if "loss" in x]
  held_out = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]
  figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
  if train:
    axes.plot(*zip(*train), color="0.6", linewidth=1, label="training batch")
  if held_out:
    axes.plot(*zip(*held_out), "o-", color="C0", label="held out")
    for step, value in held_out:
      axes.annotate(f"{value:.3f}", (step, value), xytext=(0, 6),
                    textcoords="offset points", ha="center", color="C0")
  axes.set(xlabel="step", ylabel="loss (nats a token)")
  axes.grid(alpha=0.3)
  if train or held_out:
    axes.legend()
  temporary = folder / "loss.tmp.png"
  figure.savefig(temporary, dpi=120)
  plt.close(figure)
  temporary.replace(folder / "loss.png")
