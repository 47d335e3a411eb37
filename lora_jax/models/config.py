"""What a model is, as hashable values: static under `jit`."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding and its length extension.

  Names and meanings are those of transformers' `rope_parameters`; which of
  them a type reads is said in `rope.py`.

  Attributes:
    type: "default", "linear", "llama3" or "yarn".
    theta: base of the geometric series of wavelengths.
    factor: how many times the context was extended.
    original_max_position: context length before the extension, in tokens.
    low_freq_factor, high_freq_factor: llama3's band, in turns per context.
    beta_fast, beta_slow: YaRN's band, in turns per context.
    attention_factor: YaRN's multiplier of cos and sin; None derives it.
    mscale, mscale_all_dim: YaRN's (DeepSeek's) numerator and denominator of
      the derived multiplier; None or 0 for the paper's rule.
    truncate: whether YaRN rounds its band to whole dimensions.
  """

  type: str = "default"
  theta: float = 10000.0
  factor: float = 1.0
  original_max_position: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  def to_hf(self) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
    hf: dict[str, Any] = {"rope_type": self.type, "rope_theta": self.theta}
    if self.type != "default":
      hf["factor"] = self.factor
    if self.type in ("llama3", "yarn"):
      hf["original_max_position_embeddings"] = self.original_max_position
    if self.type == "llama3":
      hf["low_freq_factor"] = self.low_freq_factor
      hf["high_freq_factor"] = self.high_freq_factor
    if self.type == "yarn":
      hf |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow,
             "truncate": self.truncate}
      given = {"attention_factor": self.attention_factor,
               "mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim}
      hf |= {k: v for k, v in given.items() if v is not None}
    return hf


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder's geometry and options.

  Attributes:
    family: Hugging Face's `model_type`, a key of `registry.FAMILIES`.
    vocab_size, d_model, d_ff, n_layers: v, d, f, l of the glossary.
    n_heads, n_kv_heads, head_dim: h, k, e.
    norm_eps: epsilon of every RMSNorm.
    rope: position embedding.
    tie_embeddings: the head is the embedding, transposed.
    qkv_bias, o_bias, mlp_bias: which projections have a bias.
    qk_norm: RMSNorm over `e` of queries and keys, before RoPE (Qwen3).
    sliding_window: a token sees itself and the `sliding_window - 1` before
      it; None is unlimited.
    window_layers: which layers use the window; None is all of them.
    max_position: context length, in tokens.
    bos_ids, eos_ids: ids that open and close a text; perhaps none.
  """

  family: str
  vocab_size: int
  d_model: int
  d_ff: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-6
  rope: RopeConfig = RopeConfig()
  tie_embeddings: bool = False
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  sliding_window: int | None = None
  window_layers: tuple[bool, ...] | None = None
  max_position: int = 2048
  bos_ids: tuple[int, ...] = ()
  eos_ids: tuple[int, ...] = ()

  def windows(self) -> tuple[int, ...] | None:
    """Window of every layer, `[l]` tokens; None if no layer has one."""
    if self.sliding_window is None:
      return None
    used = self.window_layers or (True,) * self.n_layers
    if not any(used):
      return None
    # Beyond any position, and far from int32's end.
    return tuple(self.sliding_window if u else 2**30 for u in used)

  def to_hf(self) -> dict[str, Any]:
    """`config.json` of the same model, for transformers 4 and 5."""
    rope = self.rope.to_hf()
    scaled = {k: v for k, v in rope.items() if k != "rope_theta"}
    hf: dict[str, Any] = {
        "model_type": self.family,
        "architectures": [f"{self.family.capitalize()}ForCausalLM"],
        "vocab_size": self.vocab_size,
        "hidden_size": self.d_model,
        "intermediate_size": self.d_ff,
        "num_hidden_layers": self.n_layers,
        "num_attention_heads": self.n_heads,
        "num_key_value_heads": self.n_kv_heads,
        "head_dim": self.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": self.norm_eps,
        "rope_parameters": rope,
        # transformers 4 reads these two, and 5 accepts them.
        "rope_theta": self.rope.theta,
        "rope_scaling": None if self.rope.type == "default" else scaled,
        "max_position_embeddings": self.max_position,
        "tie_word_embeddings": self.tie_embeddings,
        "attention_bias": self.o_bias,
        "mlp_bias": self.mlp_bias,
        "sliding_window": self.sliding_window,
        "use_sliding_window": self.sliding_window is not None,
        "bos_token_id": _ids(self.bos_ids),
        "eos_token_id": _ids(self.eos_ids),
    }
    if self.window_layers is not None:
      hf["layer_types"] = [
          "sliding_attention" if used else "full_attention"
          for used in self.window_layers]
    return hf


def _ids(ids: tuple[int, ...]) -> int | list[int] | None:
  if len(ids) > 1:
    return list(ids)
  return ids[0] if ids else None
