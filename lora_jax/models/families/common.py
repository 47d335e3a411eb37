"""Reading a Hugging Face `config.json`, strictly.

What a config asks for and this code lacks is an error: a model that silently
ignores an option trains against the wrong function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax import errors
from lora_jax.models import config as config_lib
from lora_jax.models import rope

# Of a config's names of activations, `layers.ACTIVATIONS`.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu"}


def geometry(
    hf: Mapping[str, Any], source: str, *, n_kv_heads: int | None,
    head_dim: int | None, max_position: int,
) -> dict[str, Any]:
  """The fields of `ModelConfig` that all families read alike.

  Args:
    hf: `config.json`.
    source: its path, for messages.
    n_kv_heads: if the file does not say; None is one a query head.
    head_dim: if the file does not say; None is d / h.
    max_position: if the file does not say.

  Returns:
    Keyword arguments of `ModelConfig`.

  Raises:
    errors.UserError: if a value is missing, malformed or unsupported.
  """
  act = hf.get("hidden_activation") or hf.get("hidden_act") or "silu"
  if act not in ACTIVATIONS:
    raise errors.UserError(
        f'{source}: hidden_act="{act}" is unsupported; supported: '
        f"{', '.join(ACTIVATIONS)}")
  d_model = integer(hf, "hidden_size", source)
  n_heads = integer(hf, "num_attention_heads", source)
  # A key that is there with null means "as many as query heads".
  if "num_key_value_heads" in hf or n_kv_heads is None:
    n_kv_heads = n_heads
  n_kv_heads = integer(hf, "num_key_value_heads", source, n_kv_heads)
  if "head_dim" in hf or head_dim is None:
    head_dim = d_model // n_heads
  head_dim = integer(hf, "head_dim", source, head_dim)
  if n_heads % n_kv_heads:
    raise errors.UserError(
        f"{source}: num_key_value_heads={n_kv_heads} does not divide "
        f"num_attention_heads={n_heads}")
  if head_dim % 2:
    raise errors.UserError(
        f"{source}: head_dim={head_dim} is odd; RoPE rotates pairs")
  max_position = integer(hf, "max_position_embeddings", source, max_position)
  return {
      "vocab_size": integer(hf, "vocab_size", source),
      "d_model": d_model,
      "d_ff": integer(hf, "intermediate_size", source),
      "n_layers": integer(hf, "num_hidden_layers", source),
      "n_heads": n_heads,
      "n_kv_heads": n_kv_heads,
      "head_dim": head_dim,
      "norm_eps": number(hf, "rms_norm_eps", source, 1e-6),
      "activation": ACTIVATIONS[act],
      "rope": rope_config(hf, source, max_position, head_dim),
      "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
      "max_position": max_position,
  }


def rope_config(
    hf: Mapping[str, Any], source: str, max_position: int, head_dim: int
) -> config_lib.RopeConfig:
  """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

  Args:
    hf: `config.json`.
    source: its path, for messages.
    max_position: context length, in tokens.
    head_dim: e.

  Raises:
    errors.UserError: if the type or a value is unsupported.
  """
  given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
  kind = given.get("rope_type") or given.get("type") or "default"
  if kind not in rope.ROPES:
    raise errors.UserError(
        f'{source}: rope_type="{kind}" is unsupported; supported: '
        f"{', '.join(rope.ROPES)}")
  nested = [k for k, v in given.items() if isinstance(v, Mapping)]
  if nested:
    raise errors.UserError(
        f'{source}: rope_parameters["{nested[0]}"] sets RoPE by layer type, '
        "which is unsupported; supported: one setting for all layers")
  partial = number(
      {"partial_rotary_factor": given.get(
          "partial_rotary_factor", hf.get("partial_rotary_factor"))},
      "partial_rotary_factor", source, 1.0)
  turned = int(head_dim * partial)
  if turned % 2 or not 0 < turned <= head_dim:
    raise errors.UserError(
        f"{source}: partial_rotary_factor={partial} rotates {turned} of "
        f"head_dim={head_dim} dimensions; RoPE needs an even number of them")
  theta = given.get("rope_theta") or hf.get("rope_theta") or 10000.0
  fields: dict[str, Any] = {
      "type": kind, "partial": partial,
      "theta": number({"rope_theta": theta}, "rope_theta", source)}
  if kind == "default":
    return config_lib.RopeConfig(**fields)
  original = (hf.get("original_max_position_embeddings")
              or given.get("original_max_position_embeddings")
              or max_position)
  if kind in ("llama3", "yarn", "longrope"):
    fields["original_max_position"] = int(original)
  if kind in ("yarn", "longrope") and given.get("factor") is None:
    given = {**given, "factor": max_position / original}
  fields["factor"] = number(given, "factor", source)
  if kind == "llama3":
    for name in ("low_freq_factor", "high_freq_factor"):
      fields[name] = number(given, name, source)
  if kind == "yarn":
    fields["beta_fast"] = float(given.get("beta_fast") or 32)
    fields["beta_slow"] = float(given.get("beta_slow") or 1)
    fields["truncate"] = bool(given.get("truncate", True))
  if kind == "longrope":
    for name in ("short_factor", "long_factor"):
      fields[name] = _numbers(given, name, source, turned // 2)
  for name in {"yarn": ("attention_factor", "mscale", "mscale_all_dim"),
               "longrope": ("attention_factor",)}.get(kind, ()):
    if given.get(name) is not None:
      fields[name] = number(given, name, source)
  return config_lib.RopeConfig(**fields)


def layer_windows(
    hf: Mapping[str, Any], source: str, n_layers: int
) -> dict[str, Any]:
  """Qwen's sliding window: off, or on some layers; `layer_types` rules.

  Returns:
    `sliding_window` and `window_layers` of `ModelConfig`.

  Raises:
    errors.UserError: if `layer_types` and the rest do not agree.
  """
  window = None
  if hf.get("use_sliding_window"):
    window = integer(hf, "sliding_window", source, 4096)
  kinds = hf.get("layer_types")
  if kinds is None:
    first = hf.get("max_window_layers", 28)
    kinds = [
        "sliding_attention" if window and i >= first else "full_attention"
        for i in range(n_layers)]
  used = local_layers(kinds, source, n_layers)
  if any(used) and window is None:
    raise errors.UserError(
        f"{source}: layer_types names sliding_attention but "
        "use_sliding_window is false; set it and sliding_window")
  if window is None:
    return {"sliding_window": None, "window_layers": None}
  return {"sliding_window": window, "window_layers": used}


def local_layers(
    kinds: Sequence[str], source: str, n_layers: int) -> tuple[bool, ...]:
  """Which layers `layer_types` gives the window.

  Raises:
    errors.UserError: if there is not one known type for each layer.
  """
  unknown = set(kinds) - {"sliding_attention", "full_attention"}
  if unknown or len(kinds) != n_layers:
    value = f'"{min(unknown)}"' if unknown else f"{len(kinds)} values"
    raise errors.UserError(
        f"{source}: layer_types holds {value}; it needs {n_layers} values "
        "from full_attention, sliding_attention")
  return tuple(kind == "sliding_attention" for kind in kinds)


def token_ids(hf: Mapping[str, Any], **defaults: int | None) -> dict[str, Any]:
  """`bos_ids` and `eos_ids`, from a number, a list or null."""
  fields = {}
  for name, default in defaults.items():
    ids = hf.get(f"{name}_token_id", default)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    fields[f"{name}_ids"] = tuple(int(i) for i in ids)
  return fields


def integer(
    hf: Mapping[str, Any], name: str, source: str, default: int | None = None
) -> int:
  """A positive integer of a config, or a `UserError`."""
  value = hf.get(name)
  value = default if value is None else value
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    said = "is missing" if value is None else f"is {value!r}"
    raise errors.UserError(
        f"{source}: {name} {said}; a positive integer is needed")
  return value


def number(
    hf: Mapping[str, Any], name: str, source: str,
    default: float | None = None
) -> float:
  """A positive number of a config, or a `UserError`."""
  value = hf.get(name)
  value = default if value is None else value
  if (isinstance(value, bool) or not isinstance(value, (int, float))
      or not value >= 0):
    said = "is missing" if value is None else f"is {value!r}"
    raise errors.UserError(
        f"{source}: {name} {said}; a number of at least 0 is needed")
  return float(value)


def _numbers(
    hf: Mapping[str, Any], name: str, source: str, n: int
) -> tuple[float, ...]:
  """A list of n positive numbers of a config, or a `UserError`."""
  values = hf.get(name)
  if not isinstance(values, list) or len(values) != n or not all(
      isinstance(v, (int, float)) and v > 0 for v in values):
    said = (f"{len(values)} values" if isinstance(values, list)
            else repr(values))
    raise errors.UserError(
        f"{source}: {name} holds {said}; a list of {n} positive numbers is "
        "needed")
  return tuple(float(v) for v in values)
