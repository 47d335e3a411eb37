"""SmolLM2's tokenizer from the GGUF, against transformers' own reading."""

from __future__ import annotations

import pytest

from lora_jax import errors
from lora_jax.data import tokenizer as tokenizer_lib

TEXTS = (
    "Hello world",
    "1234567890, 3.14159 and 2,000 on 2024-12-31; x86_64",
    "Grüße aus Köln, 日本語のテキスト, Привет мир, नमस्ते, 👍🏽👨‍👩‍👧",
    "def f(x):\n    if x > 0:\n\t\treturn {'a': [x, -x]}  # ok\n\n\nf(  y )",
    "it's we'll I'D don't 'quoted' \"double\"",
    "  leading,   inner   and trailing  ",
    "tabs\t\tand\r\nnewlines\n\n \n end",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_end",
    "<file_sep> <jupyter_code>x<empty_output>",
    "",
)


@pytest.fixture(scope="module")
def oracle(smollm2_path):
  """transformers' reading (needs torch), with SmolLM2's digit rule.

  The file names the rule ("smollm") without spelling it out. transformers
  5.23 has no row for this name and takes GPT-2's; SmolLM2's tokenizer.json
  (and llama.cpp under this name) splits single digits off first.
  """
  pytest.importorskip("torch")
  import tokenizers
  import transformers
  read = transformers.AutoTokenizer.from_pretrained(
      smollm2_path.parent, gguf_file=smollm2_path.name)
  plain = transformers.AutoTokenizer.from_pretrained(
      smollm2_path.parent, gguf_file=smollm2_path.name)
  read.backend_tokenizer.pre_tokenizer = (
      tokenizers.pre_tokenizers.Sequence([
          tokenizers.pre_tokenizers.Digits(individual_digits=True),
          tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]))
  return plain, read


def test_equals_transformers(smollm2, oracle):
  plain, read = oracle
  for text in TEXTS:
    ids = smollm2(text)["input_ids"]
    assert ids == plain(text)["input_ids"], text
    assert ids == read(text)["input_ids"], text
    assert smollm2.decode(ids) == plain.decode(ids)
    assert smollm2.decode(ids, skip_special_tokens=True) == plain.decode(
        ids, skip_special_tokens=True)
  assert smollm2.special_tokens_map == plain.special_tokens_map
  assert smollm2.chat_template == plain.chat_template
  assert len(smollm2) == len(plain) == 49152
  messages = [{"role": "user", "content": "hi"}]
  assert (smollm2.apply_chat_template(messages, add_generation_prompt=True)
          == plain.apply_chat_template(messages, add_generation_prompt=True))


def test_where_the_rules_differ(smollm2, oracle):
  """Spaces before a digit stay together; other scripts' digits are split."""
  plain, read = oracle
  for text in ("a  12\n    3", "x ½ and ٣٤"):
    ids = smollm2(text)["input_ids"]
    assert ids == read(text)["input_ids"]
    assert ids != plain(text)["input_ids"]
  assert smollm2.convert_ids_to_tokens(smollm2("a  12")["input_ids"]) == [
      "a", "ĠĠ", "1", "2"]


def test_round_trip_and_single_digits(smollm2):
  for text in TEXTS:
    assert smollm2.decode(smollm2(text)["input_ids"]) == text
  assert smollm2.convert_ids_to_tokens(smollm2("x 2024")["input_ids"]) == [
      "x", "Ġ", "2", "0", "2", "4"]


def test_no_bos_is_added(smollm2):
  assert smollm2("hi")["input_ids"] == smollm2(
      "hi", add_special_tokens=False)["input_ids"]
  assert smollm2.bos_token == "<|im_start|>"
  assert smollm2.eos_token == "<|im_end|>"


def _write_gguf(path, model="gpt2", pre="smollm", add_bos=True, merges=True):
  import gguf
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(["<s>", "</s>", "h", "i", "hi", "<think>", "1"])
  writer.add_token_types([3, 3, 1, 1, 1, 4, 1])
  if merges:
    writer.add_token_merges(["h i"])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  writer.add_add_bos_token(add_bos)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


def test_own_gguf(tmp_path):
  """By hand: BOS where the metadata asks for it; user-defined tokens whole."""
  tok = tokenizer_lib.load(_write_gguf(tmp_path / "a.gguf"))
  assert tok("hi<think>11")["input_ids"] == [0, 4, 5, 6, 6]
  assert tok.decode([0, 4, 5], skip_special_tokens=True) == "hi<think>"
  assert tok.chat_template is None
  tok = tokenizer_lib.load(_write_gguf(tmp_path / "b.gguf", add_bos=False))
  assert tok("hi")["input_ids"] == [4]


def test_folder_and_template(tmp_path, smollm2):
  smollm2.save_pretrained(tmp_path / "model")
  tok = tokenizer_lib.load(tmp_path / "model")
  for text in TEXTS:
    assert tok(text)["input_ids"] == smollm2(text)["input_ids"]
  assert tok.chat_template == smollm2.chat_template
  tok = tokenizer_lib.load(tmp_path / "model", chat_template="{{ 'x' }}")
  assert tok.chat_template == "{{ 'x' }}"
  (tmp_path / "t.jinja").write_text("{{ 'y' }}")
  tok = tokenizer_lib.load(tmp_path / "model", str(tmp_path / "t.jinja"))
  assert tok.chat_template == "{{ 'y' }}"


def test_errors(tmp_path):
  def fails(path, match, **kwargs):
    with pytest.raises(errors.UserError, match=match) as info:
      tokenizer_lib.load(path, **kwargs)
    assert "\n" not in str(info.value)

  good = _write_gguf(tmp_path / "model.gguf")
  fails(tmp_path / "modle.gguf", r'no such file; did you mean ".*model.gguf"')
  fails(tmp_path / "none" / "m.gguf", "nor a folder")
  (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:200])
  fails(tmp_path / "cut.gguf", "not a readable GGUF")
  fails(_write_gguf(tmp_path / "l.gguf", model="llama"), "byte-level BPE")
  fails(_write_gguf(tmp_path / "m.gguf", merges=False), "byte-level BPE")
  fails(_write_gguf(tmp_path / "p.gguf", pre="other"), "'other' is not known")
  (tmp_path / "empty").mkdir()
  fails(tmp_path / "emty", r'no such file or folder; did you mean ".*/empty"')
  fails(tmp_path / "empty", "no tokenizer could be read")
  fails(good, "no.jinja: .*give a readable .jinja", chat_template="no.jinja")
