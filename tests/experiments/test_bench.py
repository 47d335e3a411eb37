"""The benchmark: its numbers by hand, and every part of it on CPU."""

from __future__ import annotations

import json
import math
import sys

from absl import flags
import jax
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import child
from experiments.bench import decode
from experiments.bench import flops
from experiments.bench import geometry
from experiments.bench import isolated
from experiments.bench import kernels
from experiments.bench import lines
from experiments.bench import table
from experiments.bench import timing
from experiments.bench import train
from lora_jax import errors
from lora_jax.models import hf
from lora_jax.models import remat
from tests.experiments import conftest

# Parameters as the models' authors count them (embeddings and head included,
# a tied head once).
TOTALS = {
    "smollm2-135m": 134_515_008, "qwen2.5-1.5b": 1_543_714_304,
    "llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248,
    "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192}


@pytest.mark.parametrize("name", TOTALS)
def test_geometries_are_those_of_the_models(name):
  shapes = hf.names(geometry.GEOMETRIES[name]).values()
  assert sum(map(math.prod, shapes)) == TOTALS[name]


def test_fields_of_a_geometry_can_be_changed():
  found = geometry.geometry(
      "llama2-7b", "n_layers=4, norm_eps=1,tie_embeddings=True,"
      "sliding_window=8,family=mistral")
  assert (found.n_layers, found.d_model, found.tie_embeddings) == (
      4, 4096, True)
  assert (found.sliding_window, found.family) == (8, "mistral")
  assert isinstance(found.norm_eps, float)


@pytest.mark.parametrize("name, changes, message", [
    ("llama2-7", "", 'did you mean "llama2-7b"'),
    ("tiny", "layers=4", 'did you mean "n_layers"'),
    ("tiny", "n_layers=four", "n_layers=four is no int"),
    ("tiny", "n_layers=True", "n_layers=True is no int"),
    ("tiny", "n_layers", "n_layers= is no int"),
    ("tiny", "eos_ids=2", "eos_ids=2 is no tuple"),
])
def test_what_is_no_geometry(name, changes, message):
  with pytest.raises(errors.UsageError, match=message):
    geometry.geometry(name, changes)


def test_operations_by_hand():
  tiny = geometry.GEOMETRIES["tiny"]
  # q and o 64x64, k and v 64x32, three of 64x128, in 2 layers; 64x512.
  assert flops.matmul_parameters(tiny) == 2 * (
      2 * 4096 + 2 * 2048 + 3 * 8192) + 32768
  # The peers' `n_matmul` of this geometry.
  assert flops.matmul_parameters(
      geometry.GEOMETRIES["llama2-7b"]) == 6_607_077_376
  # 4 heads of 16, 2 layers; each token sees half of its segment's 8 tokens:
  # 2 (products) x 2 (operations) x 16 x 4 x 4 x 2.
  assert flops.attention(tiny, [8, 8]) == 2048
  # Segments of 2 and 6 tokens: (2^2 + 6^2) / 2 = 20 pairs for 8 tokens.
  assert flops.attention(tiny, [2, 6]) == 4 * 16 * 4 * 20 / 8 * 2
  # A window of 2 over 6 tokens: 2 x 6 - 2^2 / 2 = 10 pairs.
  window = geometry.geometry("tiny", "sliding_window=2")
  assert flops.attention(window, [6]) == 4 * 16 * 4 * 10 / 6 * 2
  # As if the window were longer.
  window = geometry.geometry("tiny", "sliding_window=9")
  assert flops.attention(window, [8, 8]) == 2048
  assert flops.train_token(tiny, [8]) == 4 * 106_496 + 3 * 2048
  assert flops.train_token(tiny, [8], True) == 6 * 106_496 + 3 * 2048


def test_rows_are_full_and_segments_contiguous():
  whole, lengths = train.batch((2, 3, 16), 50, packed=0)
  assert lengths == [16] * 6
  assert (whole.segment_ids == 1).all()
  np.testing.assert_array_equal(
      whole.positions, np.broadcast_to(np.arange(16), (2, 3, 16)))
  packed, lengths = train.batch((1, 3, 16), 50, packed=4)
  assert len(lengths) == 12 and sum(lengths) == 48 and min(lengths) > 0
  assert (packed.loss_weights == 1).all() and (packed.segment_ids > 0).all()
  assert packed.tokens.min() >= 0 and packed.tokens.max() < 50
  np.testing.assert_array_equal(
      packed.targets[..., :-1], packed.tokens[..., 1:])
  row = packed.segment_ids[0, 1]
  first = lengths[4]
  assert row[:first + 1].tolist() == [1] * first + [2]
  assert packed.positions[0, 1, :first + 1].tolist() == [*range(first), 0]
  assert (np.diff(row) >= 0).all() and row[-1] == 4
  with pytest.raises(errors.UsageError, match="do not fit rows of 16"):
    train.batch((1, 1, 16), 50, packed=17)


def test_the_least_memory_comes_first():
  assert train.cases({"shapes": "4x64,1x64", "remat": "none,full"}) == [
      ("full", (1, 64)), ("full", (4, 64)), ("none", (1, 64)),
      ("none", (4, 64))]
  assert {*train.SAVED, "auto"} == set(remat.POLICIES)


class Pending:
  """Stands for an array that becomes ready when it is waited for."""

  def __init__(self, events):
    self.events, self.number = events, len(events)
    events.append("issue")

  def block_until_ready(self):
    self.events.append("wait")
    return self


def test_calls_are_issued_ahead_and_all_are_waited_for():
  events = []
  moments = timing.completions(lambda: Pending(events), 3)
  # The last has no moment: there is none behind it.
  assert events == ["issue", "issue", "wait", "issue", "wait", "issue",
                    "wait", "wait"]
  assert len(moments) == 3 and moments == sorted(moments)


def test_times_are_of_one_call(monkeypatch):
  clock, calls = [0.0], []
  monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

  def call():
    calls.append(None)
    clock[0] += 4.0

  assert timing.steps(call, 3, warmup=2).seconds == (4.0,) * 3
  assert len(calls) == 2 + 3 + 1  # One is ahead.
  del calls[:]
  # One takes 4 s: 20 s are 5 calls.
  assert timing.repeated(call, n=2, least=20.0).seconds == (4.0,) * 2
  # To compile, to see how long it takes, before the first moment, ahead.
  assert len(calls) == 4 + 2 * 5
  row = timing.Times((3.0, 1.0, 2.0)).row("s")
  assert row == {"s": 2.0, "s_min": 1.0, "s_max": 3.0, "n": 3}


def test_decoding_rates_by_hand():
  # 9 tokens beside the first in 1.8 s.
  found = decode.row(4, 10, [0.2, 0.1, 0.3], [2.0, 2.2, 1.9], 10**9)
  assert found["token_s"] == pytest.approx(0.2)
  assert found["tokens_per_s"] == pytest.approx(20)
  assert found["request_tokens_per_s"] == pytest.approx(20)
  assert found["gb_per_s"] == pytest.approx(5)
  with pytest.raises(errors.UserError, match="took no longer"):
    decode.row(4, 10, [0.2], [0.2], 1)


def test_shares_are_of_the_same_run():
  shares = lines.Shares()
  assert shares({"part": "train", "model_tflops": 2.0})[
      "share_of_matmul"] is None
  shares({"part": "ceilings", "name": "matmul bfloat16", "tflops": 8.0})
  shares({"part": "ceilings", "name": "copy", "gb_per_s": 50.0})
  assert shares({"part": "train", "model_tflops": 2.0})[
      "share_of_matmul"] == 0.25
  assert shares({"part": "kernels", "gb_per_s": 5.0})["share_of_copy"] == 0.1
  assert "share_of_copy" not in shares({"part": "startup"})


def test_copies_span_the_bytes():
  assert kernels.copies(100, 30) == 4
  assert kernels.copies(100, 200) == 1
  assert kernels.copies(10**9, 1) == kernels.MOST_COPIES


ARGUMENTS = {
    "model__changes": "n_layers=1", "adapter__targets": "q_proj",
    "train__shapes": "2x16", "train__remat": "full",
    "train__packed": 3, "train__accumulation": 2,
    "decode__batches": "3", "decode__new": 128,
    "kernels__shapes": "64x96", "kernels__formats": "nf4,int8",
    "kernels__span_bytes": 2**15, "ceilings__matmul": 64,
    "ceilings__copy_bytes": 2**16}


def run(monkeypatch, *argv, isolate=child.execute, **overrides):
  """The command's main, by default in this process."""
  argv = ["bench", f"--config={conftest.ROOT}/configs/bench.py", *argv]
  argv += [f"--config.{name.replace('__', '.')}={value}"
           for name, value in (ARGUMENTS | overrides).items()]
  monkeypatch.setattr(sys, "argv", argv)
  monkeypatch.setattr(timing, "LEAST", 1e-3)
  values = flags.FlagValues()
  bench.define_flags(values)
  values(argv)
  bench.main(values, isolate)


def read(path):
  return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """The lines of all parts that need no process of their own."""
  path = tmp_path_factory.mktemp("bench") / "out.jsonl"
  with pytest.MonkeyPatch.context() as patch:
    run(patch, f"--output={path}", parts="ceilings,kernels,train,decode")
  return read(path)


def of(measured, part):
  return [line for line in measured if line["part"] == part]


def test_every_line_says_where_it_comes_from(measured):
  for line in measured:
    assert line["device"] == jax.devices()[0].device_kind
    assert line["compilation_cache"]  # tests/conftest.py
    assert line["jax"] == jax.__version__ and len(line["commit"]) >= 40
    assert line["command"].startswith(
        "python -m experiments.bench --config=")
    assert line["time"].endswith("+00:00")


def test_ceilings(measured):
  copy, matmul, fp8, pinned = of(measured, "ceilings")
  assert copy["bytes"] == 2 * 2**16
  assert copy["gb_per_s"] == pytest.approx(
      copy["bytes"] / copy["call_s"] / 1e9, rel=1e-4)
  assert matmul["tflops"] == pytest.approx(
      2 * 2 * 64**3 / matmul["call_s"] / 1e12, rel=1e-4)
  assert fp8["error"] == "cpu has no products in float8"
  assert "gb_per_s" in pinned or "no pinned_host memory" in pinned["error"]


def test_kernels(measured):
  found = of(measured, "kernels")
  assert [(x["name"], x["format"]) for x in found] == [
      ("dequantise", "nf4"), ("dequantise", "int8"), ("matmul", "nf4"),
      ("matmul", "int8")]
  copy = of(measured, "ceilings")[0]["gb_per_s"]
  # Codes, 8-bit scales of blocks of 64, one scale of 256 of them, an offset.
  packed = {"nf4": 64 * 96 // 2 + 96 + 4 + 4, "int8": 64 * 96 + 96 + 4 + 4}
  for line in found:
    n = line["copies"]
    assert line["packed_bytes"] == n * packed[line["format"]]
    x, y = (0, n * 64 * 96) if line["name"] == "dequantise" else (64, n * 96)
    assert line["read_bytes"] == line["packed_bytes"] + 4 * x
    assert line["written_bytes"] == 4 * y
    total = line["read_bytes"] + line["written_bytes"]
    assert total >= 2**15 or n == kernels.MOST_COPIES
    assert line["gb_per_s"] == pytest.approx(
        total / line["call_s"] / 1e9, rel=1e-4)
    assert line["share_of_copy"] == pytest.approx(
        line["gb_per_s"] / copy, rel=1e-4)


def test_training(measured):
  line, = of(measured, "train")
  ceiling = of(measured, "ceilings")[1]["tflops"]
  assert line["tokens_per_s"] == pytest.approx(
      2 * line["batch"] * 16 / line["step_s"], rel=1e-4)
  assert line["model_tflops"] == pytest.approx(
      line["tokens_per_s"] * line["flops_per_token"] / 1e12, rel=1e-4)
  assert line["share_of_matmul"] == pytest.approx(
      line["model_tflops"] / ceiling, rel=1e-4)
  # One layer of 36,864, and the head; segments are shorter than rows.
  assert line["matmul_parameters"] == 36_864 + 32_768
  least = 4 * line["matmul_parameters"]
  assert least < line["flops_per_token"] < least + 3 * 2 * 4 * 16 * 16
  assert line["step_s_min"] <= line["step_s"] <= line["step_s_max"]
  assert line["n"] == 3 and line["finite"] and line["falling"]
  # A uniform guess over 512 tokens, and the spread of random logits.
  assert abs(line["loss_first"] - math.log(512) - 0.5) < 0.5
  assert line["trainable"] == 16 * (64 + 64)
  assert line["compile_s"] > 0 and line["temporary_bytes"] > 0
  # The embeddings alone, in float32.
  assert line["argument_bytes"] > 512 * 64 * 4
  assert line["packed"] == 3 and line["remat"] == "full"


def test_decoding(measured):
  line, = of(measured, "decode")
  codes = 36_864 // 2
  # Head and three norms in float32 beside the codes; scales are less.
  least = codes + 4 * (64 * 512 + 3 * 64)
  assert least < line["weight_bytes"] < least + codes / 10
  assert line["tokens_per_s"] == pytest.approx(
      line["batch"] / line["token_s"], rel=1e-4)
  assert line["share_of_copy"] is not None


def test_a_part_that_fails_does_not_stop_the_others(
    monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(child.PARTS, "kernels", lambda config, emit: 1 / 0)
  path = tmp_path / "out.jsonl"
  run(monkeypatch, f"--output={path}", parts="kernels,ceilings")
  first, *rest = read(path)
  assert first["error"] == "ZeroDivisionError: division by zero"
  assert [line["part"] for line in rest] == ["ceilings"] * 4
  out = capsys.readouterr().out
  assert "kernels: all: ZeroDivisionError: division by zero" in out
  assert "ceilings: matmul float8: cpu has no products" in out


@pytest.mark.parametrize("overrides, message", [
    ({"parts": "trian"}, 'parts="trian" is unknown; did you mean "train"'),
    ({"train__shapes": "4*2048"}, "is no shape; write 4x2048"),
    ({"train__shapes": ""}, "train.shapes is empty"),
    ({"train__remat": "fall"}, 'did you mean "full"'),
    ({"decode__batches": "0"}, "is no positive integer"),
    ({"kernels__formats": "nf5"}, "kernels.formats"),
    ({"train__steps": 0}, "train.steps=0 is out of range"),
    ({"decode__new": 5000}, "beyond the geometry's context of 4096"),
    ({"adapter__method": "lra"}, "adapter.method"),
])
def test_what_is_wrong_is_said_before_anything_runs(
    monkeypatch, overrides, message):
  with pytest.raises(errors.UsageError, match=message):
    run(monkeypatch, isolate=None, **overrides)


# Starts processes; what they print is checked above.
@pytest.mark.slow
def test_starts_in_processes_of_their_own(monkeypatch, tmp_path):
  path = tmp_path / "out.jsonl"
  run(monkeypatch, f"--output={path}", parts="startup", train__packed=0,
      isolate=isolated.run, train__shapes="1x8", train__accumulation=1)
  empty, filled = read(path)
  assert (empty["cache"], filled["cache"]) == ("empty", "filled")
  for line in (empty, filled):
    assert 0 < line["imports_s"] < line["model_s"] < line["first_step_s"]
  # The second start found every program.
  assert empty["cached_programs"] == filled["cached_programs"] > 5


def test_programs_that_end_badly():
  def ends(code, limit=60.0):
    return list(isolated.json_lines([sys.executable, "-c", code], limit))

  assert ends("print('note'); print('{\"a\": 1}'); print('[1]')") == [
      {"a": 1}]
  with pytest.raises(isolated.Failed, match="exit code 3: last"):
    ends("import sys; print('first\\nlast\\n', file=sys.stderr); sys.exit(3)")
  with pytest.raises(isolated.Failed, match="signal 9: nothing said"):
    ends("import os; os.kill(os.getpid(), 9)")
  with pytest.raises(isolated.Failed, match=r"no end after 0\.5 s"):
    ends("import time; time.sleep(60)", 0.5)


def test_rows_are_readable():
  shown = []
  show = table.Table(shown.append)
  show({"part": "train", "name": "step", "geometry": "llama2-7b",
        "format": "nf4", "method": "lora", "rank": 16, "dtype": "bfloat16",
        "batch": 4, "length": 2048, "remat": "named", "packed": 0,
        "step_s": 0.5, "step_s_min": 0.49, "step_s_max": 0.52,
        "tokens_per_s": 16384.0, "model_tflops": 459.4,
        "share_of_matmul": 0.638, "peak_bytes": 2**34,
        "peak_bytes_before": 2**34, "argument_bytes": 2**32,
        "temporary_bytes": 3 * 2**33, "compile_s": 12.34,
        "loss_first": 10.9, "loss_last": 8.25, "finite": True})
  heading, row = shown
  assert heading.startswith("\ntrain ")
  assert [cell.strip() for cell in row.split("  ") if cell.strip()] == [
      "llama2-7b nf4 lora r=16 bfloat16", "4x2048", "named",
      "500 [490, 520]", "16,384", "459", "63.8", "<=16", "4+24", "12.3",
      "10.900 -> 8.250"]
