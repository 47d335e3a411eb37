"""What a work directory holds, and when what is written."""

from __future__ import annotations

import json
import os
import pty

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import api
from lora_jax.train import compiles
from lora_jax.train import loop
from lora_jax.train import optim
from tests.experiments import conftest

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(run_command, tmp_path_factory):
  """(folder, what was printed) of a run with everything switched on."""
  folder = tmp_path_factory.mktemp("contract") / "run"
  done = run_command(
      folder, train__samples=2, train__eval_every=2,
      optim__learning_rate=0.01)
  assert done.code == 0, done.err
  return folder, done


def test_every_file_is_there(finished):
  folder, _ = finished
  names = {p.name for p in folder.iterdir()}
  assert names == {
      "config.json", "environment.json", "inputs.json", "metrics.jsonl",
      "samples.md", "checkpoints", "adapter", "summary.json", "loss.png",
      "evals"}
  assert (folder / "loss.png").read_bytes().startswith(PNG)
  assert {p.name for p in (folder / "adapter").iterdir()} == {
      "adapter_config.json", "adapter_model.safetensors"}
  text = (folder / "samples.md").read_text()
  assert text.count("**Reference**") == 2
  assert text.count("**Before training**") == 2
  assert text.count("**After 4 steps**") == 2


def test_config_is_whole(finished):
  config = json.loads((finished[0] / "config.json").read_text())
  wanted = {
      "seed": (), "model": ("path",),
      "quant": ("format", "block_size", "double"),
      "adapter": ("method", "rank", "alpha", "dropout", "targets",
                  "init_from"),
      "data": ("path", "format", "max_length", "packing"),
      "train": ("steps", "batch_size", "accumulation", "log_every",
                "eval_every", "checkpoint_every"),
      "optim": ("learning_rate", "schedule", "warmup", "weight_decay",
                "clip_norm"),
      "mesh": (), "compute": ("dtype", "remat", "attention")}
  for block, names in wanted.items():
    assert block in config
    assert set(names) <= set(config[block] if names else ())
  assert config["adapter"]["rank"] == 2  # From the command line.
  assert config["optim"]["schedule"] == "cosine"  # From common.py.


def test_environment_says_what_a_result_depends_on(finished):
  found = json.loads((finished[0] / "environment.json").read_text())
  assert found["versions"]["jax"] == jax.__version__
  assert found["versions"]["numpy"] == np.__version__
  assert found["backend"] == "cpu"
  assert found["threads"] == len(os.sched_getaffinity(0))
  assert found["seeds"] == {"run": 0}
  assert {"python", "device", "git_commit", "command"} <= found.keys()


def test_metrics_have_the_named_fields(finished):
  lines = conftest.metrics(finished[0])
  steps = [x for x in lines if "loss" in x]
  evals = [x for x in lines if "eval_loss" in x]
  assert all(x.keys() == {"step", "loss", "grad_norm", "lr", "tokens",
                          "tokens_per_s"} for x in steps)
  assert all(x.keys() == {"step", "eval_loss", "perplexity"} for x in evals)
  assert [x["step"] for x in lines] == [0, 1, 2, 2, 3, 4, 4]
  for x in evals:
    np.testing.assert_allclose(x["perplexity"], np.exp(x["eval_loss"]))
  config = optim.OptimConfig(learning_rate=0.01, warmup=0.1)
  np.testing.assert_array_equal(
      [x["lr"] for x in steps], optim.learning_rates(config, 4))


def test_summary_adds_up(finished):
  folder, done = finished
  found = json.loads((folder / "summary.json").read_text())
  evals = [x for x in conftest.metrics(folder) if "eval_loss" in x]
  rows = {s: json.loads((folder / "evals" / f"{s}.json").read_text())
          for s in (0, 4)}
  loss = {s: sum(x["nll"]) / sum(x["weight"]) for s, x in rows.items()}
  assert found["initial_eval_loss"] == evals[0]["eval_loss"]
  np.testing.assert_allclose(found["initial_eval_loss"], loss[0])
  np.testing.assert_allclose(found["final_eval_loss"], loss[4])
  np.testing.assert_allclose(found["eval_loss_change"], loss[4] - loss[0])
  low, high = found["eval_loss_change_95"]
  assert low <= found["eval_loss_change"] <= high < 0
  assert found["eval_rows"] == 6
  best = min(evals, key=lambda x: x["eval_loss"])
  assert (found["best_step"], found["best_eval_loss"]) == (
      best["step"], best["eval_loss"])
  # r (i + o) of seven projections in two layers; d=24, f=40, 4 and 2 heads.
  shapes = [(24, 32), (24, 16), (24, 16), (32, 24), (24, 40), (24, 40),
            (40, 24)]
  assert found["trainable_parameters"] == sum(
      2 * 2 * (i + o) for i, o in shapes)
  model = safetensors.numpy.load_file(
      json.loads((folder / "config.json").read_text())["model"]["path"]
      + "/model.safetensors")
  assert found["total_parameters"] == sum(x.size for x in model.values())
  # Blocks of 8: 4 + 8/8 bits, and 32 bits for every 256 blocks (rounded up).
  assert 5 < found["bits_per_parameter"] < 5.2
  assert len(found["base_fingerprint"]) == 64
  assert found["wall_seconds"] > 0 and found["compile_seconds"] > 0
  assert found["peak_host_bytes"] > 2**26
  assert "peak_device_bytes" in found
  assert f"{found['final_eval_loss']:.4f}" in done.out


