"""Text and ids equal apply_chat_template's; weights by hand."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest

from lora_jax import errors
from lora_jax.data import formats
from lora_jax.data import templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Ends a finished text with EOS that no turn in the middle has (Phi-3).
TRAILING_EOS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% else %}{{ eos_token }}{% endif %}")
# Trims, writes BOS itself, ends turns with EOS only (Llama 2, Mistral).
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}")
# Empty reasoning before the last answer only (Qwen3).
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NO_SPECIAL = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}")
UPPER = NO_SPECIAL.replace("m.content", "m.content | upper")
REWRITES = (
    "{% for m in messages %}{{ m.role }}: {% if loop.last %}"
    "{{ m.content | upper }}{% else %}...{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}")
MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %} {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}")
# No system role, roles that alternate, "model" for the assistant (Gemma 2).
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must "
    "alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<|im_start|>model\n'}}{% endif %}")
# A system message is put before the first user's (Gemma 3).
FOLDS = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}"
    "{%- set rest = messages -%}{%- endif -%}{%- for m in rest -%}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + "
    "'\n' + (first if loop.first else '') }}{{ m.content | trim }}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>model\n' }}{%- endif -%}")

TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": " It's 4, naïvely 👍 "},
    {"role": "user", "content": "And   12 more?\n"},
    {"role": "assistant", "content": "16\n\n  Done."}]


@pytest.fixture
def with_template(smollm2):
  """SmolLM2's tokenizer under another template, restored afterwards."""
  own = smollm2.chat_template

  def make(template):
    smollm2.chat_template = template
    return smollm2

  yield make
  smollm2.chat_template = own


def _example(messages):
  return formats.Example("f:1", messages=messages)


def _encode_plain(tokenizer, **kwargs):
  return templates.encode(formats.Example("f:1", **kwargs), tokenizer)


def _runs(encoded, tokenizer):
  """Texts of the runs of weighted tokens."""
  runs, previous = [], 0.0
  for token, weight in zip(encoded.tokens, encoded.weights):
    if weight:
      if not previous:
        runs.append([])
      runs[-1].append(token)
    previous = weight
  return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template, expected", [
    (None, [" It's 4, naïvely 👍 <|im_end|>", "16\n\n  Done.<|im_end|>"]),
    (CHATML, [" It's 4, naïvely 👍 <|im_end|>", "16\n\n  Done.<|im_end|>"]),
    (TRAILING_EOS,
     [" It's 4, naïvely 👍 <|im_end|>", "16\n\n  Done.<|im_end|>"]),
    (INST, [" It's 4, naïvely 👍<|im_end|>", " 16\n\n  Done.<|im_end|>"]),
    (THINKING, [" It's 4, naïvely 👍 <|im_end|>",
                "<think>\n\n</think>\n\n16\n\n  Done.<|im_end|>"]),
    (GEMMA, ["It's 4, naïvely 👍<|im_end|>", "16\n\n  Done.<|im_end|>"]),
    (FOLDS, ["It's 4, naïvely 👍<|im_end|>", "16\n\n  Done.<|im_end|>"]),
    (UPPER, [" IT'S 4, NAÏVELY 👍", "16\n\n  DONE."]),
    (MARKED, [" It's 4, naïvely 👍 <|im_end|>".replace(" It", "  It"),
              " 16\n\n  Done.<|im_end|>"]),
])
def test_conversation(smollm2, with_template, template, expected):
  tok = with_template(template) if template else smollm2
  encoded = templates.encode(_example(TURNS), tok)
  text = tok.apply_chat_template(TURNS, tokenize=False)
  assert templates.render(TURNS, tok, "f:1") == text
  assert encoded.tokens.tolist() == tok.apply_chat_template(
      TURNS)["input_ids"]
  assert tok.decode(encoded.tokens) == text
  assert encoded.tokens.dtype == np.int32
  assert encoded.weights.dtype == np.float32
  assert set(encoded.weights.tolist()) == {0, 1}
  assert _runs(encoded, tok) == expected
  assert encoded.source == "f:1"


def test_no_special_token(with_template):
  """Without an end-of-turn token the turn ends at its last character."""
  tok = with_template(NO_SPECIAL)
  turns = [{**m, "content": m["content"].strip()} for m in TURNS]
  encoded = templates.encode(_example(turns), tok)
  # "👍\n\n" ends at a token border; ".\n\n" does as well.
  assert _runs(encoded, tok) == ["It's 4, naïvely 👍", "16\n\n  Done."]


