"""Tokenizers, from a Hugging Face folder or from a GGUF's metadata.

A GGUF carries the vocabulary, the merges, the token types and the chat
template, but not the pre-tokenizer: it names one (`tokenizer.ggml.pre`). The
splitting rules here follow llama.cpp's table of these names, which follows
each model's own tokenizer.json. No torch is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
from typing import Any, TYPE_CHECKING

from lora_jax import errors
from lora_jax.data import places

if TYPE_CHECKING:
  import transformers

# llama.cpp token types (GGUF specification, `tokenizer.ggml.token_type`).
_CONTROL = 3
_USER_DEFINED = 4

# Names of pre-tokenizers that split every digit off before GPT-2's own rule.
# The order matters: in "a  12" the two spaces then form a piece of their own.
_SINGLE_DIGITS = (
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_PLAIN = ("gpt-2", "gpt2", "default", "olmo", "mpt", "jais")


def load(
    path: str | pathlib.Path, chat_template: str | None = None,
) -> transformers.PreTrainedTokenizerFast:
  """A fast tokenizer of `transformers`.

  Args:
    path: a Hugging Face folder (or hub name), or a `.gguf` file with a
      GPT-2-style byte-level BPE vocabulary.
    chat_template: replaces the tokenizer's own: Jinja text, or the path of a
      `.jinja` file.

  Returns:
    The tokenizer. Its pad token may equal its EOS token: losses are masked by
    weights, never by pad ids.

  Raises:
    UserError: nothing there, no tokenizer in it, an unsupported vocabulary.
  """
  if str(path).endswith(".gguf"):
    tokenizer = _from_gguf(pathlib.Path(path))
  else:
    tokenizer = _from_folder(path)
  if chat_template is not None:
    tokenizer.chat_template = _template_text(chat_template)
  return tokenizer


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
  """Adds special tokens that are not there; gives the ids of all.

  Args:
    tokenizer: changed in place.
    tokens: such as `<|im_start|>`; each is never split, and left out of text
      that is decoded without special tokens.

  Raises:
    errors.UserError: if one is empty or named twice.
  """
  import tokenizers

  if not all(tokens) or len(set(tokens)) < len(tokens):
    raise errors.UserError(
        f"model.add_tokens={','.join(tokens)}: name every token once")
  tokenizer.add_tokens(
      [tokenizers.AddedToken(t, normalized=False, special=True)
       for t in tokens], special_tokens=True)
  return tokenizer.convert_tokens_to_ids(list(tokens))


def _template_text(chat_template: str) -> str:
  if not chat_template.endswith(".jinja"):
    return chat_template
  try:
    return pathlib.Path(chat_template).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
        f"chat template {chat_template}: {error}; give a readable .jinja file "
        "or the template's text") from error


def _from_folder(path: str | pathlib.Path) -> Any:
  import transformers  # Heavy.

  location = pathlib.Path(path)
  if not location.exists() and (
      location.is_absolute() or str(path).startswith(".")):
    raise errors.UserError(
        f"{path}: no such file or folder{places.nearest_sibling(location)}; "
        "correct model.path")
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  except Exception as error:  # It raises whatever its parsers raise.
    reason = " ".join(str(error).split())[:200]
    raise errors.UserError(
        f"{path}: no tokenizer could be read ({reason}); give a folder with "
        "tokenizer.json and tokenizer_config.json, or a .gguf file") from error
  if not tokenizer.is_fast:
    raise errors.UserError(
        f"{path}: {type(tokenizer).__name__} reports no character offsets, "
        "which the loss mask needs; save a tokenizer.json into the folder")
  return tokenizer


def _from_gguf(path: pathlib.Path) -> Any:
  import tokenizers
  import transformers  # Heavy.

  fields = _metadata(path)
  tokens = fields["tokenizer.ggml.tokens"]
  merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
  backend.pre_tokenizer = _pre_tokenizer(
      fields.get("tokenizer.ggml.pre", "default"),
      bool(fields.get("tokenizer.ggml.add_space_prefix", False)), path)
  backend.decoder = tokenizers.decoders.ByteLevel()
  types = fields.get("tokenizer.ggml.token_type", ())
  for kind, add in ((_CONTROL, backend.add_special_tokens),
                    (_USER_DEFINED, backend.add_tokens)):
    add([tokenizers.AddedToken(t, normalized=False, special=kind == _CONTROL)
         for t, found in zip(tokens, types) if found == kind])
  named = {}
  for name, key in (("bos_token", "bos"), ("eos_token", "eos"),
                    ("unk_token", "unknown"), ("pad_token", "padding")):
    index = fields.get(f"tokenizer.ggml.{key}_token_id")
    if index is not None:
      named[name] = tokens[index]
  if fields.get("tokenizer.ggml.add_bos_token", False):
    bos = named["bos_token"]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1",
        special_tokens=[(bos, tokens.index(bos))])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, name_or_path=str(path),
      chat_template=fields.get("tokenizer.chat_template"),
      clean_up_tokenization_spaces=False, **named)


def _metadata(path: pathlib.Path) -> dict[str, Any]:
  import gguf

  if not path.is_file():
    raise errors.UserError(
        f"{path}: no such file{places.nearest_sibling(path)}; correct "
        "model.path")
  try:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()
              if key.startswith("tokenizer.")}
  except Exception as error:  # Cut short or no GGUF: many kinds are raised.
    raise errors.UserError(
        f"{path}: not a readable GGUF ({error}); download it again") from error
  model = fields.get("tokenizer.ggml.model")
  if model != "gpt2" or "tokenizer.ggml.merges" not in fields:
    raise errors.UserError(
        f"{path}: tokenizer.ggml.model={model!r}, only byte-level BPE ('gpt2') "
        "is read from GGUF; use the model's Hugging Face folder")
  return fields


def _pre_tokenizer(name: str, prefix_space: bool, path: pathlib.Path) -> Any:
  from tokenizers import pre_tokenizers

  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
  if name in _PLAIN:
    return byte_level
  if name in _SINGLE_DIGITS:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level])
  raise errors.UserError(
      f"{path}: tokenizer.ggml.pre={name!r} is not known (known: "
      f"{', '.join(_PLAIN + _SINGLE_DIGITS)}); use the model's Hugging Face "
      "folder")
