"""What llama.cpp's files say of Gemma and Phi-3, in Hugging Face's words.

Gemma's norms are stored as 1 + weight; the scale of its attention is not
stored: llama.cpp knows the one size that has another by its layer count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

MODEL_TYPES = {"gemma3": "gemma3_text"}
# Architectures whose norms have 1 added, and the layer count of their 27B
# models, which divide scores by sqrt(d / h) in place of sqrt(e).
GEMMA = {"gemma2": 46, "gemma3": 62}
FACTORS = {"short_factor": "rope_factors_short.weight",
           "long_factor": "rope_factors_long.weight"}


def config(
    arch: str, fields: Mapping[str, Any], stored: dict[str, Any]
) -> dict[str, Any]:
  """Keys of a `config.json` that these architectures have besides the rest.

  Args:
    arch: `general.architecture`.
    fields: the file's metadata.
    stored: its tensors by name; those that belong to the config are removed.

  Returns:
    The keys, some of which replace the general ones.
  """
  found: dict[str, Any] = {"model_type": MODEL_TYPES.get(arch, arch)}

  def take(**keys: str):
    found.update({name: fields[f"{arch}.{key}"] for name, key in keys.items()
                  if f"{arch}.{key}" in fields})

  if arch in GEMMA:
    take(attn_logit_softcapping="attn_logit_softcapping",
         final_logit_softcapping="final_logit_softcapping",
         rope_local_base_freq="rope.freq_base_swa")
    d, h = (fields[f"{arch}.{key}"] for key in (
        "embedding_length", "attention.head_count"))
    large = fields[f"{arch}.block_count"] == GEMMA[arch]
    found["query_pre_attn_scalar"] = (
        d // h if large else fields[f"{arch}.attention.key_length"])
  if arch == "phi3":
    found |= _phi3(arch, fields, stored)
  return found


def _phi3(arch, fields, stored) -> dict[str, Any]:
  head_dim = (fields[f"{arch}.embedding_length"]
              // fields[f"{arch}.attention.head_count"])
  turned = fields.get(f"{arch}.rope.dimension_count", head_dim)
  found: dict[str, Any] = {"partial_rotary_factor": turned / head_dim}
  if not set(FACTORS.values()) & set(stored):
    return found
  scaling: dict[str, Any] = {"rope_type": "longrope"}
  for name, tensor in FACTORS.items():
    if tensor in stored:
      scaling[name] = np.asarray(
          stored.pop(tensor).data, np.float32).reshape(-1).tolist()
  factor = fields.get(f"{arch}.rope.scaling.attn_factor")
  if factor is not None:
    scaling["attention_factor"] = factor
  original = fields.get(f"{arch}.rope.scaling.original_context_length")
  if original is not None:
    found["original_max_position_embeddings"] = original
  return found | {"rope_scaling": scaling}
