"""Tiny models, adapters and tokenizers for the tests of what comes after."""

from __future__ import annotations

import json

import jax
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax.adapters import lora
from lora_jax.models import hf
from lora_jax.models import modules
from tests.models import tiny as models_tiny

CONFIGS = models_tiny.CONFIGS
logits = models_tiny.logits
distance = models_tiny.distance
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
           "down_proj")


def paths(config) -> dict[str, list[str]]:
  """Module paths by target, as `adapters.build` and `export.peft` take them."""
  return modules.paths(config) | {"lm_head": ["lm_head"]}


def shapes(config) -> dict[str, tuple[int, int]]:
  """(in, out) by target."""
  found = modules.shapes(config)
  return found | {"lm_head": found["embed_tokens"][::-1]}


def random_adapters(config, base, block, key=7, scale=0.2):
  """Adapters of a config with every trained leaf random, none of it zero."""
  _, tree = adapters_lib.build(
      jax.random.key(0), block, base, paths(config),
      geometry=modules.geometry(config))
  trainable, frozen = adapters_lib.split(tree)
  leaves, structure = jax.tree.flatten(trainable)
  keys = jax.random.split(jax.random.key(key), len(leaves))
  drawn = [x + scale * jax.random.normal(k, x.shape)
           for k, x in zip(keys, leaves)]
  return mask(adapters_lib.join(structure.unflatten(drawn), frozen))


def mask(tree):
  """Zeroes the padded columns of A and rows of B of LoRA and its kin."""
  def is_lora(x):
    return isinstance(x, lora.LoRA)

  def one(node):
    if not is_lora(node):
      return node
    def used(width):
      return np.arange(width) < np.asarray(node.rank)[..., None]

    return node.replace(
        a=node.a * used(node.a.shape[-1])[..., None, :],
        b=node.b * used(node.b.shape[-2])[..., :, None])

  return jax.tree.map(one, tree, is_leaf=is_lora)


def to_torch(config, base, folder):
  """The model in transformers, through a folder that torch writes itself."""
  import torch
  import transformers

  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  loaded = transformers.AutoConfig.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_config(
      loaded, attn_implementation="eager", dtype=torch.float32)
  state = {name: torch.from_numpy(np.array(value))
           for name, value in hf.state(config, base, np.float32)}
  missing, unexpected = model.load_state_dict(state, strict=False)
  tied = {"lm_head.weight"} if config.tie_embeddings else set()
  assert not unexpected and set(missing) <= tied
  model.tie_weights()
  return model.eval()


def torch_logits(model, tokens, **more) -> np.ndarray:
  """Logits `[b, t, v]` of a torch model for tokens `[b, t]`."""
  import torch

  with torch.no_grad():
    ids = torch.from_numpy(np.array(tokens, np.int64))
    return model(ids, **more).logits.numpy()


def byte_tokenizer():
  """One token a byte, and `<s>`, `</s>`, with a chat template."""
  import tokenizers
  import transformers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
      clean_up_tokenization_spaces=False,
      chat_template=(
          "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>"
          "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"))