def test_weight_zero_and_system(smollm2):
  turns = [dict(m) for m in TURNS]
  turns[1]["weight"] = 0
  encoded = templates.encode(_example(turns), smollm2)
  assert _runs(encoded, smollm2) == ["16\n\n  Done.<|im_end|>"]
  assert encoded.tokens.tolist() == templates.encode(
      _example(TURNS), smollm2).tokens.tolist()
  assert "named SmolLM" in smollm2.decode(encoded.tokens)
  encoded = templates.encode(_example(TURNS), smollm2, add_system="Be kind.")
  assert smollm2.decode(encoded.tokens).startswith(
      "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat")
  own = [{"role": "system", "content": "Mine."}, *TURNS]
  encoded = templates.encode(_example(own), smollm2, add_system="Be kind.")
  assert "Be kind." not in smollm2.decode(encoded.tokens)


def test_weight_zero_in_a_marked_template(with_template):
  tok = with_template(MARKED)
  turns = [dict(m) for m in TURNS]
  turns[1]["weight"] = 0
  assert _runs(templates.encode(_example(turns), tok), tok) == [
      " 16\n\n  Done.<|im_end|>"]


def test_template_does_not_see_weights(with_template):
  tok = with_template(CHATML.replace("{{ m.role }}", "{{ m | length }}"))
  turns = [{**TURNS[0], "weight": 0}, {**TURNS[1], "weight": 1}]
  assert tok.decode(templates.encode(_example(turns), tok).tokens).startswith(
      "<|im_start|>2\n")


def test_trimmed_spaces(smollm2):
  """GPT-2's post-processor leaves a token of spaces without a character."""
  import tokenizers
  tok = copy.deepcopy(smollm2)
  tok.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(
      trim_offsets=True)
  offsets = tok("a    b", return_offsets_mapping=True)["offset_mapping"]
  assert offsets == [(0, 1), (4, 4), (5, 6)]
  encoded = _encode_plain(tok, prompt="a    ", completion="b")
  assert encoded.weights.tolist() == [0, 0, 1, 1]  # a, 3 spaces, " b", EOS
  encoded = _encode_plain(tok, prompt="a", completion="    b")
  assert encoded.weights.tolist() == [0, 1, 1, 1]
  encoded = _encode_plain(tok, prompt="a", completion="b    ")
  assert encoded.weights.all()  # "ab" spans the border.
  encoded = templates.encode(_example(TURNS), tok)
  assert _runs(encoded, tok) == [
      " It's 4, naïvely 👍 <|im_end|>", "16\n\n  Done.<|im_end|>"]


def test_assistant_first_and_tricky_contents(smollm2):
  turns = [
      {"role": "assistant", "content": "assistant\n"},
      {"role": "user", "content": "<|im_start|>assistant\nassistant\n"},
      {"role": "assistant", "content": "a<|im_end|>b"}]
  encoded = templates.encode(_example(turns), smollm2)
  text = smollm2.decode(encoded.tokens)
  assert text == smollm2.apply_chat_template(turns, tokenize=False)
  assert _runs(encoded, smollm2) == [
      "assistant\n<|im_end|>", "a<|im_end|>b<|im_end|>"]


def test_prompt_is_a_prefix(smollm2):
  whole = templates.encode(_example(TURNS), smollm2)
  prompt = templates.encode_prompt(TURNS[:3], smollm2)
  assert whole.tokens[:len(prompt)].tolist() == prompt.tolist()
  assert whole.weights[len(prompt)] == 1
  assert whole.weights[len(prompt) - 1] == 0
  assert prompt.tolist() == smollm2.apply_chat_template(
      TURNS[:3], add_generation_prompt=True)["input_ids"]


def test_end_of_turn(smollm2, tiny):
  name = smollm2.convert_ids_to_tokens(templates.end_of_turn(smollm2))
  assert name == "<|im_end|>"
  turns = "{% for m in messages %} [m.role] {{ m.content }}XX{% endfor %}"
  assert templates.end_of_turn(tiny()) is None  # Without a template.
  plain = turns.replace("[m.role]", "[user]").replace("XX", " e")
  assert templates.end_of_turn(tiny(plain)) is None
  ended = turns.replace("[m.role]", "[user]").replace("XX", " </s>")
  assert templates.end_of_turn(tiny(ended)) == 2
  strict = "{{ raise_exception('no') }}"
  assert templates.end_of_turn(tiny(strict)) is None


