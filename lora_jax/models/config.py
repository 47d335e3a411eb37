"""What a model is, as hashable values: static under `jit`."""

from __future__ import annotations

from collections.abc import Collection
import dataclasses
from typing import Any

# A window beyond any position, and far from int32's end.
UNLIMITED = 2**30
# Hugging Face's name of each of `layers.ACTIVATIONS`.
HF_ACTIVATIONS = {
    "silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding and its length extension.

  Names and meanings are those of transformers' `rope_parameters`; which of
  them a type reads is said in `rope.py`.

  Attributes:
    type: "default", "linear", "llama3", "yarn" or "longrope".
    theta: base of the geometric series of wavelengths.
    factor: how many times the context was extended.
    original_max_position: context length before the extension, in tokens.
    low_freq_factor, high_freq_factor: llama3's band, in turns per context.
    beta_fast, beta_slow: YaRN's band, in turns per context.
    attention_factor: YaRN's and LongRoPE's multiplier of cos and sin; None
      derives it.
    mscale, mscale_all_dim: YaRN's (DeepSeek's) numerator and denominator of
      the derived multiplier; None or 0 for the paper's rule.
    truncate: whether YaRN rounds its band to whole dimensions.
    partial: share of each head's dimensions, the first ones, that is rotated.
    short_factor, long_factor: LongRoPE's divisors of each frequency, for
      sequences within the original context and beyond it.
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
  partial: float = 1.0
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()

  def rotary_dim(self, head_dim: int) -> int:
    """How many of a head's e dimensions are rotated."""
    return int(head_dim * self.partial)

  def to_hf(self) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
    hf: dict[str, Any] = {"rope_type": self.type, "rope_theta": self.theta}
    if self.partial != 1:
      hf["partial_rotary_factor"] = self.partial
    if self.type != "default":
      hf["factor"] = self.factor
    if self.type in ("llama3", "yarn", "longrope"):
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
    if self.type == "longrope":
      hf |= {"short_factor": list(self.short_factor),
             "long_factor": list(self.long_factor)}
      if self.attention_factor is not None:
        hf["attention_factor"] = self.attention_factor
    return hf