def test_plain_lines_without_a_terminal(finished):
  _, done = finished
  lines = [x for x in done.out.splitlines() if "tok/s" in x]
  assert [x.split()[1] for x in lines] == ["1/4", "2/4", "3/4", "4/4"]
  assert all("loss" in x and "ETA" in x for x in lines)
  assert "\r" not in done.out
  assert not done.errors


def test_another_config_is_refused(finished, run_command):
  folder, _ = finished
  before = (folder / "summary.json").read_bytes()
  done = run_command(folder, train__samples=2, train__eval_every=2,
                     optim__learning_rate=0.01, adapter__alpha=7.0, seed=3)
  assert done.code == 1
  assert len(done.errors) == 1
  # The first that differs, in the order of names.
  assert "adapter.alpha=32.0, not 7.0" in done.errors[0]
  assert str(folder) in done.errors[0]
  assert (folder / "summary.json").read_bytes() == before


def test_when_what_is_written(run_command, tmp_path):
  """log_every, eval_every, no checkpoint_every; on a terminal."""
  reader, writer = pty.openpty()
  process = run_command.start(
      tmp_path / "run", out=os.ttyname(writer), train__steps=5,
      train__log_every=2, train__eval_every=3, train__checkpoint_every=0,
      quant__format="none", data__packing=False)
  os.set_blocking(reader, False)
  text = b""
  while process.poll() is None:
    text += _drain(reader)
  text += _drain(reader)
  assert process.poll() == 0
  lines = conftest.metrics(tmp_path / "run")
  assert [x["step"] for x in lines if "loss" in x] == [2, 4, 5]
  assert [x["step"] for x in lines if "eval_loss" in x] == [0, 3, 5]
  kept = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
  assert kept == {"5", "sha256"}
  shown = text.decode().split("\r")
  assert [x.split()[1] for x in shown if "ETA" in x] == [
      f"{i}/5" for i in range(1, 6)]
  summary = json.loads((tmp_path / "run/summary.json").read_text())
  assert summary["bits_per_parameter"] is None


def _drain(reader) -> bytes:
  try:
    return os.read(reader, 65536)
  except (BlockingIOError, OSError):
    return b""


def test_evaluation_only_in_the_default_folder(run_command, tmp_path):
  options = dict(adapter__method="none", train__steps=0)
  done = run_command(None, cwd=tmp_path, **options)
  assert done.code == 0, done.err
  (folder,) = (tmp_path / "runs").iterdir()
  assert folder.name.startswith("quickstart-")
  found = json.loads((folder / "summary.json").read_text())
  assert found["initial_eval_loss"] == found["final_eval_loss"] > 0
  assert found["trainable_parameters"] == 0
  assert not (folder / "adapter").exists()
  assert found["wall_seconds"] > 0


def test_nothing_to_train_is_an_error(run_command, tmp_path):
  done = run_command(tmp_path / "run", adapter__method="none")
  assert done.code == 2
  assert len(done.errors) == 1
  assert "adapter.method=none trains nothing" in done.errors[0]


@pytest.fixture(scope="module")
def stopped(run_command, tmp_path_factory):
  """A run that overshoots at once and stops early."""
  folder = tmp_path_factory.mktemp("stopped") / "run"
  done = run_command(
      folder, train__steps=9, train__eval_every=1, train__patience=2,
      optim__learning_rate=3.0, optim__schedule="constant",
      optim__warmup=3.0)
  assert done.code == 0, done.err
  return folder


def test_early_stopping(stopped):
  found = json.loads((stopped / "summary.json").read_text())
  evals = [x for x in conftest.metrics(stopped) if "eval_loss" in x]
  best = min(evals, key=lambda x: x["eval_loss"])
  assert found["stopped_early"]
  assert found["steps"] == evals[-1]["step"] < 9
  assert found["best_step"] == best["step"] == found["steps"] - 2
  assert found["best_eval_loss"] == best["eval_loss"]
  # The last state is kept, though no checkpoint was due.
  assert (stopped / "checkpoints" / str(found["steps"])).is_dir()


