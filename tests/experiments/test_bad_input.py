"""Bad input: one line that names value, place and remedy; no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from lora_jax import api
from tests.experiments import conftest


def refused(done, code, *parts):
  """Asserts one error line with all of `parts`, and nothing like a trace."""
  assert done.code == code, done.err
  assert len(done.errors) == 1, done.err
  assert "Traceback" not in done.err and "Traceback" not in done.out
  for part in parts:
    assert str(part) in done.errors[0]


# Overrides -> what the line says. All of them are mistakes of usage.
USAGE = {
    "unknown key": (
        {"adapter__rnak": 8}, 'adapter.rnak is unknown; did you mean '
        '"adapter.rank"'),
    "key of another block": (
        {"train__rank": 8}, 'train.rank is unknown; did you mean '
        '"adapter.rank"'),
    "unknown block": (
        {"adaptor__rank": 8}, 'adaptor is unknown; did you mean '
        '"adapter.rank"'),
    "method": (
        {"adapter__method": "dorra"}, 'adapter.method="dorra" is unknown; did '
        'you mean "dora"?'),
    "init": (
        {"adapter__init": "pisa"}, 'adapter.init="pisa" is unknown; did you '
        'mean "pissa"?'),
    "token indices": (
        {"adapter__trainable_token_indices": "one"},
        "trainable_token_indices=one", "or new"),
    "modules to save": (
        {"adapter__modules_to_save": "lm_haed"}, "lm_haed", "lm_head"),
    "quant": (
        {"quant__format": "nf5"}, 'quant.format="nf5" is unknown; did you '
        'mean "nf4"?'),
    "schedule": (
        {"optim__schedule": "cosin"}, 'optim.schedule="cosin" is unknown; did '
        'you mean "cosine"?'),
    "dtype": (
        {"compute__dtype": "float33"}, 'compute.dtype="float33" is unknown; '
        'did you mean "float32"?'),
    "base dtype": (
        {"compute__base_dtype": "flaot16"}, "compute.base_dtype",
        'did you mean "float16"?'),
    "adapter dtype": (
        {"compute__adapter_dtype": "float16"},
        'compute.adapter_dtype="float16" is unknown'),
    "sink": (
        {"log__sinks": "tensorboard,wandbb"}, 'log.sinks="wandbb" is unknown; '
        'did you mean "wandb"?'),
    "remat": (
        {"compute__remat": "name"}, 'compute.remat="name" is unknown; did you '
        'mean "named"?'),
    "memory": (
        {"memory__budget_gib": -8.0}, "memory.budget_gib=-8.0 is out of range"),
    "micro-batch": (
        {"memory__micro_batch": 3}, "memory.micro_batch=3 does not divide "
        "train.batch_size=2; use 2"),
    "attention": (
        {"compute__attention": "cudn"}, 'compute.attention="cudn" is unknown; '
        'did you mean "cudnn"?'),
    "frozen matmul": (
        {"compute__frozen_matmul": "fp8"}, "frozen_matmul=fp8",
        "compute.dtype=bfloat16"),
    "data format": (
        {"data__format": "alpacca"}, 'data.format="alpacca" is unknown; did '
        'you mean "alpaca"?'),
    "overlong": (
        {"data__overlong": "trunc"}, 'data.overlong="trunc" is unknown; did '
        'you mean "truncate"?'),
    "type of rank": ({"adapter__rank": "eight"}, "adapter.rank", "eight"),
    "type of steps": ({"train__steps": "1.5"}, "train.steps", "1.5"),
    "type of packing": ({"data__packing": "perhaps"}, "packing", "perhaps"),
    "type of learning rate": (
        {"optim__learning_rate": "fast"}, "learning_rate", "fast"),
    "rank": ({"adapter__rank": 0}, "adapter.rank=0", "from 1 to 4096"),
    "dropout": ({"adapter__dropout": 1.0}, "adapter.dropout=1.0", "[0, 1)"),
    "learning rate": (
        {"optim__learning_rate": "1e30"}, "optim.learning_rate=1e+30",
        "from 0 to 100"),
    "negative learning rate": (
        {"optim__learning_rate": -1.0}, "optim.learning_rate=-1.0", "from 0"),
    "learning rate that is no number": (
        {"optim__learning_rate": "nan"}, "optim.learning_rate=nan", "from 0"),
    "eps": ({"optim__eps": -1.0}, "optim.eps=-1.0", "out of range"),
    "batch size": (
        {"train__batch_size": 0}, "train.batch_size=0", "at least 1"),
    "samples": ({"train__samples": -1}, "train.samples=-1", "at least 0"),
    "sample tokens": (
        {"train__sample_tokens": 0}, "train.sample_tokens=0", "at least 1"),
    "seed": ({"seed": -1}, "seed=-1", "at least 0"),
    "odd block": ({"quant__block_size": 7}, "quant.block_size=7", "even"),
    "targets": (
        {"adapter__targets": "qq_proj"}, "qq_proj", "q_proj"),
    "layers": (
        {"adapter__layers": "0-9"}, "adapter.layers names layer 2", "0 to 1"),
    "skip": ({"quant__skip": "lm_haed,embed_tokens"}, "quant.skip", "lm_haed",
             "lm_head"),
    "mesh": ({"mesh__data": 3}, "mesh.data=3", "use -1"),
    "eval rows": (
        {"data__eval_rows": 24}, "data.eval_rows=24", "24 rows", "lower it"),
}


def fast(cases, slow):
  """Cases as parameters; those that another test tells as well are slow: each
  loads a model."""
  return [pytest.param(x, marks=pytest.mark.slow) if x in slow else x
          for x in cases]


# tests/data/test_pipeline.py and test_formats.py, adapters/test_targets.py.
@pytest.mark.parametrize("case", fast(
    USAGE, ("layers", "overlong", "data format")))
def test_usage(case, run_command, tmp_path):
  overrides, *parts = USAGE[case]
  refused(run_command(tmp_path / "run", **overrides), 2, *parts)
  assert not (tmp_path / "run/checkpoints").exists()


VARIANTS = {
    ":method=dorra": 'did you mean "dora"',
    ":quant=nf5": 'did you mean "nf4"',
    ":metod=dora": 'did you mean "method"',
    ":data=gsm9k": 'did you mean "gsm8k"',
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, run_command, tmp_path):
  done = run_command(tmp_path / "run", variant=variant)
  refused(done, 2, VARIANTS[variant])


# Each starts an interpreter: one of what absl finds, one of what we find.
@pytest.mark.parametrize("argv, code, parts", [
    pytest.param([], 2, ["--config is missing"], marks=pytest.mark.slow),
    pytest.param(
        ["--config=configs/quikstart.py"], 2,
        ["configs/quikstart.py: no such file", "configs/quickstart.py"],
        marks=pytest.mark.slow),
    (["--config=configs/quickstart.py", "--workdri=x"], 2,
     ["workdri", "workdir"]),
    pytest.param(
        ["--config=configs/quickstart.py", "--config.adapter.rank=eight"], 2,
        ["adapter.rank", "eight"], marks=pytest.mark.slow),
    pytest.param(
        ["--config=configs/quickstart.py", "--config.data.path=none.jsonl",
         "--config.model.path=/nowhere/model"], 1, ["/nowhere/model"],
        marks=pytest.mark.slow),
], ids=["no config", "no such config", "flag", "type", "model"])
def test_from_a_shell(argv, code, parts, tmp_path):
  """The real `python -m experiments.run`."""
  refused(conftest.from_shell([*argv, f"--workdir={tmp_path}/run"]),
          code, *parts)


GOOD = [json.dumps(x) for x in conftest.messages(12)]
LONG = json.dumps({"messages": [
    {"role": "user", "content": "x" * 70},
    {"role": "assistant", "content": "y" * 30}]})
EMPTY = json.dumps({"messages": [
    {"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]})

# Lines of the data file -> overrides and what the error says.
DATA = {
    "malformed row": ([*GOOD[:2], '{"messages": [', *GOOD], {},
                      ["rows.jsonl:3: malformed JSON", "correct or delete"]),
    "row of another kind": ([*GOOD[:4], "[1, 2]", *GOOD], {},
                            ["rows.jsonl:5"]),
    "missing field": ([*GOOD[:4], '{"text": "x"}', *GOOD], {},
                      ["rows.jsonl:5", "is missing", "data.format"]),
    "role": ([*GOOD[:1], json.dumps({"messages": [
        {"role": "robot", "content": "x"}]}), *GOOD], {},
        ["rows.jsonl:2", "robot"]),
    "empty file": ([], {}, ["rows.jsonl", "is empty", "at least one row"]),
    "empty completion": ([*GOOD[:6], EMPTY, *GOOD], {}, ["rows.jsonl:7"]),
    "over-long row": ([*GOOD[:8], LONG, *GOOD], {"data__overlong": "error"},
                      ["rows.jsonl:9", "data.max_length=64", "raise it"]),
}


# tests/data/test_formats.py.
@pytest.mark.parametrize("case", fast(DATA, (
    "row of another kind", "missing field", "role", "empty completion")))
def test_data(case, run_command, tmp_path):
  lines, overrides, parts = DATA[case]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(line + "\n" for line in lines))
  done = run_command(tmp_path / "run", data__path=path, **overrides)
  refused(done, 1, *parts)


def test_missing_data_file(run_command, tmp_path):
  (tmp_path / "rows.jsonl").touch()
  done = run_command(tmp_path / "run", data__path=tmp_path / "row.jsonl")
  refused(done, 1, f"{tmp_path}/row.jsonl: no such file", "rows.jsonl")


def test_missing_model_folder(run_command, tmp_path):
  done = run_command(tmp_path / "run", model__path=tmp_path / "nothing")
  refused(done, 1, f"model.path={tmp_path}/nothing", "give a")


def test_missing_template_file(run_command, tmp_path):
  done = run_command(
      tmp_path / "run", model__chat_template=tmp_path / "chat.jinja")
  refused(done, 1, f"{tmp_path}/chat.jinja")


def _copy_model(run_command, tmp_path):
  return shutil.copytree(run_command.model, tmp_path / "model")


def test_model_cut_short(run_command, tmp_path):
  model = _copy_model(run_command, tmp_path)
  os.truncate(model / "model.safetensors", 40_000)
  done = run_command(tmp_path / "run", model__path=model)
  refused(done, 1, f"{model}/model.safetensors", "again")


def test_model_without_weights(run_command, tmp_path):
  model = _copy_model(run_command, tmp_path)
  (model / "model.safetensors").unlink()
  done = run_command(tmp_path / "run", model__path=model)
  refused(done, 1, model, "safetensors")


def test_model_with_a_broken_config(run_command, tmp_path):
  model = _copy_model(run_command, tmp_path)
  (model / "config.json").write_text('{"model_type": "llama"')
  done = run_command(tmp_path / "run", model__path=model)
  refused(done, 1, f"{model}/config.json")


def test_tokenizer_without_a_template(run_command, tmp_path):
  model = _copy_model(run_command, tmp_path)
  (model / "chat_template.jinja").unlink()
  done = run_command(tmp_path / "run", model__path=model)
  refused(done, 1, "chat template")


def test_adapter_of_another_base(run_command, tmp_path):
  """Same shapes, other weights; and other shapes."""
  adapter = tmp_path / "adapter"
  api.load(str(run_command.model)).adapt(rank=2).save(adapter)
  model = conftest.write_model(tmp_path / "other", key=5)
  done = run_command(
      tmp_path / "run", model__path=model, adapter__init_from=adapter)
  refused(done, 1, adapter, "fingerprint", model, "give the model")
  wide = conftest.write_model(
      tmp_path / "wide", conftest.model_config(d_ff=48))
  done = run_command(
      tmp_path / "run2", model__path=wide, adapter__init_from=adapter)
  refused(done, 1, adapter, "the adapter was made for another base")


def test_no_adapter_folder(run_command, tmp_path):
  done = run_command(
      tmp_path / "run", adapter__init_from=tmp_path / "nothing")
  refused(done, 1, f"{tmp_path}/nothing", "give a folder")


def test_work_directory_below_a_file(run_command, tmp_path):
  (tmp_path / "file").touch()
  done = run_command(tmp_path / "file/run")
  refused(done, 1, f"{tmp_path}/file/run", "choose another --workdir")


@pytest.fixture
def mounted(tmp_path):
  """Mounts `(name, options)` as small file systems; needs root."""
  folders = []

  def mount(name, *options):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)],
                          capture_output=True, text=True, check=False)
    if done.returncode:
      pytest.skip(f"cannot mount: {done.stderr.strip()}")
    folders.append(folder)
    return folder

  yield mount
  for folder in reversed(folders):
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_write_permission(run_command, mounted):
  folder = mounted("disk", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs")
  done = run_command(folder / "run")
  refused(done, 1, f"{folder}/run", "Read-only", "choose another --workdir")


# Five runs in a small file system; test_file_too_large fails at the same
# places.
@pytest.mark.slow
def test_full_disk(run_command, mounted, tmp_path):
  """The run stops, what is there stays, and goes on once there is room."""
  options = dict(train__checkpoint_every=1, train__eval_every=2,
                 quant__format="none")
  whole = tmp_path / "whole"
  assert run_command(whole, **options).code == 0
  folder = mounted("disk", "-t", "tmpfs", "-o", "size=4m", "tmpfs")
  # What is left is enough for the first checkpoints only.
  ballast = folder / "ballast"
  stops = set()
  for free in (60_000, 300_000):
    ballast.unlink(missing_ok=True)
    space = os.statvfs(folder)
    ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - free))
    done = run_command(folder / "run", **options)
    refused(done, 1, "No space left", "free space", f"{folder}/run")
    stops.add(done.errors[0])
    steps = [x["step"] for x in conftest.metrics(folder / "run")
             if "loss" in x]
    assert steps == list(range(1, len(steps) + 1))
  assert any("checkpoint of step" in x for x in stops), stops
  ballast.unlink()
  done = run_command(folder / "run", **options)
  assert done.code == 0, done.err
  assert conftest.tensors(folder / "run") == conftest.tensors(whole)


@pytest.mark.parametrize("limit", [600, 3000])
def test_file_too_large(limit, run_command, tmp_path):
  """Another way to run out of space, without root."""
  done = run_command(tmp_path / "run", limit=limit, quant__format="none")
  assert done.code == 1
  assert len(done.errors) == 1, done.err
  assert "Traceback" not in done.err
  assert str(tmp_path / "run") in done.errors[0]
