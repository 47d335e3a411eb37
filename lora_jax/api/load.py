"""From a path to a `Model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant as quant_lib
from lora_jax.api import model as model_lib
from lora_jax.data import tokenizer as tokenizer_lib
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import base_cache
from lora_jax.models import load as load_lib
from lora_jax.models import resize
from lora_jax.models import scratch as scratch_lib
from lora_jax.models import sharding
from lora_jax.models import size
from lora_jax.train import footprint
from lora_jax.train import memory as memory_lib
from lora_jax.train import precision as precision_lib


def load(
    path: str, *,
    quant: str | quant_lib.QuantSpec | None = None,
    dtype: str = "float32",
    base_dtype: str = "auto",
    skip: Sequence[str] = load_lib.SKIP,
    chat_template: str | None = None,
    mesh: mesh_lib.MeshConfig | None = None,
    attention: str = "auto",
    cache: bool = True,
    add_tokens: Sequence[str] = (),
    pad_vocab_multiple: int = 1,
    offload: Sequence[str] = (),
    memory: memory_lib.MemoryConfig | None = None,
    scratch: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> model_lib.Model:
  """Loads a model and its tokenizer.

  Args:
    path: a Hugging Face folder, a `.gguf` file, or a hub name.
    quant: a format's name, or a whole spec; None leaves the checkpoint as it
      is. One that comes quantised keeps its own codes; "none" dequantises.
    dtype: compute type, one of `precision.COMPUTE`.
    base_dtype: of what is not quantised; "auto" is `dtype`.
    skip: targets that are not quantised.
    chat_template: Jinja text, if the tokenizer's own is not wanted.
    mesh: how to spread over devices; all of them by default.
    attention: what computes attention; `auto` takes the fastest that can.
    cache: whether the converted base is taken from, and kept in, the cache
      folder; see `models.base_cache`.
    add_tokens: special tokens to add, e.g. those of a chat template.
    pad_vocab_multiple: see `models.resize.grow`.
    offload: keys of `host_lib.KINDS`, what is kept in host memory.
    memory: of training to come; a base too large for it goes to host memory.
    scratch: for pretraining: fresh random weights in place of the
      checkpoint's, in its architecture with these fields changed; see
      `models.scratch`. Nothing of them is cached.
    seed: of these weights.

  Raises:
    errors.UserError: see `models.load.load`, `models.scratch.changed`; if the
      tokenizer has more tokens than a fresh model.
  """
  stored = precision_lib.base_dtype(dtype, base_dtype)
  errors.choose("compute.attention", attention, attention_lib.CHOICES)
  if isinstance(quant, str):
    quant = quant_lib.QuantSpec(format=quant)
  source, drawn = load_lib.open_source(path), None
  if scratch is not None:
    source = drawn = scratch_lib.Scratch(
        scratch_lib.changed(source.config, scratch), seed, source.label)
  devices = mesh_lib.make(mesh or mesh_lib.MeshConfig())
  spread = devices if devices.size > 1 else None
  offload = host_lib.check(offload, jax.local_devices()[0])
  host = "base" in offload or (not offload and footprint.outgrows(
      memory, lambda: size.nbytes(source, quant, stored, skip, spread)))
  root = base_folder() if cache and drawn is None else None
  loaded = base_cache.load(
      source, quant, stored, skip, root=root, mesh=spread, host=host)
  tokenizer = tokenizer_lib.load(source.label, chat_template)
  if drawn is not None and drawn.config.vocab_size < len(tokenizer):
    raise errors.UsageError(
        f"model.scratch: vocab_size={drawn.config.vocab_size} is less than the "
        f"{len(tokenizer)} tokens of {path}'s tokenizer; set it to that, or "
        "more")
  new = tokenizer_lib.add_tokens(tokenizer, add_tokens) if add_tokens else ()
  config, base = resize.grow(
      loaded.config, loaded.base, max(new, default=-1) + 1, pad_vocab_multiple)
  resized = config is not loaded.config
  if resized and spread is not None:
    base = sharding.put(spread, base)
  return model_lib.Model(
      config=config, base=base, tokenizer=tokenizer,
      fingerprint=loaded.fingerprint, source=path, dtype=dtype, mesh=spread,
      attention=attention, new_tokens=tuple(new), resized=resized,
      offload=offload, drawn=drawn)


def base_folder() -> pathlib.Path:
  """Where converted bases are kept: `bases` in the cache folder."""
  from third_party import assets

  return assets.cache_dir() / "bases"