def test_init_from_is_the_best_step(stopped, run_command, tmp_path):
  """The saved adapter has the best loss; its dropout is the config's."""
  done = run_command(
      tmp_path / "run", adapter__init_from=stopped / "adapter",
      adapter__dropout=0.5, train__steps=1)
  assert done.code == 0, done.err
  best = json.loads((stopped / "summary.json").read_text())
  found = json.loads((tmp_path / "run/summary.json").read_text())
  assert found["initial_eval_loss"] == best["best_eval_loss"]
  saved = json.loads(
      (tmp_path / "run/adapter/adapter_config.json").read_text())
  assert saved["lora_dropout"] == 0.5
  assert saved["r"] == 2


def test_dropout_of_init_from_is_drawn(
    stopped, run_command):
  model = api.load(str(run_command.model)).with_adapter(
      stopped / "adapter", dropout=0.5)
  assert model.adapter_config.dropout == 0.5
  for adapter in model.adapters.layers.values():
    np.testing.assert_array_equal(adapter.rate, np.full(2, 0.5, np.float32))


def test_full_fine_tuning_writes_a_model(run_command, tmp_path):
  folder = tmp_path / "run"
  done = run_command(
      folder, variant=":method=full,quant=none", train__steps=2,
      optim__learning_rate=1e-3)
  assert done.code == 0, done.err
  assert not (folder / "adapter").exists()
  before = safetensors.numpy.load_file(run_command.model / "model.safetensors")
  after = safetensors.numpy.load_file(folder / "model/model.safetensors")
  assert before.keys() == after.keys()
  assert all((before[k] != after[k]).any() for k in before)
  found = json.loads((folder / "summary.json").read_text())
  assert found["trainable_parameters"] == found["total_parameters"]


def test_a_step_that_is_not_finite_stops_the_run(run_command, tmp_path):
  """One training row has a letter whose embedding is infinite."""
  config = conftest.model_config()
  rows = conftest.messages(12)
  rows[7]["messages"][1]["content"] = "x~"

  def spoil(base):
    token = conftest.tiny.byte_tokenizer().convert_tokens_to_ids("~")
    table = jnp.asarray(base.embed_tokens)
    return base.replace(embed_tokens=table.at[token].set(jnp.inf))

  model = conftest.write_model(tmp_path / "model", config, change=spoil)
  data = conftest.write_rows(tmp_path / "rows.jsonl", rows)
  held = conftest.write_rows(tmp_path / "held.jsonl", conftest.messages(4, 1))
  done = run_command(
      tmp_path / "run", model__path=model, data__path=data,
      data__eval_path=held, data__packing=False, quant__format="none",
      train__steps=8, train__checkpoint_every=1, train__batch_size=3,
      seed=1)
  assert done.code == 1
  assert len(done.errors) == 1
  found = json.loads((tmp_path / "run/nonfinite.json").read_text())
  assert 7 in found["rows"] and len(found["rows"]) == 3
  step = found["step"]
  assert step > 1  # Else the seed leaves nothing to look at.
  assert f"step {step}: " in done.errors[0]
  assert "nonfinite.json" in done.errors[0]
  steps = [x["step"] for x in conftest.metrics(tmp_path / "run")
           if "loss" in x]
  assert steps == list(range(1, step))
  assert (tmp_path / "run/checkpoints" / str(step - 1)).is_dir()
  assert not (tmp_path / "run/checkpoints" / str(step)).exists()


def test_a_model_that_is_not_finite_stops_before_training(
    run_command, tmp_path):
  model = conftest.write_model(
      tmp_path / "model", change=lambda base: base.replace(norm=jnp.full_like(
          base.norm, jnp.inf)))
  done = run_command(tmp_path / "run", model__path=model,
                     quant__format="none")
  assert done.code == 1
  assert len(done.errors) == 1
  assert "step 0: the held-out loss is " in done.errors[0]
  assert not (tmp_path / "run/summary.json").exists()


def test_a_sweep_compiles_one_step(run_command, tmp_path):
  """Learning rate, alpha, decay, clipping, schedule, dropout are traced."""
  loaded = api.load(str(run_command.model))
  rows = loaded.encode(api.read(run_command.data), max_length=64)

  def train(name, alpha, dropout, **fields):
    model = loaded.adapt(rank=2, alpha=alpha, dropout=dropout)
    with compiles.CompileClock() as clock:
      _, outcome = model.train(
          rows, workdir=tmp_path / name, max_length=64,
          config=loop.TrainConfig(steps=2, batch_size=2),
          optim=optim.OptimConfig(**fields))
    return clock.count, outcome

  first, one = train("a", 4.0, 0.1, learning_rate=1e-3)
  # All but the step compiles once more, e.g. what makes the schedule.
  train("b", 4.0, 0.1, learning_rate=1e-3, schedule="linear")
  again, other = train(
      "c", 9.0, 0.2, learning_rate=1e-2, schedule="linear",
      weight_decay=0.1, clip_norm=0.5, warmup=0.0, b1=0.8, b2=0.9, eps=1e-6)
  assert first > 0 and again == 0
  assert any((a != b).any() for a, b in zip(
      jax.tree.leaves(one.state.params), jax.tree.leaves(other.state.params)))
