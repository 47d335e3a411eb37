"""Tokens a second of a 7B model in NF4, on one GPU.

  python -m tests.evaluate.decode_gpu

First greedy tokens of a small model against whole passes without a cache,
then Llama-2-7B's geometry with random weights and LoRA of rank 16 beside
them: 128 tokens read, 128 drawn, at 1 and at 32 rows. Then the same in
transformers with bitsandbytes, if they are there. One JSON object a line;
what fails is one line, and the rest goes on. Not collected by pytest, whose
machines have no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import time

# What PyTorch takes afterwards must not be taken.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax.evaluate import decoding
from lora_jax.evaluate import generate
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import init
from tests import tiny

READ = NEW = 128
ROWS = (1, 32)
MODEL = config_lib.ModelConfig(
    family="llama", vocab_size=32000, d_model=4096, d_ff=11008, n_layers=32,
    n_heads=32, n_kv_heads=32, head_dim=128, max_position=4096)
SMALL = dataclasses.replace(
    MODEL, vocab_size=512, d_model=256, d_ff=704, n_layers=3, n_heads=4,
    n_kv_heads=2, head_dim=64)
CARD = 2.87e12  # Bytes a second that a copy on an H100 reads and writes.


def show(**row) -> None:
  print(json.dumps(row), flush=True)


def attempt(name: str, run: Callable[[], None]) -> None:
  """One line for what fails."""
  try:
    run()
  except Exception as e:
    show(what=name, failed=f"{type(e).__name__}: {e}"[:300])


def build(model, dtype):
  """(base, adapters): one layer is quantised, and repeated."""
  one = dataclasses.replace(model, n_layers=1)

  @jax.jit
  def draw(key):
    base = init.random_base(key, one, dtype)
    spec = quant.QuantSpec("nf4")
    layers = {
        name: x.replace(weight=quant.quantize(x.weight, spec))
        if isinstance(x, decoder.Linear) else x
        for name, x in base.layers.items()}
    return base.replace(layers=jax.tree.map(
        lambda x: jnp.repeat(x, model.n_layers, axis=0), layers))

  base = draw(jax.random.key(0))
  return base, tiny.random_adapters(
      model, base, adapters_lib.AdapterConfig(rank=16), scale=0.01)


def check() -> None:
  """Greedy tokens of the cached loop against whole passes, in float32."""
  base, adapters = build(SMALL, jnp.float32)
  prompts = [list(range(3, 20)), [7, 8, 9]]
  length = 128

  @jax.jit
  def logits(tokens, n):
    positions = jnp.arange(length)[None]
    out = tiny.logits(SMALL, base, tokens, positions,
                      (positions < n).astype(jnp.int32), adapters)
    return out[0, n - 1]

  with jax.default_matmul_precision("highest"):
    got = generate.generate(
        SMALL, base, adapters, prompts, max_new_tokens=100)
    wrong = 0
    for prompt, row in zip(prompts, got, strict=True):
      whole = prompt + row
      tokens = np.zeros((1, length), np.int32)
      tokens[0, :len(whole)] = whole
      for n in range(len(prompt), len(whole)):
        found = np.asarray(logits(tokens, n))
        wrong += bool(found.max() - found[whole[n]] > 1e-4)
  show(what="greedy tokens that whole passes would not draw", wrong=wrong,
       of=sum(map(len, got)))


def median_seconds(run: Callable[[], object], times: int = 3) -> float:
  run()
  found = []
  for _ in range(times):
    start = time.perf_counter()
    run()
    found.append(time.perf_counter() - start)
  return sorted(found)[times // 2]


def ours() -> None:
  base, adapters = build(MODEL, jnp.bfloat16)
  packed = trees.nbytes([x.weight.codes for x in base.layers.values()
                         if isinstance(x, decoder.Linear)])
  start = time.perf_counter()
  base, adapters = jax.block_until_ready(
      decoding.prepared(base, adapters, "bfloat16"))
  show(what="prepared", seconds=round(time.perf_counter() - start, 2),
       packed_gb=round(packed / 1e9, 2))

  def call(rows, new, **options):
    prompts = np.random.default_rng(0).integers(
        3, MODEL.vocab_size, (rows, READ))
    out = generate.generate(
        MODEL, base, adapters, prompts.tolist(), max_new_tokens=new,
        dtype="bfloat16", **options)
    assert [len(r) for r in out] == [new] * rows

  def timed(rows, name, **options):
    start = time.perf_counter()
    call(rows, NEW, **options)
    compiled = time.perf_counter() - start
    first = median_seconds(lambda: call(rows, 1, **options))
    total = median_seconds(lambda: call(rows, NEW, **options))
    each = (total - first) / (NEW - 1)
    show(what=name, rows=rows, tokens_per_s=round(rows * NEW / total, 1),
         ms_a_step=round(1e3 * each, 3), ms_of_first=round(1e3 * first, 1),
         packed_gb_per_s=round(packed / each / 1e9),
         share_of_copy=round(packed / each / CARD, 3),
         first_call_s=round(compiled, 1))

  for rows in ROWS:
    attempt("lora_jax", functools.partial(timed, rows, "lora_jax"))
  attempt("streamed", lambda: timed(
      1, "lora_jax, streamed", on_token=lambda *_: None))


def products() -> None:
  """The two ways to multiply a cache, over a stack of layers."""
  l, b, e, s = 8, 32, 128, 512
  for k in (32, 8):
    def one(product, k=k):
      keys = jax.random.split(jax.random.key(0), 3)
      q, new = (jax.random.normal(x, (b, 1, n, e)).astype(jnp.bfloat16)
                for x, n in zip(keys, (32, k)))
      stacks = jax.random.normal(
          keys[2], (2, l, b, k, s, e), jnp.bfloat16)
      ones = jnp.ones((b, s), jnp.int32)
      at = jnp.full((b, 1), s)

      @jax.jit
      def run(q, new, keys, values):
        def body(q, cached):
          out = attention_lib.cached_attention(
              q, new, new, cached, at,
              jnp.broadcast_to(jnp.arange(s), (b, s)), ones[:, :1], ones,
              product=product)
          return out, None
        return jax.lax.scan(body, q, (keys, values))[0]

      took = median_seconds(
          lambda: jax.block_until_ready(run(q, new, *stacks)), 7)
      show(what=f"attention, {product}", kv_heads=k, out=float(
          run(q, new, *stacks).astype(jnp.float32).std()),
          us_a_layer=round(1e6 * took / l, 1))

    for product in ("dot", "sum"):
      attempt(f"attention, {product}", functools.partial(one, product))


def theirs() -> None:
  """transformers and bitsandbytes, each linear drawn and quantised in place;
  without adapters, which only cost time."""
  import bitsandbytes as bnb
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  config = transformers.LlamaConfig(
      vocab_size=MODEL.vocab_size, hidden_size=MODEL.d_model,
      intermediate_size=MODEL.d_ff, num_hidden_layers=MODEL.n_layers,
      num_attention_heads=MODEL.n_heads,
      num_key_value_heads=MODEL.n_kv_heads, head_dim=MODEL.head_dim,
      max_position_embeddings=MODEL.max_position, eos_token_id=None,
      pad_token_id=0, dtype="bfloat16")
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.bfloat16)

  def draw(*shape):
    return torch.empty(
        shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)

  for name, module in list(model.named_modules()):
    if type(module) is torch.nn.Linear and name != "lm_head":
      with torch.device("meta"):
        new = bnb.nn.Linear4bit(
            module.in_features, module.out_features, False,
            compute_dtype=torch.bfloat16, compress_statistics=True,
            quant_type="nf4")
      weight = bnb.nn.Params4bit(
          draw(module.out_features, module.in_features), requires_grad=False,
          quant_type="nf4", compress_statistics=True, blocksize=64, module=new)
      new.weight = (weight if weight.bnb_quantized
                    else weight._quantize(torch.device(device)))
      model.set_submodule(name, new)
  for module in model.modules():
    for name, p in list(module.named_parameters(recurse=False)):
      if p.is_meta:
        value = draw(*p.shape) if p.ndim > 1 else torch.ones(
            p.shape, dtype=torch.bfloat16, device=device)
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
  model.model.rotary_emb = type(model.model.rotary_emb)(
      config=config).to(device)
  model.eval()
  # A step takes tens of milliseconds: fewer tell as much.
  new = 32
  for rows in ROWS:
    ids = torch.randint(3, MODEL.vocab_size, (rows, READ), device=device)

    def call(n, ids=ids):
      with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
            min_new_tokens=n, do_sample=False, use_cache=True)
      if device == "cuda":
        torch.cuda.synchronize()

    first, total = median_seconds(lambda: call(1)), median_seconds(
        lambda: call(new))
    each = (total - first) / (new - 1)
    show(what="transformers + bitsandbytes", rows=rows, drawn=new,
         ms_a_step=round(1e3 * each, 2), ms_of_first=round(1e3 * first, 1),
         steps_as_tokens_per_s=round(rows / each, 1))


def main() -> None:
  show(device=jax.devices()[0].device_kind, jax=jax.__version__)
  for name, run in (("check", check), ("lora_jax", ours),
                    ("transformers + bitsandbytes", theirs),
                    ("attention", products)):
    start = time.perf_counter()
    attempt(name, run)
    show(part=name, seconds=round(time.perf_counter() - start, 1))


if __name__ == "__main__":
  main()
