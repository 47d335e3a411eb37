"""Which config may go on in a work directory."""

from __future__ import annotations

import copy
import json

import pytest

from configs import common
from experiments import run
from lora_jax import errors


def _config(**changes):
  config = common.get_config()
  config.update_from_flattened_dict(
      {k.replace("__", "."): v for k, v in changes.items()})
  return json.loads(config.to_json_best_effort())


def test_where_metrics_are_shown_is_no_part_of_a_run(tmp_path):
  first, other = _config(), _config(log__sinks="tensorboard", log__name="x")
  run.open_workdir(tmp_path, first)
  run.open_workdir(tmp_path, other)
  assert run.default_workdir("a", first) == run.default_workdir("a", other)
  assert json.loads((tmp_path / "config.json").read_text()) == first
  changed = _config(compute__optim_dtype="bfloat16")
  assert run.default_workdir("a", first) != run.default_workdir("a", changed)
  with pytest.raises(errors.UserError, match=r"compute\.optim_dtype='float32'"):
    run.open_workdir(tmp_path, changed)


def test_how_a_step_fits_is_no_part_of_a_run(tmp_path):
  first = _config()
  other = _config(memory__budget_gib=8.0, memory__micro_batch=2,
                  compute__remat="full", compute__mlp_tiles=4)
  run.open_workdir(tmp_path, first)
  run.open_workdir(tmp_path, other)
  assert run.default_workdir("a", first) == run.default_workdir("a", other)


def test_a_run_of_an_older_version_goes_on(tmp_path):
  """It has neither the block nor the field; the defaults are what it did."""
  old = copy.deepcopy(_config())
  del old["log"], old["compute"]["adapter_dtype"]
  run.open_workdir(tmp_path, old)
  run.open_workdir(tmp_path, _config())
  with pytest.raises(errors.UserError, match=r"adapter_dtype='float32"):
    run.open_workdir(tmp_path, _config(compute__adapter_dtype="bfloat16"))
