"""The commands for after training, on a tiny model with a byte tokenizer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

from absl import flags
import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import common
from experiments import evaluate
from experiments import export
from experiments import generate
from lora_jax import api
from lora_jax import errors
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import templates
from lora_jax.evaluate import generate as generate_lib
from lora_jax.export import hf as hf_export
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from tests import tiny

CONFIG = dataclasses.replace(
    tiny.CONFIGS["qwen3"], vocab_size=258, max_position=256, eos_ids=(257,))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base") / "model"
  hf_export.write(folder, CONFIG, init.random_base(jax.random.key(1), CONFIG),
                  tokenizer=tiny.byte_tokenizer())
  return folder


@pytest.fixture(scope="module")
def model(model_path):
  """NF4 with a random LoRA, as `workdir` holds it."""
  plain = api.load(str(model_path), quant="nf4").adapt(
      rank=2, targets="q_proj,v_proj", seed=3)
  noisy = tiny.random_adapters(
      plain.config, plain.base, plain.adapter_config)
  return dataclasses.replace(plain, adapters=noisy)


@pytest.fixture(scope="module")
def workdir(model, model_path, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "run"
  _config(folder, model_path, "lora")
  model.save(folder / "adapter")
  return folder


def _config(folder, model_path, method):
  folder.mkdir(parents=True)
  config = common.get_config()
  config.model.path = str(model_path)
  config.adapter.method = method
  (folder / "config.json").write_text(config.to_json_best_effort())


def _run(command, **options):
  """A command's main with flags of its own."""
  values = flags.FlagValues()
  command.define_flags(values)
  argv = [f"--{name}={value}" for name, given in options.items()
          for value in (given if isinstance(given, list) else [given])]
  assert values(["command", *map(str, argv)]) == ["command"]
  command.main(values)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """(file, characters that carry loss) of every kind and length."""
  file = tmp_path_factory.mktemp("data") / "rows.jsonl"
  long = "ab" * 90
  found = [
      ({"text": "hello there"}, 10),
      ({"prompt": "2+2=", "completion": "four"}, 5),  # And EOS.
      ({"messages": [{"role": "user", "content": "hi"},
                     {"role": "assistant", "content": "you"}]}, 4),
      ({"text": long}, 179),
      ({"text": "x"}, 0),
      ({"prompt": long, "completion": "é"}, 3),
  ]
  return file, found


def _write_rows(rows):
  """Each format in a file of its own, then all rows in one."""
  file, found = rows
  for key in ("text", "prompt", "messages"):
    part = [r for r, _ in found if key in r]
    path = file.with_name(f"{key}.jsonl")
    path.write_text("".join(json.dumps(r) + "\n" for r in part))
    yield path, [n for r, n in found if key in r]
  file.write_text("".join(json.dumps(r) + "\n" for r, _ in found))
  yield file, [n for _, n in found]


def test_evaluate_writes_rows_in_order(workdir, model, rows, tmp_path, capsys):
  for path, counts in _write_rows(rows):
    output = tmp_path / "out" / f"{path.stem}.jsonl"
    _run(evaluate, workdir=workdir, data=path, output=output,
         batch_tokens=100)
    lines = [json.loads(x) for x in output.read_text().splitlines()]
    assert [x["tokens"] for x in lines] == counts
    assert all(set(x) == {"tokens", "nll"} for x in lines)
    # One row a batch, all at one length: as plain as can be.
    for line, row in zip(
        lines, evaluate.encode(model, str(path), "mixed"), strict=True):
      tokens = np.zeros((1, 256), np.int32)
      n = len(row.tokens)
      tokens[0, :n] = row.tokens
      positions = np.arange(256)[None]
      logits = np.asarray(tiny.logits(
          model.config, model.base, tokens, positions,
          (positions < n).astype(np.int32), model.adapters)[0, :n - 1],
          np.float64)
      top = logits.max(-1, keepdims=True)
      log_p = logits - top - np.log(
          np.exp(logits - top).sum(-1, keepdims=True))
      nll = -log_p[np.arange(n - 1), row.tokens[1:]] @ row.weights[1:]
      assert line["nll"] == pytest.approx(nll, rel=1e-5, abs=1e-6)
    printed = capsys.readouterr().out
    total, tokens = sum(x["nll"] for x in lines), sum(counts)
    assert f"rows {len(lines)}  tokens {tokens}  nll {total:.4f}" in printed
    assert f"loss {total / tokens:.6f}" in printed
    assert f"perplexity {np.exp(total / tokens):.4f}" in printed


