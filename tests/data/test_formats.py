"""Rows to examples, by hand, and the message of every misfit."""

from __future__ import annotations

import pytest

from lora_jax import errors
from lora_jax.data import formats


def _roles(example):
  return [(m["role"], m["content"]) for m in example.messages]


def test_alpaca():
  row = {"instruction": "Add.", "input": "", "output": "2"}
  assert _roles(formats.convert(row, "auto", "f:1")) == [
      ("user", "Add."), ("assistant", "2")]
  row["input"] = "1 1"
  assert _roles(formats.convert(row, "alpaca", "f:1")) == [
      ("user", "Add.\n\n1 1"), ("assistant", "2")]
  row |= {"system": "Be brief.", "history": [["q", "a"]]}
  example = formats.convert(row, "alpaca", "f:1")
  assert _roles(example) == [
      ("system", "Be brief."), ("user", "q"), ("assistant", "a"),
      ("user", "Add.\n\n1 1"), ("assistant", "2")]
  assert [m.get("weight", 1) for m in example.messages] == [1, 1, 0, 1, 1]


def test_messages():
  turns = [{"role": "user", "content": "q", "extra": None},
           {"role": "assistant", "content": "a", "weight": 0},
           {"role": "user", "content": "r"},
           {"role": "assistant", "content": "b"}]
  example = formats.convert({"messages": turns}, "auto", "f:1")
  assert example.messages == [
      {"role": "user", "content": "q"},
      {"role": "assistant", "content": "a", "weight": 0},
      {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]


def test_sharegpt():
  row = {"system": "s", "conversations": [
      {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
  assert _roles(formats.convert(row, "auto", "f:1")) == [
      ("system", "s"), ("user", "q"), ("assistant", "a")]


def test_prompt_completion():
  example = formats.convert(
      {"prompt": "", "completion": " x"}, "auto", "f:1")
  assert (example.prompt, example.completion) == ("", " x")
  example = formats.convert(
      {"prompt": [{"role": "user", "content": "q"},
                  {"role": "assistant", "content": "old"},
                  {"role": "user", "content": "r"}],
       "completion": [{"role": "assistant", "content": "new"}]},
      "auto", "f:1")
  assert [m.get("weight", 1) for m in example.messages] == [1, 0, 1, 1]


def test_gsm8k_and_text():
  assert _roles(formats.convert(
      {"question": "q", "answer": "a"}, "auto", "f:1")) == [
          ("user", "q"), ("assistant", "a")]
  assert formats.convert({"text": "t"}, "auto", "f:1").text == "t"


def test_a_text_may_have_other_names():
  for row in ({"text": "t", "content": "c"}, {"text": None, "content": "t"},
              {"title": "x", "document": "t"}, {"question": "q", "passage": "t",
                                                "label": True}):
    assert formats.convert(row, "text", "f:1").text == "t"
  with pytest.raises(errors.UserError, match="no format has the keys passage"):
    formats.convert({"passage": "t"}, "auto", "f:1")  # Not detected.


_USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize("format, row, match", [
    ("alpaca", {"instruction": "x", "out": "y"},
     '"output" of format alpaca is missing .*instruction, out'),
    ("alpaca", {"instruction": "x", "output": " "}, '"output" is empty'),
    ("alpaca", {"instruction": "", "output": "y"}, '"instruction" is empty'),
    ("alpaca", {"instruction": "x", "output": 5}, '"output" is 5, not text'),
    ("alpaca", {"instruction": "x", "output": "y", "history": [["q"]]},
     '"history" holds'),
    ("gsm8k", {"question": "x"}, '"answer" of format gsm8k is missing'),
    ("text", {"text": ""}, '"text" is empty'),
    ("text", {"passage": " "}, '"passage" is empty'),
    ("text", {"title": "x"}, '"text" of format text is missing'),
    ("prompt_completion", {"prompt": "x", "completion": ""},
     '"completion" is empty.*delete the row'),
    ("prompt_completion", {"completion": "x"}, '"prompt" .* is missing'),
    ("prompt_completion", {"prompt": [_USER]}, '"completion" is missing'),
    ("messages", {"text": "x"}, '"messages" is missing'),
    ("messages", {"messages": []}, "not a list of messages"),
    ("messages", {"messages": "hi"}, "not a list of messages"),
    ("messages", {"messages": [_USER]}, "no assistant message"),
    ("messages", {"messages": [
        _USER, {"role": "assistant", "content": "a", "weight": 0}]},
     "no assistant message with a weight"),
    ("messages", {"messages": [_USER, "hi"]}, r'\[1\] is .hi., not an object'),
    ("messages", {"messages": [{"role": "asistant", "content": "x"}]},
     'role "asistant" is unknown; did you mean "assistant"'),
    ("messages", {"conversations": [{"from": "robot", "value": "x"}]},
     'role "robot" is unknown; known'),
    ("messages", {"messages": [{"role": "user", "content": None}]},
     "content is None, not text"),
    ("messages", {"messages": [
        _USER, {"role": "assistant", "content": ""}]},
     "assistant's content is empty"),
    ("messages", {"messages": [
        _USER, {"role": "assistant", "content": "a", "weight": "high"}]},
     "weight is 'high'; write 0"),
    ("auto", {"foo": 1}, "no format has the keys foo .*set data.format"),
    ("auto", ["x"], "is a list, not an object"),
    ("alpacca", {"text": "x"}, 'did you mean "alpaca"'),
])
def test_errors(format, row, match):
  with pytest.raises(errors.UserError, match=match) as info:
    formats.convert(row, format, "file.jsonl:17")
  message = str(info.value)
  assert "\n" not in message
  assert message.startswith("file.jsonl:17") or format == "alpacca"
