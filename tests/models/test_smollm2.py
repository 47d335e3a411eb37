"""The real SmolLM2-135M against transformers."""

from __future__ import annotations

import argparse
import email.message
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import decoder
from lora_jax.models import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

FINGERPRINT = (
    "91db33f9b4518c02488a360b0fb17cc0fabcd52e115fecadfd7875dac645544e")


# Loads the real model twice; test_oracle.py has its family, and .ci/run
# trains it.
@pytest.mark.slow
# Most of the time is that of the two models for so many tokens.
@pytest.mark.parametrize("shape", [
    (1, 200), pytest.param((4, 500), marks=pytest.mark.slow)], ids=str)
def test_same_argmax_on_real_tokens(shape, smollm2_path):
  reference = transformers.AutoModelForCausalLM.from_pretrained(
      smollm2_path.parent, gguf_file=smollm2_path.name, dtype="float32",
      attn_implementation="eager").eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(
      smollm2_path.parent, gguf_file=smollm2_path.name)
  # Prose and code that every machine has.
  text = inspect.getdoc(argparse) + inspect.getsource(email.message)
  tokens = np.asarray(tokenizer(text)["input_ids"])
  tokens = tokens[:np.prod(shape)].reshape(shape)
  with torch.no_grad():
    theirs = reference(torch.tensor(tokens)).logits.numpy()

  config, base, fingerprint, _ = load.load(smollm2_path)
  # Work directories name their base by this: it must never drift.
  assert fingerprint == FINGERPRINT

  @jax.jit
  def ours(base, tokens):
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    hidden, _ = decoder.forward(
        config, base, None, tokens, positions, jnp.ones_like(tokens))
    return decoder.unembed(config, base, None, hidden)

  logits = np.asarray(ours(base, jnp.asarray(tokens)))
  top = np.partition(theirs, -2, axis=-1)[..., -2:]
  clear = top[..., 1] - top[..., 0] > 1e-3
  assert clear.mean() > 0.99
  same = logits.argmax(-1) == theirs.argmax(-1)
  assert same[clear].all()
  assert np.abs(logits - theirs).max() / np.abs(theirs).max() < 1e-4
