"""GGUF files: config and tensors, under Hugging Face's names.

llama.cpp interleaves the rotated pairs of q and k of Llama and Mistral
(row 2j and 2j + 1 of a head belong together), Hugging Face keeps halves (j
and j + e/2): these rows are put back.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.models import hf
from lora_jax.models import registry

# Architectures whose converter permutes the rows of q and k.
PERMUTED = ("llama",)
_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}


class File:
  """A `.gguf` file.

  Attributes:
    config: the model's.
    label: what messages call it.
    scheme: None: what it stores in few bits is read as floats.
    tensors: names, as Hugging Face has them, of what it holds.
  """

  scheme = None

  def __init__(self, path: pathlib.Path):
    """Reads the metadata.

    Raises:
      errors.UserError: if the file is not GGUF, cut short, or of an
        architecture or a RoPE scaling that is not supported.
    """
    import gguf

    self.label = str(path)
    try:
      reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
      raise errors.UserError(
          f"{path} is not a GGUF file, or is cut short ({error}); download "
          "it again") from None
    fields = {name: f.contents() for name, f in reader.fields.items()
              if "tokenizer.ggml.tokens" not in name}
    stored = {t.name: t for t in reader.tensors}
    arch = str(fields.get("general.architecture"))
    hf_config = _config(arch, fields, stored, self.label)
    self.config = registry.from_hf(hf_config, self.label)
    self._permuted = arch in PERMUTED
    name_map = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[arch.upper()], self.config.n_layers)
    self.tensors = {}
    for name in hf.names(self.config):
      theirs = name_map.get_type_and_name(
          name, try_suffixes=(".weight", ".bias"))
      if theirs is not None and theirs[1] in stored:
        self.tensors[name] = stored.pop(theirs[1])
    self.tensors |= stored  # What no name was found for; `load` refuses it.

  def read(self, name: str) -> hf.Tensor:
    """One tensor, dequantised to float32.

    Raises:
      errors.UserError: if its type cannot be dequantised.
    """
    import gguf

    tensor = self.tensors[name]
    kind = tensor.tensor_type
    # Read, not mapped: mapped pages would stay resident.
    raw = np.fromfile(
        self.label, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
    data = raw.view(tensor.data.dtype).reshape(tensor.data.shape)
    try:
      array = gguf.dequantize(data, kind)
    except NotImplementedError:
      raise errors.UserError(
          f"{self.label}: {name} is of type {kind.name}, which the gguf "
          "package cannot dequantise; give a Q4_0 to Q8_0, K-quant, F16 or "
          "F32 file") from None
    if self._permuted and ".self_attn.q_proj." in name:
      array = unpermute(array, self.config.n_heads)
    if self._permuted and ".self_attn.k_proj." in name:
      array = unpermute(array, self.config.n_kv_heads)
    return hf.Tensor(kind.name, raw, array)


def unpermute(rows: np.ndarray, n_heads: int) -> np.ndarray:
  """llama.cpp's rows (j, half) of each head -> Hugging Face's (half, j).

  Args:
    rows: `[n_heads * e, ...]`.
    n_heads: h for q, k for k.

  Returns:
    The same shape.
  """
  pairs = rows.reshape(n_heads, -1, 2, *rows.shape[1:])
  return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _config(
    arch: str, fields: dict[str, Any], stored: dict[str, Any], label: str
) -> dict[str, Any]:
  """The metadata in the words of a Hugging Face `config.json`."""
  if arch not in registry.FAMILIES:
    raise errors.UserError(
        f'{label}: general.architecture="{arch}" is unsupported; supported: '
        f"{', '.join(registry.FAMILIES)}")
  if "rope_freqs.weight" in stored:
    raise errors.UserError(
        f"{label}: rope_freqs.weight (Llama 3 RoPE factors) is unsupported in "
        "GGUF; give the safetensors folder of this model")
  config: dict[str, Any] = {
      theirs: fields[f"{arch}.{key}"] for key, theirs in _KEYS.items()
      if f"{arch}.{key}" in fields}
  if "token_embd.weight" in stored:
    config["vocab_size"] = int(stored["token_embd.weight"].shape[1])
  scaling = {
      "rope_type": fields.get(f"{arch}.rope.scaling.type", "none"),
      "factor": fields.get(f"{arch}.rope.scaling.factor"),
      "original_max_position_embeddings": fields.get(
          f"{arch}.rope.scaling.original_context_length")}
  if scaling["rope_type"] != "none":
    config["rope_scaling"] = scaling
  config["model_type"] = arch
  # A file that says nothing of a window has none, whatever the family.
  config["sliding_window"] = fields.get(f"{arch}.attention.sliding_window")
  config["tie_word_embeddings"] = "output.weight" not in stored
  config["attention_bias"] = "blk.0.attn_q.bias" in stored
  config["mlp_bias"] = "blk.0.ffn_up.bias" in stored
  for token in ("bos", "eos"):
    config[f"{token}_token_id"] = fields.get(
        f"tokenizer.ggml.{token}_token_id")
  return config
