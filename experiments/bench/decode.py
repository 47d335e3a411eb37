"""Text a second: greedy, adapters beside the base.

A request of n new tokens takes the time of its prompt and first token, which
a request of one token takes alone, and n - 1 times that of a token. Both are
measured, whatever the loop between them looks like.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import statistics
import time
from typing import Any

import numpy as np

from experiments.bench import built as built_lib
from experiments.bench import lines
from experiments.bench import settings as settings_lib
from lora_jax import errors
from lora_jax import trees
from lora_jax.evaluate import generate
from lora_jax.kernels import attention as attention_lib


def weight_bytes(model: built_lib.Built) -> int:
  """Bytes of the base that every token reads: layers, last norm, head.

  The embeddings are looked up; they count if the head is tied to them.
  """
  base = model.base
  head = base.embed_tokens if base.lm_head is None else base.lm_head
  return trees.nbytes((base.layers, base.norm, head))


def row(
    b: int, new: int, first: list[float], whole: list[float], size: int
) -> lines.Line:
  """Rates from the times of requests.

  Args:
    b: rows.
    new: tokens of a whole request.
    first: seconds of requests of one token.
    whole: seconds of whole requests.
    size: bytes read for a token.

  Raises:
    errors.UserError: if tokens take no measurable time.
  """
  prefill, total = statistics.median(first), statistics.median(whole)
  token = (total - prefill) / (new - 1)
  if token <= 0:
    raise errors.UserError(
        f"{new} tokens took no longer than one; raise decode.new")
  return {
      "prefill_s": prefill, "token_s": token,
      "request_s": total, "request_s_min": min(whole),
      "request_s_max": max(whole), "n": len(whole),
      "tokens_per_s": b / token, "request_tokens_per_s": b * new / total,
      "weight_bytes": size, "gb_per_s": size / token / 1e9}


def run(config: Mapping[str, Any], emit: lines.Emit) -> None:
  """Emits a line for each number of rows."""
  decode = config["decode"]
  batches = settings_lib.numbers("decode.batches", decode["batches"])
  model = built_lib.build(config)
  rng = np.random.default_rng(config["seed"])

  def request(prompts, new):
    start = time.perf_counter()
    found = generate.generate(
        model.model, model.base, model.adapters, prompts, max_new_tokens=new,
        dtype=config["compute"]["dtype"],
        attention=attention_lib.Options(config["compute"]["attention"]))
    seconds = time.perf_counter() - start
    if any(len(tokens) != new for tokens in found):
      raise RuntimeError(f"{[len(t) for t in found]} tokens, not {new}")
    return seconds

  def measure(b):
    prompts = rng.integers(
        0, model.model.vocab_size, (b, decode["prompt"])).tolist()
    warm = request(prompts, decode["new"])
    request(prompts, 1)
    first, whole = [], []
    for _ in range(decode["repeats"]):
      first.append(request(prompts, 1))
      whole.append(request(prompts, decode["new"]))
    return {"first_request_s": warm} | row(
        b, decode["new"], first, whole, weight_bytes(model))

  for b in batches:
    case = {"part": "decode", "name": "greedy", **model.case, "batch": b,
            "prompt": decode["prompt"], "new": decode["new"]}
    lines.attempt(emit, case, functools.partial(measure, b))
