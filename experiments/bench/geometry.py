"""Shapes of known models, by name; the weights are random."""

from __future__ import annotations

import ast
from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any

from lora_jax import errors
from lora_jax.models import config as config_lib


def _llama(d, f, layers, heads, kv_heads, vocab, theta=10000.0, context=4096,
           **rest) -> config_lib.ModelConfig:
  values = dict(
      family="llama", vocab_size=vocab, d_model=d, d_ff=f, n_layers=layers,
      n_heads=heads, n_kv_heads=kv_heads, head_dim=d // heads, norm_eps=1e-5,
      rope=config_lib.RopeConfig(theta=theta), max_position=context)
  return config_lib.ModelConfig(**values | rest)


GEOMETRIES: dict[str, config_lib.ModelConfig] = {
    "tiny": _llama(64, 128, 2, 4, 2, 512),
    "smollm2-135m": _llama(
        576, 1536, 30, 9, 3, 49152, 100000.0, 8192, tie_embeddings=True),
    # Of tests/train/gpu_check.py.
    "llama-1b": _llama(2048, 5632, 22, 32, 8, 32000),
    "qwen2.5-1.5b": _llama(
        1536, 8960, 28, 12, 2, 151936, 1e6, 32768, family="qwen2",
        norm_eps=1e-6, qkv_bias=True, tie_embeddings=True),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    # Without Llama 3.1's extension of RoPE.
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 500000.0, 8192),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
}


def geometry(name: str, changes: str = "") -> config_lib.ModelConfig:
  """A row of `GEOMETRIES` with some of its fields changed.

  Args:
    name: a key of the table.
    changes: `"n_layers=4,tie_embeddings=True"`.

  Raises:
    errors.UsageError: for an unknown name or field, or a value that the field
      cannot have.
  """
  row = errors.choose("model.geometry", name, GEOMETRIES)
  return dataclasses.replace(row, **parse(changes))


def chosen(block: Mapping[str, Any]) -> config_lib.ModelConfig:
  """`geometry` of the `model` block of a config."""
  return geometry(block["geometry"], block["changes"])


def parse(changes: str) -> dict[str, Any]:
  """`"n_layers=4"` as `{"n_layers": 4}`; see `geometry`."""
  hints: Mapping[str, Any] = typing.get_type_hints(config_lib.ModelConfig)
  found = {}
  for part in filter(None, (p.strip() for p in changes.split(","))):
    name, _, text = part.partition("=")
    hint = errors.choose("model.changes", name, dict(hints))
    union = typing.get_origin(hint) is types.UnionType
    kinds = typing.get_args(hint) if union else (hint,)
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text
    if type(value) is int and float in kinds and int not in kinds:
      value = float(value)
    if type(value) not in kinds:
      names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
      raise errors.UsageError(
          f"model.changes: {name}={text} is no {names}; write n_layers=4")
    found[name] = value
  return found