def test_evaluate_equals_transformers_and_peft(
    workdir, model_path, rows, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  import transformers

  (path, _), *_ = _write_rows(rows)
  _run(evaluate, model=model_path, adapter=workdir / "adapter", data=path,
       output=tmp_path / "out.jsonl")
  lines = (tmp_path / "out.jsonl").read_text().splitlines()
  reference = peft.PeftModel.from_pretrained(
      transformers.AutoModelForCausalLM.from_pretrained(
          model_path, attn_implementation="eager"), workdir / "adapter")
  tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
  for line, text in zip(lines, path.read_text().splitlines(), strict=True):
    ids = tokenizer(json.loads(text)["text"], return_tensors="pt").input_ids
    with torch.no_grad():
      logits = reference(ids).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(
        logits, ids[0, 1:], reduction="sum").item()
    assert json.loads(line)["nll"] == pytest.approx(nll, rel=2e-5, abs=1e-6)


def test_batches_are_bounded_and_complete():
  lengths = [1, 300, 31, 32, 33, 64, 65, 70, 5, 1000]
  encoded = [
      templates.Encoded(
          np.full(n, 7, np.int32), np.ones(n, np.float32)) for n in lengths]
  seen, shapes = [], set()
  for batch, indices in evaluate.batches(
      dataset_lib.of(encoded), 128):
    b, t = batch.tokens.shape
    assert b * t <= 128 or b == 1
    shapes.add((b, t))
    for row, index in enumerate(indices.tolist()):
      n = int((batch.segment_ids[row] > 0).sum())
      assert n == lengths[index] and t < 2 * max(n, 32)
      seen.append(index)
  assert sorted(seen) == list(range(len(lengths)))
  assert len(shapes) == len({evaluate.bucket(n) for n in lengths})
  assert [evaluate.bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 97)] == [
      32, 32, 48, 48, 64, 64, 96, 128]


def test_generate_streams_one_prompt(workdir, model, capsys):
  _run(generate, workdir=workdir, prompt="hi", max_new_tokens=8)
  prompt = [*b"[user]hi", 257, *b"[assistant]"]
  alphabet = model.tokenizer.convert_ids_to_tokens(list(range(256)))
  assert len(set(alphabet)) == 256
  ids = generate.encode(model, ["hi"], False, None)[0]
  assert len(ids) == len(prompt) and ids.count(257) == 1
  expected = generate_lib.generate(
      model.config, model.base, model.adapters, [ids], max_new_tokens=8,
      stop_ids=[257])[0]
  assert capsys.readouterr().out == model.tokenizer.decode(
      expected, skip_special_tokens=True) + "\n"


def test_generate_answers_several_prompts_raw(workdir, model, capsys):
  _run(generate, workdir=workdir, prompt=["ab", "c"], max_new_tokens=8,
       temperature=0.8, top_k=50, top_p=0.9, seed=4, raw="true")
  ids = [model.tokenizer.encode(p) for p in ("ab", "c")]
  texts = [
      model.tokenizer.decode(x, skip_special_tokens=True)
      for x in generate_lib.generate(
          model.config, model.base, model.adapters, ids, max_new_tokens=8,
          temperature=0.8, top_k=50, top_p=0.9, seed=4, stop_ids=[257])]
  assert capsys.readouterr().out == (
      f"> ab\n{texts[0]}\n\n> c\n{texts[1]}\n")


def test_export_peft_and_hf(workdir, model, tmp_path, capsys):
  _run(export, workdir=workdir, format="peft", output=tmp_path / "p")
  for name in (peft_export.CONFIG, peft_export.WEIGHTS):
    assert ((tmp_path / "p" / name).read_bytes()
            == (workdir / "adapter" / name).read_bytes())
  _run(export, workdir=workdir, format="hf", output=tmp_path / "h")
  named = safetensors.numpy.load_file(tmp_path / "h" / "model.safetensors")
  expected = dict(hf_export.merged(model.config, model.base,
                                   model.adapters)[1])
  assert named.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(named[name], value)
  assert (tmp_path / "h" / "tokenizer.json").exists()
  assert "MB (hf)" in capsys.readouterr().out


def test_full_fine_tuning_is_read_from_its_model(
    model_path, tmp_path, capsys):
  folder = tmp_path / "run"
  _config(folder, model_path, "full")
  with pytest.raises(errors.UserError, match="has saved no model yet"):
    _run(generate, workdir=folder, prompt="a")
  other = init.random_base(jax.random.key(8), CONFIG)
  hf_export.write(folder / "model", CONFIG, other,
                  tokenizer=tiny.byte_tokenizer())
  _run(generate, workdir=folder, prompt="a", raw="true", max_new_tokens=8)
  tokenizer = tiny.byte_tokenizer()
  expected = generate_lib.generate(
      CONFIG, other, None, [tokenizer.encode("a")], max_new_tokens=8,
      stop_ids=[257])[0]
  assert capsys.readouterr().out == tokenizer.decode(
      expected, skip_special_tokens=True) + "\n"
  with pytest.raises(errors.UserError, match="use --format=hf"):
    _run(export, workdir=folder, format="peft", output=tmp_path / "p")