# Families whose models in transformers may have biases there.
ATTENTION_BIAS = ("llama", "qwen3", "gemma2", "gemma3_text")
MLP_BIAS = ("llama",)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder's geometry and options.

  Attributes:
    family: Hugging Face's `model_type`, a key of `registry.FAMILIES`.
    vocab_size, d_model, d_ff, n_layers: v, d, f, l of the glossary.
    n_heads, n_kv_heads, head_dim: h, k, e.
    norm_eps: epsilon of every RMSNorm.
    norm_offset: 1 if norms scale by 1 + weight, in float32 (Gemma), else 0.
    post_norms: whether attention's and the MLP's outputs are normed too,
      before they are added to the residual stream (Gemma 2 and 3).
    activation: of the gate, a key of `layers.ACTIVATIONS`.
    embed_scale: multiplies the embeddings; None is 1.
    query_pre_attn_scalar: attention scores are divided by its square root;
      None is e.
    attn_softcap, final_softcap: c of c tanh(x / c), on attention scores and
      on logits; None is no cap.
    rope: position embedding.
    local_rope: that of the layers with a window; None is `rope`.
    fused: whether checkpoints hold q, k and v, and gate and up, as one
      matrix each (Phi-3); see `hf.FUSED`.
    tie_embeddings: the head is the embedding, transposed.
    qkv_bias, o_bias, mlp_bias: which projections have a bias.
    qk_norm: RMSNorm over `e` of queries and keys, before RoPE (Qwen3).
    sliding_window: a token sees itself and the `sliding_window - 1` before
      it; None is unlimited.
    window_layers: which layers use the window; None is all of them.
    max_position: context length, in tokens.
    bos_ids, eos_ids: ids that open and close a text; perhaps none.
    layer_order: which layer of the base's stacks each one is, where some are
      there more than once; () if all are there once, in order.
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
  norm_offset: int = 0
  post_norms: bool = False
  activation: str = "silu"
  embed_scale: float | None = None
  query_pre_attn_scalar: int | None = None
  attn_softcap: float | None = None
  final_softcap: float | None = None
  rope: RopeConfig = RopeConfig()
  local_rope: RopeConfig | None = None
  fused: bool = False
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
  layer_order: tuple[int, ...] = ()

  def replicated(self, order: tuple[int, ...]) -> ModelConfig:
    """The model whose layers are those of `order`; () changes nothing."""
    if not order:
      return self
    windows = self.window_layers
    return dataclasses.replace(
        self, n_layers=len(order), layer_order=order,
        window_layers=windows and tuple(windows[i] for i in order))

  def stored(self, layer: int) -> int:
    """Where a layer's weights are in the base's stacks."""
    return self.layer_order[layer] if self.layer_order else layer

  def windows(self) -> tuple[int, ...] | None:
    """Window of every layer, `[l]` tokens; None if no layer has one."""
    if self.sliding_window is None:
      return None
    used = self.window_layers or (True,) * self.n_layers
    if not any(used):
      return None
    return tuple(self.sliding_window if u else UNLIMITED for u in used)

  @property
  def attn_scale(self) -> float | None:
    """Multiplier of attention scores; None is 1 / sqrt(e)."""
    scalar = self.query_pre_attn_scalar
    return None if scalar is None else scalar**-0.5

  def with_biases(self, targets: Collection[str]) -> ModelConfig:
    """A model of the same family whose projections `targets` have a bias.

    Raises:
      ValueError: if transformers' models of the family have none there.
    """
    flags: dict[str, Any] = {}
    for names, allowed, fields in (
        (("q_proj", "k_proj", "v_proj", "o_proj"), ATTENTION_BIAS,
         ("qkv_bias", "o_bias")),
        (("gate_proj", "up_proj", "down_proj"), MLP_BIAS, ("mlp_bias",))):
      if set(names) & set(targets):
        if self.family not in allowed:
          raise ValueError(f"{self.family} models do not have in transformers")
        flags |= dict.fromkeys(fields, True)
    return dataclasses.replace(self, **flags)

  def to_hf(self) -> dict[str, Any]:
    """`config.json` of the same model, for transformers 4 and 5."""
    rope = self.rope.to_hf()
    name = self.family.removesuffix("_text").capitalize()
    hf: dict[str, Any] = {
        "model_type": self.family,
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": self.vocab_size,
        "hidden_size": self.d_model,
        "intermediate_size": self.d_ff,
        "num_hidden_layers": self.n_layers,
        "num_attention_heads": self.n_heads,
        "num_key_value_heads": self.n_kv_heads,
        "head_dim": self.head_dim,
        "hidden_act": HF_ACTIVATIONS[self.activation],
        "rms_norm_eps": self.norm_eps,
        "rope_parameters": rope,
        # transformers 4 reads these two, and 5 accepts them.
        "rope_theta": self.rope.theta,
        "rope_scaling": self._rope_scaling(rope),
        "max_position_embeddings": self.max_position,
        "tie_word_embeddings": self.tie_embeddings,
        "attention_bias": self.o_bias,
        "mlp_bias": self.mlp_bias,
        "sliding_window": self.sliding_window,
        "use_sliding_window": self.sliding_window is not None,
        "bos_token_id": _ids(self.bos_ids),
        "eos_token_id": _ids(self.eos_ids),
        # Phi-3's class has one of its own vocabulary where this is absent.
        "pad_token_id": None,
    }
    if self.window_layers is not None:
      hf["layer_types"] = [
          "sliding_attention" if used else "full_attention"
          for used in self.window_layers]
    if self.rope.partial != 1:
      hf["partial_rotary_factor"] = self.rope.partial
    if self.rope.type == "longrope":
      hf["original_max_position_embeddings"] = self.rope.original_max_position
    if self.post_norms:  # Where absent, Gemma's classes have other values.
      hf |= {"hidden_activation": hf["hidden_act"],
             "query_pre_attn_scalar": self.query_pre_attn_scalar,
             "attn_logit_softcapping": self.attn_softcap,
             "final_logit_softcapping": self.final_softcap}
    if self.local_rope is not None:
      hf |= {"rope_parameters": {"full_attention": rope,
                                 "sliding_attention": self.local_rope.to_hf()},
             "rope_local_base_freq": self.local_rope.theta}
    return hf

  def _rope_scaling(self, rope: dict[str, Any]) -> dict[str, Any] | None:
    """transformers 4's part of `RopeConfig.to_hf`."""
    if self.rope.type == "default":
      return None
    scaled = {k: v for k, v in rope.items()
              if k not in ("rope_theta", "partial_rotary_factor")}
    if self.rope.type != "longrope":
      return scaled
    # Phi-3's class takes these three, and derives the rest, or refuses.
    derived = self.max_position / self.rope.original_max_position
    known = {"original_max_position_embeddings", "rope_type"} | (
        {"factor"} if self.rope.factor == derived else set())
    return {"type": self.rope.type} | {
        k: v for k, v in scaled.items() if k not in known}


def _ids(ids: tuple[int, ...]) -> int | list[int] | None:
  if len(ids) > 1:
    return list(ids)
  return ids[0] if ids else None