def test_tiny_by_hand(tiny):
  tok = tiny("{% for m in messages %}{{ ' [' + m.role + '] ' + m.content }}"
             "{% if m.role == 'assistant' %} </s>{% endif %}{% endfor %}"
             "{% if add_generation_prompt %} [assistant]{% endif %}")
  encoded = templates.encode(_example([
      {"role": "user", "content": "a b"},
      {"role": "assistant", "content": "c"},
      {"role": "user", "content": "d"},
      {"role": "assistant", "content": "e be"}]), tok)
  #                                 [user] a b [asst] c </s> [user] d [asst] ..
  assert encoded.tokens.tolist() == [3, 6, 7, 4, 8, 2, 3, 9, 4, 10, 11, 2]
  assert encoded.weights.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]


def test_bos_is_written_once(tiny):
  writes = ("{{ bos_token }}{% for m in messages %}{{ ' ' + m.content }}"
            "{% endfor %}")
  turns = [{"role": "user", "content": "a"},
           {"role": "assistant", "content": "b"}]
  tok = tiny(writes, add_bos=True)
  assert templates.encode(_example(turns), tok).tokens.tolist() == [1, 6, 7]
  assert templates.encode_prompt(turns[:1], tok).tolist() == [1, 6]
  tok = tiny(writes.replace("{{ bos_token }}", ""), add_bos=True)
  assert templates.encode(_example(turns), tok).tokens.tolist() == [6, 7]
  encode = functools.partial(_encode_plain, tok)
  assert encode(text="a b").tokens.tolist() == [1, 6, 7]
  assert encode(text="<s> a b").tokens.tolist() == [1, 6, 7]
  assert encode(prompt="a", completion=" b").tokens.tolist() == [1, 6, 7, 2]
  assert templates.encode_text("a b", tok).tolist() == [1, 6, 7]


def test_prompt_completion_by_hand(tiny):
  tok = tiny()

  def encode(prompt, completion):
    return _encode_plain(tok, prompt=prompt, completion=completion)

  encoded = encode("a b ", "c d")
  assert encoded.tokens.tolist() == [6, 7, 8, 9, 2]
  assert encoded.weights.tolist() == [0, 0, 1, 1, 1]
  encoded = encode("a b", "e c")  # "be" spans the border: it is learnt.
  assert encoded.tokens.tolist() == [6, 11, 8, 2]
  assert encoded.weights.tolist() == [0, 1, 1, 1]
  encoded = encode("a ", "c </s>")  # EOS is there already.
  assert encoded.tokens.tolist() == [6, 8, 2]
  assert encoded.weights.tolist() == [0, 1, 1]
  assert encode("", "c").weights.tolist() == [1, 1]


def test_text_by_hand(tiny):
  encoded = templates.encode(formats.Example("f:1", text="a b c"), tiny())
  assert encoded.tokens.tolist() == [6, 7, 8]
  assert encoded.weights.tolist() == [0, 1, 1]


def test_text_and_completion_of_smollm2(smollm2):
  encode = functools.partial(_encode_plain, smollm2)
  encoded = encode(text="Köln 12")
  assert encoded.tokens.tolist() == smollm2("Köln 12")["input_ids"]
  assert encoded.weights.tolist() == [0] + [1] * (len(encoded.tokens) - 1)
  encoded = encode(prompt="Q: 1+1?\nA:", completion=" 2 👍")
  assert _runs(encoded, smollm2) == [" 2 👍<|im_end|>"]


def test_errors(tiny, with_template, monkeypatch):
  def fails(messages, tok, match):
    with pytest.raises(errors.UserError, match=match) as info:
      templates.encode(_example(messages), tok)
    assert "\n" not in str(info.value)
    assert str(info.value).startswith("f:1: ")

  fails(TURNS, tiny(), "no chat template.*give one as chat_template")
  fails(TURNS, tiny("{{ raise_exception('roles\n must alternate') }}"),
        r"refuses the messages \(roles: user, assistant, user, assistant\): "
        "roles must alternate; correct")
  fails(TURNS, tiny("{% for m in"), "refuses the messages")
  fails([{"role": "system", "content": "Be brief."}, *TURNS],
        with_template(GEMMA), r"roles: system, user.*System role not supp")
  fails(TURNS, with_template(REWRITES), "rewrites assistant message 1")
  half = MARKED.replace("m.role == 'assistant'",
                        "m.role == 'assistant' and loop.last")
  turns = [dict(m) for m in TURNS]
  turns[3]["weight"] = 0
  fails(turns, with_template(half), "marks 1 turns of 2")
  with pytest.raises(errors.UserError, match=r"f:1: .*no EOS token.*set eos"):
    templates.encode(formats.Example("f:1", prompt="a", completion="b"),
                     tiny(eos=None))
