"""Examples -> token ids and loss weights.

A conversation is rendered by the tokenizer's own chat template, as text, and
tokenised once; a token carries loss if its characters overlap an assistant's
turn. So ids are exactly those of `apply_chat_template`, whatever the template
adds (SmolLM2's inserts a system prompt), and nothing is searched for in ids.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import re
from typing import Any, TYPE_CHECKING, TypeAlias

import numpy as np

from lora_jax import errors
from lora_jax.data import formats
from lora_jax.data import turns

if TYPE_CHECKING:
  import transformers

Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerFast"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclasses.dataclass(frozen=True)
class Encoded:
  """One example as tokens.

  Attributes:
    tokens: int32 [n].
    weights: float32 [n]; `weights[j]` is the weight of predicting
      `tokens[j]` from those before it (so `weights[0]` never counts).
    source: where the example came from, `"file.jsonl:17"`.
    task: of several tasks, or None; see `virtual`.
    labels: int32 [n], what is to be predicted in each token's place; None is
      the tokens.
  """

  tokens: np.ndarray
  weights: np.ndarray
  source: str = ""
  task: int | None = None
  labels: np.ndarray | None = None


def encode(
    example: formats.Example, tokenizer: Tokenizer, *,
    add_system: str | None = None,
) -> Encoded:
  """Tokens and weights of one example.

  - messages: the chat template; the assistants' turns have weight 1, from the
    end of the generation prompt through the end-of-turn token; a message with
    `"weight": 0` has none. `{% generation %}` markers of a template rule.
  - prompt and completion: their texts joined, then EOS; weight 1 on EOS and
    on every token with a character of the completion.
  - text: weight 1 on every token but the first.

  BOS is put first where the tokenizer adds it by itself and, for messages,
  only where the template writes it, so it is never there twice.

  Args:
    example: what to encode.
    tokenizer: a fast tokenizer.
    add_system: a system message for conversations that have none.

  Returns:
    int32 tokens [n], float32 weights [n].

  Raises:
    UserError: no chat template, or one that refuses or rewrites the example.
  """
  return dataclasses.replace(
      _encode(example, tokenizer, add_system), task=example.task)


def _encode(example, tokenizer, add_system):
  if example.messages is not None:
    return _encode_messages(
        _with_system(example.messages, add_system), tokenizer, example.source)
  if example.completion is not None:
    return _encode_completion(example, tokenizer)
  assert example.text is not None
  tokens, _, _ = _tokenise(example.text, tokenizer)
  tokens = _bos(tokens, tokenizer) + tokens
  weights = np.ones(len(tokens), np.float32)
  weights[:1] = 0
  return Encoded(np.asarray(tokens, np.int32), weights, example.source)


def encode_prompt(
    messages: Sequence[formats.Message], tokenizer: Tokenizer, *,
    add_system: str | None = None,
) -> np.ndarray:
  """Tokens from which a model writes the next assistant turn.

  Args:
    messages: a conversation that ends before the assistant's turn.
    tokenizer: a fast tokenizer with a chat template.
    add_system: a system message for conversations that have none.

  Returns:
    int32 [n], the prefix of what `encode` gives for the conversation with the
    answer (as far as no token spans the border).

  Raises:
    UserError: no chat template, or one that refuses the messages.
  """
  rendered = render(
      _with_system(messages, add_system), tokenizer, "the prompt",
      add_generation_prompt=True)
  return np.asarray(_tokenise(rendered, tokenizer)[0], np.int32)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
  """The special token with which the template ends an assistant's turn.

  None without a template, or where the turn ends in ordinary text.
  """
  if not tokenizer.chat_template:
    return None
  turns = [{"role": "user", "content": "a"},
           {"role": "assistant", "content": "b"}]
  try:
    encoded = encode(formats.Example("a turn", messages=turns), tokenizer)
  except errors.UserError:  # It wants other turns than these.
    return None
  trained = encoded.tokens[encoded.weights > 0]
  special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
  return next((int(i) for i in trained if int(i) in special), None)


def encode_text(text: str, tokenizer: Tokenizer) -> np.ndarray:
  """Tokens of a plain prompt, int32 [n]; BOS where the tokenizer adds it."""
  tokens, _, _ = _tokenise(text, tokenizer)
  return np.asarray(_bos(tokens, tokenizer) + tokens, np.int32)


def render(
    messages: Sequence[formats.Message], tokenizer: Tokenizer, source: str, *,
    add_generation_prompt: bool = False,
) -> str:
  """The text of a conversation under the tokenizer's chat template.

  Args:
    messages: the conversation; their weights are not shown to the template.
    tokenizer: a tokenizer with a chat template.
    source: where the messages came from, for errors.
    add_generation_prompt: end with the header of an assistant's turn.

  Raises:
    UserError: no chat template, or one that refuses the messages.
  """
  return _template(messages, tokenizer, source, tokenize=False,
                   add_generation_prompt=add_generation_prompt)


def _template(
    messages: Sequence[formats.Message], tokenizer: Tokenizer, source: str,
    **kwargs: Any,
) -> Any:
  if not tokenizer.chat_template:
    raise errors.UserError(
        f"{source}: the tokenizer {tokenizer.name_or_path or ''} has no chat "
        "template, which messages need; give one as chat_template (Jinja text "
        "or a .jinja file), use an instruct model, or use rows of prompt and "
        "completion")
  shown = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
  try:
    return tokenizer.apply_chat_template(shown, **kwargs)
  except Exception as error:  # Jinja's, or what the template raises.
    roles = ", ".join(m["role"] for m in messages) or "none"
    raise errors.UserError(
        f"{source}: the chat template refuses the messages (roles: {roles}): "
        f"{' '.join(str(error).split())[:160]}; correct the row or the "
        "template") from error


def _with_system(
    messages: Sequence[formats.Message], system: str | None,
) -> list[formats.Message]:
  if system is None or (messages and messages[0]["role"] == "system"):
    return list(messages)
  return [{"role": "system", "content": system}, *messages]


def _tokenise(
    text: str, tokenizer: Tokenizer,
) -> tuple[list[int], np.ndarray, np.ndarray]:
  """Ids, and the first and past-the-last character of each (int [n])."""
  out = tokenizer(
      text, add_special_tokens=False, return_offsets_mapping=True,
      return_attention_mask=False, verbose=False)
  offsets = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2)
  starts, ends = offsets[:, 0], offsets[:, 1]
  # GPT-2's post-processor trims spaces off: a token of spaces only is left
  # with no character, at its own end. It begins where the one before ended.
  before = np.concatenate([[0], ends[:-1]]).astype(np.int64)
  starts = np.where(starts == ends, np.minimum(starts, before), starts)
  return list(out["input_ids"]), starts, ends


def _bos(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
  """`[bos]` where the tokenizer adds one and the text did not write it."""
  bos = tokenizer.bos_token_id
  added = tokenizer("", verbose=False)["input_ids"]
  if bos is None or added[:1] != [bos] or tokens[:1] == [bos]:
    return []
  return [bos]


def _encode_completion(
    example: formats.Example, tokenizer: Tokenizer) -> Encoded:
  eos = tokenizer.eos_token_id
  if eos is None:
    raise errors.UserError(
        f"{example.source}: the tokenizer {tokenizer.name_or_path or ''} has "
        "no EOS token to end a completion with; set eos_token in its "
        "tokenizer_config.json")
  prompt = example.prompt or ""
  tokens, starts, ends = _tokenise(f"{prompt}{example.completion}", tokenizer)
  weights = _weights(starts, ends, [(len(prompt), ends[-1], 1.0)])
  first = _bos(tokens, tokenizer)
  last = [] if tokens[-1] == eos else [eos]
  return Encoded(
      np.asarray([*first, *tokens, *last], np.int32),
      np.concatenate([np.zeros(len(first), np.float32), weights,
                      np.ones(len(last), np.float32)]),
      example.source)


def _encode_messages(
    messages: list[formats.Message], tokenizer: Tokenizer, source: str,
) -> Encoded:
  if _GENERATION.search(str(tokenizer.chat_template)):
    return _encode_marked(messages, tokenizer, source)

  def renderer(shown: Sequence[formats.Message], **kwargs: Any) -> str:
    return render(shown, tokenizer, source, **kwargs)

  text, spans = turns.spans(
      messages, renderer, _special_tokens(tokenizer), source)
  tokens, starts, ends = _tokenise(text, tokenizer)
  return Encoded(np.asarray(tokens, np.int32), _weights(starts, ends, spans),
                 source)


def _encode_marked(
    messages: list[formats.Message], tokenizer: Tokenizer, source: str,
) -> Encoded:
  """Weights from the template's own `{% generation %}` markers."""
  out = _template(messages, tokenizer, source, tokenize=True, return_dict=True,
                  return_assistant_tokens_mask=True)
  mask = np.asarray(out["assistant_masks"], np.float32)
  weights = [float(m.get("weight", 1)) for m in messages
             if m["role"] == "assistant"]
  # Runs of marked tokens are the assistant's turns, in order.
  first = np.flatnonzero(np.diff(mask, prepend=0) > 0)
  if not all(weights):
    if len(first) != len(weights):
      raise errors.UserError(
          f"{source}: the template marks {len(first)} turns of "
          f"{len(weights)}, so a message's weight cannot be placed; mark every "
          "assistant turn in the template")
    turn = np.cumsum(np.diff(mask, prepend=0) > 0) - 1
    mask = mask * np.asarray(weights, np.float32)[turn]
  return Encoded(np.asarray(out["input_ids"], np.int32), mask, source)


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
  return [t.content for t in tokenizer.added_tokens_decoder.values()
          if t.special]


def _weights(
    starts: np.ndarray, ends: np.ndarray,
    spans: Sequence[tuple[int, int, float]],
) -> np.ndarray:
  """The weight of the span that a token's characters overlap, else 0 [n].

  A token across the border counts: it holds text that has to be learnt.
  """
  weights = np.zeros(len(starts), np.float32)
  for first, past, weight in spans:
    weights[(starts < past) & (ends > first)] = weight
  return weights
