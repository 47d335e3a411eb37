"""Logits of tiny random models against transformers, option by option."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import lora
from lora_jax.models import decoder
from lora_jax.models import hf
from lora_jax.models import load
from lora_jax.models import registry
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 40  # Beyond every window and every original context below.
SHAPE = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=16,
    rms_norm_eps=1e-5, attn_implementation="eager")
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0,
            original_max_position_embeddings=16)
# A band that this short a context can have: neither end is clipped.
BAND = dict(beta_fast=1.5, beta_slow=0.1)
LLAMA3 = dict(rope_type="llama3", rope_theta=1000.0, factor=8.0,
              low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
QWEN_WINDOW = dict(use_sliding_window=True, sliding_window=5)


def _no_bias(*targets):
  def edit(config, base):
    layers = dict(base.layers)
    for target in targets:
      assert layers[target].bias is not None
      layers[target] = layers[target].replace(bias=None)
    return config, base.replace(layers=layers)
  return edit


def _config(**changes):
  return lambda config, base: (dataclasses.replace(config, **changes), base)


def _rope(**changes):
  def edit(config, base):
    changed = dataclasses.replace(config.rope, **changes)
    assert changed != config.rope
    return dataclasses.replace(config, rope=changed), base
  return edit


def _tied(config, base):
  assert not config.tie_embeddings
  return dataclasses.replace(config, tie_embeddings=True), base


def _untied(config, base):
  assert config.tie_embeddings and base.lm_head is None
  head = jnp.roll(base.embed_tokens, 1, axis=0).T
  return (dataclasses.replace(config, tie_embeddings=False),
          base.replace(lm_head=decoder.Linear(weight=head)))


def _interleaved_groups(config, base):
  """Query head n reads kv head n % k, by reordering the query heads."""
  h, k, e = config.n_heads, config.n_kv_heads, config.head_dim
  order = np.arange(h).reshape(h // k, k).T.reshape(-1)
  columns = (order[:, None] * e + np.arange(e)).reshape(-1)
  layers = dict(base.layers)
  q, o = layers["q_proj"], layers["o_proj"]
  layers["q_proj"] = q.replace(weight=q.weight[:, :, columns])
  layers["o_proj"] = o.replace(weight=o.weight[:, columns])
  return config, base.replace(layers=layers)


def _without(target):
  def edit(config, base):
    layers = dict(base.layers)
    layers[target] = jnp.full_like(layers[target], 1 - config.norm_offset)
    return config, base.replace(layers=layers)
  return edit


def _local_rope(**changes):
  def edit(config, base):
    changed = dataclasses.replace(config.local_rope, **changes)
    assert changed != config.local_rope
    return dataclasses.replace(config, local_rope=changed), base
  return edit


GEMMA = dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=10)
# What every Gemma has, switched off or changed.
GEMMA_SWITCHES = {
    "head": _untied, "offset": _config(norm_offset=0),
    "embed_scale": _config(embed_scale=None),
    "scale": _config(query_pre_attn_scalar=None),
    "activation": _config(activation="silu"),
    "window": _config(sliding_window=None),
    "width": _config(sliding_window=6),
    **{name: _without(name) for name in (
        "input_layernorm", "post_attention_layernorm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm")},
}
LONGROPE = dict(
    rope_type="longrope", rope_theta=1000.0, partial_rotary_factor=0.75,
    short_factor=[1.0, 1.5, 2.5], long_factor=[2.0, 4.0, 7.0])


# name: (model_type, options, what each switch changes).
CASES = {
    "llama": ("llama", {}, {
        "grouping": _interleaved_groups, "head": _tied,
        "theta": _rope(theta=500.0),
        "input_layernorm": _without("input_layernorm"),
        "post_attention_layernorm": _without("post_attention_layernorm")}),
    "llama tied, no groups, theta": (
        "llama", dict(tie_word_embeddings=True, num_key_value_heads=None,
                      rope_parameters=dict(rope_type="default",
                                           rope_theta=500.0)),
        {"head": _untied, "theta": _rope(theta=10000.0)}),
    "llama biases, eps, head_dim": (
        "llama", dict(attention_bias=True, mlp_bias=True, rms_norm_eps=0.3,
                      head_dim=16),
        {"qkv": _no_bias("q_proj", "k_proj", "v_proj"),
         "q": _no_bias("q_proj"), "v": _no_bias("v_proj"),
         "o": _no_bias("o_proj"), "gate": _no_bias("gate_proj"),
         "up": _no_bias("up_proj"), "down": _no_bias("down_proj"),
         "eps": _config(norm_eps=1e-6)}),
    "llama linear": (
        "llama", dict(rope_parameters=dict(
            rope_type="linear", rope_theta=10000.0, factor=4.0)),
        {"type": _rope(type="default"), "factor": _rope(factor=2.0)}),
    "llama llama3": (
        "llama", dict(rope_parameters=LLAMA3, max_position_embeddings=64),
        {"type": _rope(type="default"), "factor": _rope(factor=2.0),
         "low": _rope(low_freq_factor=3.0),
         "high": _rope(high_freq_factor=2.0),
         "original": _rope(original_max_position=64)}),
    "mistral window": (
        "mistral", dict(sliding_window=5),
        {"window": _config(sliding_window=None),
         "width": _config(sliding_window=6)}),
    "mistral no window": (
        "mistral", dict(sliding_window=None),
        {"window": _config(sliding_window=5)}),
    "qwen2": (
        "qwen2", dict(use_sliding_window=False),
        {"bias": _no_bias("q_proj", "k_proj", "v_proj"),
         "k": _no_bias("q_proj")}),
    "qwen2 window on upper layers, tied": (
        "qwen2", dict(QWEN_WINDOW, max_window_layers=1,
                      tie_word_embeddings=True),
        {"window": _config(sliding_window=None),
         "layers": _config(window_layers=None),
         "which": _config(window_layers=(True, True, False))}),
    "qwen2 yarn": (
        "qwen2", dict(rope_parameters=dict(YARN, **BAND), hidden_size=96,
                      max_position_embeddings=64),
        {"type": _rope(type="default"), "truncate": _rope(truncate=False),
         "attention_factor": _rope(attention_factor=1.0),
         "beta_fast": _rope(beta_fast=0.5),
         "beta_slow": _rope(beta_slow=0.4),
         "factor": _rope(factor=2.0, attention_factor=1.1386294)}),
    "qwen3": (
        "qwen3", dict(head_dim=16),
        {"qk_norm": _config(qk_norm=False), "q_norm": _without("q_norm"),
         "k_norm": _without("k_norm")}),
    "qwen3 biases, window by layer_types": (
        "qwen3", dict(QWEN_WINDOW, head_dim=8, attention_bias=True,
                      layer_types=["sliding_attention", "full_attention",
                                   "sliding_attention"]),
        {"bias": _no_bias("q_proj", "k_proj", "v_proj"),
         "o": _no_bias("o_proj"),
         "window": _config(window_layers=(True, True, True))}),
    "qwen3 yarn, mscale, no truncation": (
        "qwen3", dict(head_dim=16, max_position_embeddings=64,
                      rope_parameters=dict(
                          YARN, **BAND, truncate=False,
                          mscale=2.0, mscale_all_dim=0.5)),
        {"truncate": _rope(truncate=True), "mscale": _rope(mscale=None),
         "mscale_all_dim": _rope(mscale_all_dim=1.0)}),
    "qwen3 yarn, attention_factor": (
        "qwen3", dict(head_dim=16, max_position_embeddings=64,
                      rope_parameters=dict(YARN, attention_factor=1.5)),
        {"attention_factor": _rope(attention_factor=None)}),
    "gemma2": (
        "gemma2", dict(GEMMA, attn_logit_softcapping=3.0,
                       final_logit_softcapping=3.0),
        GEMMA_SWITCHES | {
            "attn_softcap": _config(attn_softcap=None),
            "final_softcap": _config(final_softcap=None),
            "which": _config(window_layers=(False, True, False))}),
    "gemma2 biases, no caps, own head, layer_types": (
        "gemma2", dict(GEMMA, attn_logit_softcapping=None,
                       final_logit_softcapping=None, attention_bias=True,
                       tie_word_embeddings=False,
                       layer_types=["full_attention", "full_attention",
                                    "sliding_attention"]),
        {"q": _no_bias("q_proj"), "o": _no_bias("o_proj"), "head": _tied,
         "attn_softcap": _config(attn_softcap=2.0),
         "which": _config(window_layers=(True, False, True))}),
    "gemma3": (
        "gemma3_text", dict(GEMMA, sliding_window_pattern=2,
                            rope_parameters=dict(
                                full_attention=dict(
                                    rope_type="linear", rope_theta=1000.0,
                                    factor=4.0),
                                sliding_attention=dict(
                                    rope_type="default", rope_theta=20.0))),
        GEMMA_SWITCHES | {
            "qk_norm": _config(qk_norm=False), "q_norm": _without("q_norm"),
            "k_norm": _without("k_norm"), "type": _rope(type="default"),
            "factor": _rope(factor=2.0), "theta": _rope(theta=20.0),
            "local_theta": _local_rope(theta=1000.0),
            "local_rope": _config(local_rope=None),
            "which": _config(window_layers=(False, True, False))}),
    "gemma3 with caps": (
        "gemma3_text", dict(GEMMA, final_logit_softcapping=3.0,
                            sliding_window_pattern=3),
        {"final_softcap": _config(final_softcap=None),
         "which": _config(window_layers=(True, False, True))}),
    "phi3": (
        "phi3", dict(sliding_window=5, pad_token_id=0),
        {"grouping": _interleaved_groups, "head": _tied,
         "window": _config(sliding_window=None),
         "activation": _config(activation="gelu_tanh")}),
    "phi3 longrope, within the context": (
        "phi3", dict(pad_token_id=0, rope_parameters=LONGROPE,
                     max_position_embeddings=256, tie_word_embeddings=True,
                     original_max_position_embeddings=LENGTH),
        {"type": _rope(type="default", theta=1000.0),
         "short_factor": _rope(short_factor=(1.0, 1.5, 2.0)),
         "factor": _rope(factor=1.0), "head": _untied,
         "original": _rope(original_max_position=LENGTH - 1)}),
    "phi3 longrope, beyond it, attention_factor": (
        "phi3", dict(pad_token_id=0, max_position_embeddings=256,
                     rope_parameters=dict(LONGROPE, attention_factor=1.4),
                     original_max_position_embeddings=LENGTH - 1),
        {"long_factor": _rope(long_factor=(2.0, 4.0, 5.0)),
         "attention_factor": _rope(attention_factor=None),
         "original": _rope(original_max_position=LENGTH)}),
    "phi3 partial, no scaling": (
        "phi3", dict(pad_token_id=0, rope_parameters=dict(
            rope_type="default", rope_theta=100.0,
            partial_rotary_factor=0.5)),
        {"partial": _rope(partial=1.0), "less": _rope(partial=0.25)}),
}


def reference_model(model_type, options):
  """A transformers model with large random weights, biases and norms too."""
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(
      model_type, **{**SHAPE, **options})
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      if "norm" in name:
        # QK-norm undoes the gain of q_proj and k_proj: put it here.
        gain = 1.5 if "q_norm" in name or "k_norm" in name else 1.0
        p.copy_(gain * (1 + 0.3 * torch.randn(p.shape))
                - float("gemma" in model_type))
      elif name.endswith("bias"):
        p.copy_(0.5 * torch.randn(p.shape))
      elif "embed" in name:
        p.copy_(torch.randn(p.shape))
      else:
        gain = 1.5 if any(
            part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
        p.copy_(gain * torch.randn(p.shape) * p.shape[1] ** -0.5)
  return model


def ours(config, base, tokens):
  tokens = jnp.asarray(tokens)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return np.asarray(tiny.logits(
      config, base, tokens, positions, jnp.ones_like(tokens)))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """(name, folder, tokens, reference logits, attention weights)."""
  folder = tmp_path_factory.mktemp("model")
  model = reference_model(*CASES[request.param][:2])
  model.save_pretrained(folder)
  tokens = np.random.default_rng(3).integers(0, 97, (2, LENGTH))
  with torch.no_grad():
    out = model(torch.tensor(tokens), output_attentions=True)
  attention = torch.stack(out.attentions).numpy()
  return request.param, folder, tokens, out.logits.numpy(), attention


def test_logits_equal_transformers(case):
  _, folder, tokens, reference, attention = case
  # A flat attention would hide errors in q, k, RoPE and the mask.
  assert attention[:, :, :, 4:].max(-1).mean() > 0.4
  config, base, _, _ = load.load(folder)
  assert tiny.distance(ours(config, base, tokens), reference) <= 2e-5


# A program for each; that this test sees them changes with its cases alone.
@pytest.mark.slow
def test_every_switch_is_seen(case):
  name, folder, tokens, reference, _ = case
  config, base, _, _ = load.load(folder)
  for switch, edit in CASES[name][2].items():
    moved = tiny.distance(ours(*edit(config, base), tokens), reference)
    assert moved > 1e-2, switch


def test_config_survives_the_way_back(case, tmp_path):
  _, folder, _, _, _ = case
  config = load.open_source(folder).config
  written = config.to_hf()
  assert registry.from_hf(written) == config
  theirs = transformers.AutoConfig.for_model(
      **{**written, "model_type": config.family})
  theirs.save_pretrained(tmp_path)
  read = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
  assert registry.from_hf(read) == config


@pytest.mark.parametrize("family, options", [
    ("qwen3", dict(head_dim=16)),
    ("gemma2", dict(GEMMA, attn_logit_softcapping=3.0)),
], ids=["qwen3", "gemma2"])
def test_bfloat16_rounds_no_worse_than_transformers(family, options):
  model = reference_model(family, options).to(torch.bfloat16)
  tokens = np.random.default_rng(4).integers(0, 97, (2, LENGTH))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.float().numpy()
    exact = model.float()(torch.tensor(tokens)).logits.numpy()
  config = registry.from_hf(model.config.to_dict())
  base = _base_of(model, config)
  positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
  hidden, _ = jax.jit(
      decoder.forward, static_argnums=0, static_argnames="dtype")(
          config, base, None, jnp.asarray(tokens), positions,
          jnp.ones_like(positions), dtype=jnp.bfloat16)
  assert hidden.dtype == jnp.bfloat16
  rounded = np.asarray(decoder.unembed(config, base, None, hidden))
  ours_off, theirs_off = (
      np.sqrt(np.mean((x - exact) ** 2)) for x in (rounded, theirs))
  assert 0 < ours_off < 1.5 * theirs_off


def test_gradients_through_caps_and_norms_equal_autograd():
  """Of a LoRA on each projection of Gemma 2, beside frozen weights."""
  model = reference_model("gemma2", dict(
      GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=8.0))
  config = registry.from_hf(model.config.to_dict())
  base = _base_of(model, config)
  rng = np.random.default_rng(5)
  tokens = rng.integers(0, 97, (2, 12))
  weight = rng.normal(size=(2, 12, 97)).astype(np.float32)
  positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
  draw = lambda *shape: 0.3 * rng.normal(size=shape).astype(np.float32)
  shapes = {name: part.weight.shape[1:] for name, part in base.layers.items()
            if isinstance(part, decoder.Linear)}
  factors = {name: (draw(3, i, 2), draw(3, 2, o))
             for name, (i, o) in shapes.items()}

  @jax.jit
  def loss(factors):
    ones = jnp.ones(3)
    tree = adapters_lib.Adapters(layers={
        name: lora.LoRA(a=a, b=b, scale=ones, rate=0 * ones,
                        rank=jnp.full(3, 2))
        for name, (a, b) in factors.items()})
    return (tiny.logits(config, base, jnp.asarray(tokens), positions,
                        jnp.ones_like(positions), tree) * weight).sum()

  ours = jax.grad(loss)(factors)
  model.requires_grad_(False)
  theirs = {}
  for name, pair in factors.items():
    theirs[name] = [torch.tensor(x, requires_grad=True) for x in pair]
    for i, block in enumerate(model.model.layers):
      path = hf.MODULES[name]
      linear = block.get_submodule(path)
      a, b = (x[i] for x in theirs[name])
      linear.forward = lambda x, w=linear.weight, a=a, b=b: (
          x @ w.T + x @ a @ b)
  out = model(torch.tensor(tokens)).logits
  (out * torch.tensor(weight)).sum().backward()
  for name, pair in ours.items():
    for mine, other in zip(pair, theirs[name], strict=True):
      assert float(jnp.abs(mine).max()) > 1e-2
      assert tiny.distance(mine, other.grad.numpy()) <= 5e-5, name


@pytest.mark.parametrize("prefix", ["model.language_model.", None])
def test_the_text_model_of_a_multimodal_checkpoint(prefix, tmp_path):
  torch.manual_seed(0)
  text = {**SHAPE, **GEMMA, "rope_parameters": None,
          "num_hidden_layers": 2, "model_type": "gemma3_text"}
  text.pop("attn_implementation")
  config = transformers.Gemma3Config(
      text_config=text, mm_tokens_per_image=1, eos_token_id=[1, 7],
      image_token_index=96, boi_token_index=95, eoi_token_index=94,
      vision_config=dict(
          model_type="siglip_vision_model", hidden_size=8, image_size=4,
          intermediate_size=8, num_attention_heads=1, num_hidden_layers=1,
          patch_size=2))
  model = transformers.Gemma3ForConditionalGeneration(config).eval()
  model.save_pretrained(tmp_path)
  file = tmp_path / "model.safetensors"
  named = safetensors.numpy.load_file(file)
  assert any(name.startswith("vision_tower.") for name in named)
  assert not any(name.startswith("model.norm") for name in named)
  if prefix:  # As the model itself, and some checkpoints, name them.
    named = {
        prefix + name.removeprefix("language_model.model.")
        if name.startswith("language_model.") else f"model.{name}": value
        for name, value in named.items()}
    safetensors.numpy.save_file(named, file)
  found, base, _, _ = load.load(tmp_path)
  assert found.family == "gemma3_text" and found.eos_ids == (1, 7)
  tokens = np.random.default_rng(3).integers(0, 90, (2, 12))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  assert tiny.distance(ours(found, base, tokens), theirs) <= 2e-5
  named["audio.weight"] = named[min(named)]
  safetensors.numpy.save_file(named, file)
  with pytest.raises(errors.UserError, match=r"audio\.weight is not of"):
    load.load(tmp_path)


def _base_of(model, config):
  class Memory:
    label = "memory"
    scheme = None

    def __init__(self):
      self.config = config
      self.tensors = model.state_dict()

    def read(self, name):
      array = self.tensors[name].numpy()
      return load.hf.Tensor("F32", array.reshape(-1).view(np.uint8), array)

  return load.convert(Memory()).base
