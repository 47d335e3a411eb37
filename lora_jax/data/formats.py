"""Row formats: what the columns of a dataset mean.

Every format is a function `(row, source) -> Example` in `FORMATS`; a new one
is a function and a line there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, TypeAlias

from lora_jax import errors

Message: TypeAlias = dict[str, Any]  # {"role", "content"} and maybe "weight".


@dataclasses.dataclass(frozen=True)
class Example:
  """One row; exactly one of the three kinds is set.

  Attributes:
    source: where it came from, `"file.jsonl:17"`.
    messages: a conversation, to be rendered with the chat template.
    prompt: with `completion`: plain text that is continued.
    completion: the continuation, which carries the loss.
    text: plain text, all of which carries the loss.
    task: the row's `task_id`, if that is an integer: of several tasks, for
      methods that treat them differently.
  """

  source: str
  messages: list[Message] | None = None
  prompt: str | None = None
  completion: str | None = None
  text: str | None = None
  task: int | None = None


Converter: TypeAlias = Callable[[Mapping[str, Any], str], Example]

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "system": "system", "tool": "tool",
    "observation": "tool"}
_ROLES = {r: r for r in ("system", "developer", "user", "assistant", "tool")}


def convert(row: Any, format: str, source: str) -> Example:
  """One row as an `Example`.

  Args:
    row: the row as read.
    format: a key of `FORMATS`, or `"auto"`.
    source: where it came from, for messages.

  Raises:
    UsageError: unknown format.
    UserError: the row does not fit the format.
  """
  if not isinstance(row, Mapping):
    raise errors.UserError(
        f"{source}: the row is a {type(row).__name__}, not an object with "
        'keys; write rows such as {"prompt": ..., "completion": ...}')
  if format == "auto":
    format = detect(row, source)
  example = errors.choose("data.format", format, FORMATS)(row, source)
  task = row.get("task_id")
  # Data sets have names there, too.
  known = isinstance(task, int) and not isinstance(task, bool)
  return dataclasses.replace(example, task=task if known else None)


def detect(row: Mapping[str, Any], source: str) -> str:
  """Name of the format whose keys `row` has.

  Raises:
    UserError: none has.
  """
  # Filled keys first: a table may have a column that only other rows use.
  for present in ({k for k in row if row[k] is not None}, set(row)):
    for name, keys in _KEYS.items():
      if any(present.issuperset(ks) for ks in keys):
        return name
  known = "; ".join(
      f"{name}: {' or '.join('+'.join(ks) for ks in keys)}"
      for name, keys in _KEYS.items())
  raise errors.UserError(
      f"{source}: no format has the keys {_names(row)} (known: {known}); "
      "rename the keys or set data.format")


def alpaca(row: Mapping[str, Any], source: str) -> Example:
  """`instruction`, optional `input`, `output` (Taori et al. 2023).

  The user's turn is `instruction`, or `instruction\\n\\ninput`. `system` and
  `history` (pairs of earlier turns, without loss), as in LLaMA-Factory, are
  used when present.
  """
  user = _text(row, "instruction", source, "alpaca")
  if row.get("input"):
    user = f"{user}\n\n{_text(row, 'input', source, 'alpaca')}"
  messages: list[Message] = []
  if row.get("system"):
    messages.append({"role": "system",
                     "content": _text(row, "system", source, "alpaca")})
  for turn in row.get("history") or ():
    if len(turn) != 2 or not all(isinstance(x, str) for x in turn):
      raise errors.UserError(
          f'{source}: "history" holds {turn!r:.60}, not [user, assistant] '
          "texts; correct the row")
    messages += [{"role": "user", "content": turn[0]},
                 {"role": "assistant", "content": turn[1], "weight": 0}]
  messages += [{"role": "user", "content": user},
               {"role": "assistant",
                "content": _answer(row, "output", source, "alpaca")}]
  return Example(source, messages=messages)


def gsm8k(row: Mapping[str, Any], source: str) -> Example:
  """`question`, `answer` (Cobbe et al. 2021) as a user and assistant turn."""
  return Example(source, messages=[
      {"role": "user", "content": _text(row, "question", source, "gsm8k")},
      {"role": "assistant",
       "content": _answer(row, "answer", source, "gsm8k")}])


def messages(row: Mapping[str, Any], source: str) -> Example:
  """`messages` of `role`/`content` (OpenAI), or ShareGPT's `conversations`.

  An optional `"weight": 0` on an assistant message takes it out of the loss.
  """
  key = "conversations" if "conversations" in row else "messages"
  turns = _turns(row, key, source)
  if row.get("system") and turns[0]["role"] != "system":
    turns.insert(0, {"role": "system",
                     "content": _text(row, "system", source, "messages")})
  if not any(t["role"] == "assistant" and t.get("weight", 1) for t in turns):
    raise errors.UserError(
        f'{source}: "{key}" has no assistant message with a weight, so there '
        "is nothing to learn; add one or delete the row")
  return Example(source, messages=turns)


def prompt_completion(row: Mapping[str, Any], source: str) -> Example:
  """`prompt`, `completion`: two texts, or two lists of messages.

  Texts are joined as they are, without a chat template.
  """
  name = "prompt_completion"
  if isinstance(row.get("prompt"), (list, tuple)):
    head = [{**turn, "weight": 0}
            if turn["role"] == "assistant" else turn
            for turn in _turns(row, "prompt", source)]
    tail = _turns(row, "completion", source)
    return messages({"messages": head + tail}, source)
  return Example(
      source, prompt=_text(row, "prompt", source, name, empty=True),
      completion=_answer(row, "completion", source, name))


def text(row: Mapping[str, Any], source: str) -> Example:
  """The first of `TEXT_KEYS` there is: all but the first token carry the loss.

  Only `text` is detected: the others stand in tables of other formats, too.
  """
  key = next((k for k in TEXT_KEYS if row.get(k) is not None), TEXT_KEYS[0])
  return Example(source, text=_answer(row, key, source, "text"))


TEXT_KEYS = ("text", "content", "document", "passage")
FORMATS: dict[str, Converter] = {
    "messages": messages,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "gsm8k": gsm8k,
    "text": text,
}

# In order of detection: a row with `messages` may also have a `prompt`.
_KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"),),
    "gsm8k": (("question", "answer"),),
    "text": (("text",),),
}


def _names(row: Mapping[str, Any]) -> str:
  return ", ".join(str(k) for k in row) or "(none)"


def _text(
    row: Mapping[str, Any], key: str, source: str, format: str,
    empty: bool = False,
) -> str:
  value = row.get(key)
  if value is None:
    raise errors.UserError(
        f'{source}: the key "{key}" of format {format} is missing (the row has '
        f"{_names(row)}); add it, or set data.format")
  if not isinstance(value, str):
    raise errors.UserError(
        f'{source}: "{key}" is {value!r:.60}, not text; quote it')
  if not empty and not value.strip():
    raise errors.UserError(
        f'{source}: "{key}" is empty; fill it in or delete the row')
  return value


def _answer(
    row: Mapping[str, Any], key: str, source: str, format: str) -> str:
  """A text that must not be empty since it carries the loss."""
  value = _text(row, key, source, format, empty=True)
  if not value.strip():
    raise errors.UserError(
        f'{source}: "{key}" is empty, so there is nothing to learn; fill it in '
        "or delete the row")
  return value


def _turns(row: Mapping[str, Any], key: str, source: str) -> list[Message]:
  turns = row.get(key)
  if turns is None:
    raise errors.UserError(
        f'{source}: the key "{key}" is missing (the row has {_names(row)}); '
        "add it, or set data.format")
  if not isinstance(turns, (list, tuple)) or not turns:
    raise errors.UserError(
        f'{source}: "{key}" is {turns!r:.60}, not a list of messages; write '
        '[{"role": "user", "content": ...}, ...]')
  return [_turn(turn, f'{source}: "{key}"[{i}]')
          for i, turn in enumerate(turns)]


def _turn(turn: Any, place: str) -> Message:
  remedy = 'write {"role": ..., "content": ...}'
  if not isinstance(turn, Mapping):
    raise errors.UserError(f"{place} is {turn!r:.60}, not an object; {remedy}")
  if "from" in turn and "role" not in turn:
    roles, written, content = _SHAREGPT_ROLES, turn["from"], turn.get("value")
  else:
    roles, written, content = _ROLES, turn.get("role"), turn.get("content")
  if written not in roles:
    raise errors.UserError(
        f'{place}: the role "{written}" is unknown'
        f"{errors.nearest(str(written), roles)}; {remedy}")
  role = roles[written]
  if not isinstance(content, str):
    raise errors.UserError(
        f"{place}: the content is {content!r:.60}, not text; {remedy}")
  weight = turn.get("weight")
  if weight is not None and weight not in (0, 1):
    raise errors.UserError(
        f"{place}: the weight is {weight!r}; write 0 (no loss) or 1")
  if role == "assistant" and weight != 0 and not content.strip():
    raise errors.UserError(
        f"{place}: the assistant's content is empty, so there is nothing to "
        'learn; fill it in, or add "weight": 0')
  result: Message = {"role": role, "content": content}
  return result if weight is None else {**result, "weight": weight}
