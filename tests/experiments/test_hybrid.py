"""Runs of several methods in one model, from the config to the export."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from configs import common
from configs import hybrid as hybrid_config
from experiments import blocks
from experiments import cli
from experiments import export
from experiments import run
from experiments import trained
from lora_jax import api
from lora_jax import errors
from tests.evaluate import test_commands as commands
from tests.experiments import conftest

RUN = dict(
    adapter__rank=2, adapter__dropout=0.2, hybrid__houlsby__rank=3,
    hybrid__houlsby__dropout=0.1, quant__format="none", train__samples=1,
    optim__learning_rate=0.01)


def start(command, folder, die=None, **overrides):
  """`experiments.run` of configs/hybrid.py on the tiny model."""
  argv = command.argv(folder, **RUN | overrides)
  argv[0] = f"--config={conftest.ROOT}/configs/hybrid.py"
  return command.server.start(
      argv, conftest.ROOT, command.logs / "out", command.logs / "err", die=die)


@pytest.fixture(scope="module")
def finished(run_command, tmp_path_factory):
  """(folder, what was printed)."""
  folder = tmp_path_factory.mktemp("hybrid") / "run"
  done = run_command.end(start(run_command, folder))
  assert done.code == 0, done.err
  return folder, done.out


def test_a_run_counts_and_saves_its_parts_apart(finished):
  folder, out = finished
  config = json.loads((folder / "config.json").read_text())
  assert config["adapter"]["rank"] == 2
  assert config["hybrid"]["houlsby"]["rank"] == 3
  found = json.loads((folder / "summary.json").read_text())
  # Seven projections in two layers; a bottleneck after four blocks.
  shapes = [(24, 32), (24, 16), (24, 16), (32, 24), (24, 40), (24, 40),
            (40, 24)]
  sizes = {"lora": 2 * 2 * sum(i + o for i, o in shapes),
           "houlsby": 4 * (2 * 3 * 24 + 3 + 24)}
  assert found["trainable_by_part"] == sizes
  assert found["trainable_parameters"] == sum(sizes.values())
  assert f"(lora {sizes['lora']:,}, houlsby {sizes['houlsby']:,})" in out
  low, high = found["eval_loss_change_95"]
  assert low <= found["eval_loss_change"] <= high < 0
  assert {str(p.relative_to(folder / "adapter"))
          for p in (folder / "adapter").rglob("*") if p.is_file()} == {
              "hybrid.json", *(f"{name}/adapter_{part}" for name in sizes
                               for part in ("config.json",
                                            "model.safetensors"))}


@pytest.mark.slow  # A minute; tests/experiments/test_resume.py kills runs.
def test_a_killed_run_ends_as_if_it_had_not_been(
    finished, run_command, tmp_path):
  folder = tmp_path / "run"
  process = start(run_command, folder, "lora_jax.train.step:train_step:4")
  assert process.wait(conftest.LIMIT) == -9
  done = run_command.end(start(run_command, folder))
  assert done.code == 0, done.err
  assert "going on from step 2" in done.out

  def adapters(where):
    return {p.name: p.read_bytes() for p in (where / "adapter").rglob("*.*")}

  assert adapters(folder) == adapters(finished[0])
  done = run_command.end(start(run_command, folder, hybrid__houlsby__rank=4))
  assert done.code == 1
  assert "hybrid.houlsby.rank=3, not 4" in done.errors[0]


def test_commands_on_a_run(finished, tmp_path, capsys):
  folder, _ = finished
  model = trained.from_workdir(str(folder))
  assert list(model.parts) == ["lora", "houlsby"]
  assert model.parts["houlsby"].config.rank == 3
  commands._run(export, workdir=folder, format="hf", output=tmp_path / "m")
  assert "houlsby cannot be merged" in capsys.readouterr().out
  rest = trained.from_parts(
      str(tmp_path / "m"), str(tmp_path / "m" / "adapter"), "none", "float32")
  assert list(rest.parts) == ["houlsby"]
  rows = model.encode(api.read(json.loads(
      (folder / "config.json").read_text())["data"]["path"]), max_length=64)
  ours, theirs = (one.evaluate(rows[:6]).nll for one in (model, rest))
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  answers = [one.chat(["xyz"], max_new_tokens=6) for one in (model, rest)]
  assert answers[0] == answers[1] and answers[0][0]
  commands._run(export, workdir=folder, format="peft", output=tmp_path / "p")
  assert all((tmp_path / "p" / name).read_bytes()
             == (folder / "adapter" / name).read_bytes() for name in (
                 "hybrid.json", "lora/adapter_model.safetensors",
                 "houlsby/adapter_model.safetensors"))


def test_going_on_from_a_folder_of_several(finished, run_command, tmp_path):
  done = run_command(
      tmp_path / "run", adapter__init_from=finished[0] / "adapter",
      train__steps=1, quant__format="none")
  assert done.code == 0, done.err
  assert "adapter: lora r=2 alpha=32, houlsby r=3 alpha=32 of" in done.out
  before = json.loads((finished[0] / "summary.json").read_text())
  after = json.loads((tmp_path / "run/summary.json").read_text())
  assert after["initial_eval_loss"] == before["best_eval_loss"]
  assert after["trainable_by_part"] == before["trainable_by_part"]


def config(**parts):
  found = common.get_config()
  for name, fields in parts.items():
    found.hybrid[name] = common.adapter(**fields)
  return found.to_dict()


def test_parts_of_a_config_in_their_order():
  assert blocks.adapters_of(config()) == blocks.adapter(config())
  found = blocks.adapters_of(config(
      zeta={"method": "ia3"}, b={"method": "vera", "options": "d_initial=0.5"}))
  assert list(found) == ["lora", "b", "zeta"]
  assert found["b"].options.d_initial == 0.5
  mam = hybrid_config.get_config("kind=mam").to_dict()
  assert {k: v.method for k, v in blocks.adapters_of(mam).items()} == {
      "prefix": "prefix", "parallel": "parallel"}


def test_runs_of_earlier_versions():
  now = config()
  old = {name: block for name, block in now.items() if name != "hybrid"}
  assert blocks.adapters_of(old) == blocks.adapter(now)
  assert run._identity(old) == run._identity(now)
  # A field of a part that its version did not have has its default.
  now = config(b={"method": "ia3"})
  old = config(b={"method": "ia3"})
  del old["hybrid"]["b"]["options"]
  assert run._identity(old) == run._identity(now)
  assert run._identity(config()) != run._identity(now)


@pytest.mark.parametrize("parts, message", [
    ({"b": {"method": "vera", "rank": 0}}, "hybrid.b.rank=0 is out of range"),
    ({"b": {"method": "verra"}},
     'hybrid.b.method="verra" is unknown; did you mean "vera"'),
    ({"b": {"method": "vera", "options": "d=1"}}, "hybrid.b.options"),
    ({"b": {"rank_pattern": "x"}}, 'hybrid.b.rank_pattern: "x" is not'),
    ({"b": {"trainable_token_indices": "x"}},
     "hybrid.b.trainable_token_indices=x is no list"),
    ({"b": {"method": "full"}}, "hybrid.b.method=full makes no adapter"),
    ({"b": {"init_from": "a"}}, "hybrid.b.init_from=a: only the adapter"),
    ({"lora": {"method": "lora"}}, "hybrid.lora: the adapter block has this"),
    ({"up_proj": {"method": "lora"}}, '"up_proj" is a module'),
])
def test_parts_that_cannot_be(parts, message):
  with pytest.raises(errors.UsageError, match=re.escape(message)):
    blocks.check(config(**parts))


def test_a_folder_and_parts_are_too_much():
  both = config(b={"method": "ia3"})
  both["adapter"]["init_from"] = "runs/x/adapter"
  with pytest.raises(errors.UsageError, match="leave hybrid empty"):
    blocks.check(both)


def test_names_on_the_command_line():
  path = f"{conftest.ROOT}/configs/hybrid.py"
  cli.check_config(path, ["--config.hybrid.houlsby.rank=4"])
  with pytest.raises(errors.UsageError, match=r"houlsby\.rnk is unknown"):
    cli.check_config(path, ["--config.hybrid.houlsby.rnk=4"])
