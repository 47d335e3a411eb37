"""Fixtures of the data tests."""

from __future__ import annotations

import pytest

from lora_jax.data import tokenizer as tokenizer_lib

# Words split at spaces; `<s>` is BOS, `</s>` ends a turn.
WORDS = (
    "<unk>", "<s>", "</s>", "[user]", "[assistant]", "[system]", "a", "b", "c",
    "d", "e", "be", "nice")


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
  """SmolLM2's tokenizer, from the GGUF. Not to be changed."""
  return tokenizer_lib.load(smollm2_path)


@pytest.fixture
def tiny():
  """A factory of word-level tokenizers with a given chat template."""
  import tokenizers
  import transformers

  def make(chat_template=None, add_bos=False, eos="</s>"):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    if add_bos:
      backend.post_processor = tokenizers.processors.TemplateProcessing(
          single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos,
        unk_token="<unk>", chat_template=chat_template)

  return make
