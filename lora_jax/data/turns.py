"""Where the assistant's turns lie in the text a chat template renders.

Templates are programs: they insert system prompts, trim contents, drop the
reasoning of earlier turns, end the text differently from a turn in the middle.
So no marker is searched for. Each assistant content is replaced by a unique
mark and the conversation rendered again: the text between the marks is the
template's own, and what stands in its place in the real text is the content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lora_jax import errors

Message: TypeAlias = dict[str, Any]
# `(messages, add_generation_prompt=False) -> text`.
Render: TypeAlias = Callable[..., str]
Span: TypeAlias = tuple[int, int, float]  # First, past-the-last, weight.


def spans(
    messages: Sequence[Message], render: Render, special: Sequence[str],
    source: str,
) -> tuple[str, list[Span]]:
  """The rendered conversation and the characters that carry loss.

  A turn begins where the generation prompt ends, as it does at inference, and
  ends behind its first special token (the end-of-turn token), or, where the
  template writes none, behind its last visible character.

  Args:
    messages: the conversation, `role`, `content`, maybe `weight`.
    render: the chat template.
    special: the tokenizer's special tokens.
    source: where the conversation came from, for errors.

  Returns:
    The text and one span for each assistant message.

  Raises:
    UserError: the template rewrites the conversation so that the turns cannot
      be located.
  """
  text = render(messages)
  which = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  found = _by_marks(messages, which, render, text, special)
  if found is None:
    found = _by_prefixes(messages, which, render, text, special, source)
  weights = [float(messages[i].get("weight", 1)) for i in which]
  return text, [(*span, w) for span, w in zip(found, weights)]


def _mark(i: int) -> str:
  return f"Zq7turn{i}q7Z"


def _by_marks(
    messages: Sequence[Message], which: Sequence[int], render: Render,
    text: str, special: Sequence[str],
) -> list[tuple[int, int]] | None:
  """Spans, or None if the template does more to contents than trim them."""
  marked = [{**m, "content": _mark(i)} if i in which else m
            for i, m in enumerate(messages)]
  rest = render(marked)
  pieces = []
  for i in which:
    before, found, rest = rest.partition(_mark(i))
    if not found:
      return None
    pieces.append(before)
  pieces.append(rest)
  result = []
  at = len(pieces[0])
  if not text.startswith(pieces[0]):
    return None
  for i, after in zip(which, pieces[1:]):
    content = messages[i]["content"]
    variants = (content, content.strip(), content.rstrip(), content.lstrip())
    fitting = [c for c in variants if text.startswith(c + after, at)]
    if not fitting:
      return None
    end = at + len(fitting[0])
    # What closes the turn: what follows it, both here and when it comes last.
    closing = after
    if i + 1 < len(messages):
      alone = render(marked[:i + 1]).partition(_mark(i))[2]
      closing = _common_prefix(after, alone)
    result.append((_start(messages, i, render, text, at),
                   end + _closing(closing, special)))
    at = end + len(after)
  return result if at == len(text) else None


def _common_prefix(a: str, b: str) -> str:
  n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y),
           min(len(a), len(b)))
  return a[:n]


def _start(
    messages: Sequence[Message], i: int, render: Render, text: str,
    content: int,
) -> int:
  """End of the generation prompt, if that is how `text` goes on."""
  if i == 0:  # Many templates cannot render an empty conversation.
    return content
  head = render(messages[:i], add_generation_prompt=True)
  return len(head) if text.startswith(head) and len(head) <= content else (
      content)


def _closing(closing: str, special: Sequence[str]) -> int:
  """Characters of `closing` that belong to the turn."""
  found = [(closing.find(s), len(s)) for s in special if s in closing]
  return sum(min(found)) if found else len(closing.rstrip())


def _by_prefixes(
    messages: Sequence[Message], which: Sequence[int], render: Render,
    text: str, special: Sequence[str], source: str,
) -> list[tuple[int, int]]:
  """Spans as differences of renderings of longer and longer conversations."""
  result = []
  for i in which:
    head = render(messages[:i], add_generation_prompt=True) if i else ""
    tail = render(messages[:i + 1])
    if not (i and tail.startswith(head) and text.startswith(tail)):
      raise errors.UserError(
          f"{source}: the chat template rewrites assistant message {i}, so its "
          "tokens cannot be located; put {% generation %} markers into the "
          "template, or use rows of prompt and completion")
    turn = text[len(head):len(tail)]
    ends = [turn.rfind(s) + len(s) for s in special if s in turn]
    result.append((len(head), len(head) + max(
        ends, default=len(turn.rstrip()))))
  return result