def _row(**row):
  return json.dumps(row) + "\n"


@pytest.mark.parametrize("command, options, message", [
    (generate, {}, "--prompt is missing"),
    (generate, {"prompt": "a"}, "--workdir or --model is missing"),
    (generate, {"prompt": ""}, '--prompt="" is empty'),
    (generate, {"prompt": "a", "workdir": "W", "model": "M"}, "two models"),
    (generate, {"prompt": "a", "workdir": "W", "quant": "nf4"},
     "--quant belongs to --model"),
    (generate, {"prompt": "a", "model": "M", "quant": "nf5"},
     'did you mean "nf4"'),
    (generate, {"prompt": "a", "model": "M", "top_p": 2}, "top_p=2.0"),
    (generate, {"prompt": "a", "model": "M", "max_new_tokens": 0},
     "--max_new_tokens=0"),
    (generate, {"prompt": "a", "model": "M", "dtype": "float23"},
     'did you mean "float32"'),
    (generate, {"prompt": "a", "model": "M", "raw": "true", "system": "x"},
     "--system belongs to the chat template"),
    (generate, {"prompt": "a", "workdir": "missing"},
     "config.json does not exist.*experiments.run"),
    (generate, {"prompt": "a" * 300, "workdir": "W"}, "prompt 0 has 3.*256"),
    (export, {"workdir": "W", "output": "new"}, "--format is missing"),
    (export, {"workdir": "W", "output": "new", "format": "peff"},
     'did you mean "peft"'),
    (export, {"workdir": "W", "format": "hf"}, "--output is missing"),
    (export, {"workdir": "W", "format": "hf", "output": "W"}, "is not empty"),
    (export, {"workdir": "W", "format": "hf", "output": "FILE"}, "is a file"),
    (export, {"workdir": "W", "format": "hf", "output": "new",
              "dtype": "int8"}, '--dtype="int8" is unknown'),
    (export, {"workdir": "W", "format": "peft", "output": "new",
              "dtype": "bfloat16"}, "--dtype=bfloat16 belongs to"),
    (export, {"model": "M", "format": "peft", "output": "new"},
     "has no adapter"),
    (evaluate, {"model": "M"}, "--data is missing"),
    (evaluate, {"model": "M", "data": "FILE"}, "--output is missing"),
    (evaluate, {"model": "M", "data": "FILE", "output": "W"}, "is a folder"),
    (evaluate, {"model": "M", "data": "FILE", "output": "FILE/x"},
     "cannot be written"),
    (evaluate, {"model": "M", "data": "FILE", "output": "new",
                "batch_tokens": 0}, "--batch_tokens=0"),
    (evaluate, {"model": "M", "data": "FILE", "output": "new"},
     "long.jsonl:2: the row has 300 tokens.*max_position.* is 256"),
    (evaluate, {"model": "M", "data": "SHORT", "output": "new"},
     "no row has a token to predict"),
    (evaluate, {"model": "M", "data": "gone.jsonl", "output": "new"},
     "gone.jsonl: no such file"),
])
def test_refused(command, options, message, workdir, model_path, tmp_path):
  file, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
  file.write_text(_row(text="ok") + _row(text="x" * 300))
  short.write_text(_row(text="x"))
  places = {"W": workdir, "M": model_path, "FILE": file, "SHORT": short,
            "FILE/x": file / "x"}
  options = {
      k: places.get(v, tmp_path / v if k in (
          "workdir", "output", "data") else v) for k, v in options.items()}
  before = sorted(p.name for p in tmp_path.iterdir())
  with pytest.raises(errors.UserError, match=message) as caught:
    _run(command, **options)
  assert "\n" not in str(caught.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_damaged_workdir(workdir, tmp_path):
  for text in ("", "[]", "{}", '{"model": 1}'):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(errors.UserError, match="is not the config of a run"):
      _run(generate, workdir=tmp_path, prompt="a")


def test_as_a_command(workdir, tmp_path):
  """One line on stderr and an exit code; the flags are those of --help."""

  def run(*argv):
    return subprocess.run(
        [sys.executable, "-m", "experiments.export", *argv], timeout=120,
        capture_output=True, text=True, check=False)

  done = run(f"--workdir={workdir}", "--format=peft",
             f"--output={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "out" / peft_export.WEIGHTS).exists()
  again = run(f"--workdir={workdir}", "--format=peft",
              f"--output={tmp_path / 'out'}")
  assert again.returncode == 1 and "Traceback" not in again.stderr
  assert again.stderr.strip().splitlines() == [
      f"error: --output={tmp_path / 'out'} is not empty; delete it, or name "
      "another folder"]
