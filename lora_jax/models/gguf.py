"""GGUF files: config and tensors, under Hugging Face's names.

llama.cpp interleaves the rotated pairs of q and k of Llama and Mistral
(row 2j and 2j + 1 of a head belong together), Hugging Face keeps halves (j
and j + e/2): these rows are put back.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.models import config as config_lib
from lora_jax.models import hf
from lora_jax.models import registry
from lora_jax.models import rope
from lora_jax.models.checkpoints import scheme as scheme_lib
from lora_jax.models.families import in_gguf

# Architectures whose converter permutes the rows of q and k.
PERMUTED = ("llama",)
_FREQUENCIES = "rope_freqs.weight"
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
  """A `.gguf` file, or the first of several that make one model.

  Attributes:
    config: the model's.
    label: what messages call it.
    scheme: None: what it stores in few bits is read as floats.
    tensors: names, as Hugging Face has them, of what it holds, and where.
    files: the file, or all its parts.
  """

  scheme: scheme_lib.Scheme | None = None

  def __init__(self, path: pathlib.Path):
    """Reads the metadata.

    Raises:
      errors.UserError: if a file is missing, not GGUF, cut short, or of an
        architecture or a RoPE scaling that is not supported.
    """
    import gguf

    self.label = str(path)
    readers = {part: _reader(part) for part in parts(path)}
    self.files = list(readers)
    first = next(iter(readers.values()))
    fields = {name: f.contents() for name, f in first.fields.items()
              if "tokenizer.ggml.tokens" not in name}
    count = int(fields.get("split.count", 1))
    if count not in (0, 1, len(readers)):
      raise errors.UserError(
          f"{path} is one of {count} files, and {len(readers)} have its name; "
          "give the first, named as it came (...-00001-of-"
          f"{count:05d}.gguf), with the others beside it")
    stored = {tensor.name: (part, tensor) for part, reader in readers.items()
              for tensor in reader.tensors}
    arch = str(fields.get("general.architecture"))
    named = {name: tensor for name, (_, tensor) in stored.items()}
    hf_config = _config(arch, fields, named, self.label)
    # Without those that belong to the config.
    stored = {name: stored[name] for name in named}
    if _FREQUENCIES in stored:
      hf_config["rope_scaling"] = rope_scaling(
          _values(*stored.pop(_FREQUENCIES)), hf_config)
    self.config = registry.from_hf(hf_config, self.label)
    self._permuted = arch in PERMUTED
    self._raised = arch in in_gguf.GEMMA
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
    path, tensor = self.tensors[name]
    kind = tensor.tensor_type
    raw = _raw(path, tensor)
    try:
      array = _values(path, tensor, raw)
    except NotImplementedError:
      raise errors.UserError(
          f"{self.label}: {name} is of type {kind.name}, which the gguf "
          "package cannot dequantise; give a Q4_0 to Q8_0, K-quant, F16 or "
          "F32 file") from None
    if self._raised and name.endswith("norm.weight"):
      array = array - np.float32(1)
    if self._permuted and ".self_attn.q_proj." in name:
      array = unpermute(array, self.config.n_heads)
    if self._permuted and ".self_attn.k_proj." in name:
      array = unpermute(array, self.config.n_kv_heads)
    return hf.Tensor(kind.name, raw, array)


def parts(path: pathlib.Path) -> list[pathlib.Path]:
  """The files that make one model, from any of them.

    "m-00002-of-00003.gguf" -> m-00001-of-00003.gguf to m-00003-of-00003.gguf

  Raises:
    errors.UserError: if one is missing.
  """
  found = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
  if not found:
    return [path]
  names = [f"{found[1]}-{i:05d}-of-{found[2]}.gguf"
           for i in range(1, int(found[2]) + 1)]
  for name in names:
    if not (path.parent / name).exists():
      raise errors.UserError(
          f"{path.parent / name} is missing, a part of the same model as "
          f"{path.name}; download it too")
  return [path.parent / name for name in names]


def _reader(path: pathlib.Path) -> Any:
  import gguf

  try:
    return gguf.GGUFReader(path)
  except (OSError, ValueError, IndexError, KeyError) as error:
    raise errors.UserError(
        f"{path} is not a GGUF file, or is cut short ({error}); download "
        "it again") from None


def _raw(path: pathlib.Path, tensor: Any) -> np.ndarray:
  # Read, not mapped: mapped pages would stay resident.
  return np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)


def _values(
    path: pathlib.Path, tensor: Any, raw: np.ndarray | None = None
) -> np.ndarray:
  import gguf

  raw = _raw(path, tensor) if raw is None else raw
  data = raw.view(tensor.data.dtype).reshape(tensor.data.shape)
  return gguf.dequantize(data, tensor.tensor_type)


def rope_scaling(
    factors: np.ndarray, hf_config: dict[str, Any]
) -> dict[str, Any]:
  """What the divisors of RoPE's frequencies mean, in Hugging Face's words.

  llama.cpp stores Llama 3's scaling as one divisor a frequency and drops the
  numbers it came from. All of Meta's models have a band of 1 to 4 turns in
  8,192 tokens, and the largest divisor is the factor: where these give the
  stored divisors again, they are it. Others are kept one by one, as LongRoPE
  without a switch.

  Args:
    factors: float32 `[e/2]`.
    hf_config: names head size, theta and context length.
  """
  theta = hf_config.get("rope_theta", 10000.0)
  size = 2 * len(factors)
  llama3 = config_lib.RopeConfig(
      type="llama3", theta=theta, factor=float(factors.max()),
      low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
  plain = config_lib.RopeConfig(theta=theta)
  expected = rope.default(plain, size)[0] / rope.llama3(llama3, size)[0]
  if (factors == 1).all():
    return {"rope_type": "default"}
  # The stored ones were computed in another order.
  if np.allclose(factors, expected, rtol=1e-5, atol=0):
    return llama3.to_hf()
  listed = [float(f) for f in factors]
  return {"rope_type": "longrope", "short_factor": listed,
          "long_factor": listed, "factor": 1.0, "attention_factor": 1.0,
          "original_max_position_embeddings": hf_config.get(
              "max_position_embeddings", 2048)}


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
  # A file that says nothing of a window has none, unless it is Gemma's.
  window = fields.get(f"{arch}.attention.sliding_window")
  if window is not None or arch not in in_gguf.GEMMA:
    config["sliding_window"] = window
  config["tie_word_embeddings"] = "output.weight" not in stored
  config["attention_bias"] = "blk.0.attn_q.bias" in stored
  config["mlp_bias"] = "blk.0.ffn_up.bias" in stored
  for token in ("bos", "eos"):
    config[f"{token}_token_id"] = fields.get(
        f"tokenizer.ggml.{token}_token_id")
  config |= in_gguf.config(arch, fields, stored)
  if arch == "llama" and window:  # Mistral is converted as a Llama.
    config["model_type"] = "mistral"
  return config
