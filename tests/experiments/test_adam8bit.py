"""A run with 8-bit moments, killed and resumed."""

from __future__ import annotations

import json

import pytest

from tests.experiments import conftest
from tests.experiments import test_resume

# Rank 256: every A and B of the tiny model has more than 4096 values. float16
# skips its first step, whose moments must then stay as they were.
RUN = dict(
    optim__name="adamw8bit", adapter__rank=256, adapter__targets="v_proj",
    data__eval_rows=2,
    compute__dtype="float16", compute__loss_scale=2.0**20, train__steps=6,
    train__checkpoint_every=3, optim__learning_rate=0.003)


# Four runs; test_resume.py kills runs, train has its states' bytes.
@pytest.mark.slow
def test_codes_go_on_bit_by_bit(run_command, tmp_path):
  done = run_command(tmp_path / "whole", **RUN)
  assert done.code == 0, done.err
  process = run_command.start(
      tmp_path / "killed", die="lora_jax.train.step:train_step:5", **RUN)
  assert process.wait(conftest.LIMIT) == -9
  done = run_command(tmp_path / "killed", **RUN)
  assert done.code == 0, done.err
  assert "going on from step 3" in done.out
  assert (test_resume.result(tmp_path / "killed")
          == test_resume.result(tmp_path / "whole"))
  found = json.loads((tmp_path / "whole/summary.json").read_text())
  assert found["final_eval_loss"] < found["initial_eval_loss"]
  steps = [x for x in conftest.metrics(tmp_path / "whole") if "loss" in x]
  assert 1 <= steps[-1]["skipped"] <= 4
  # Restored into another optimiser's state the codes would be moments.
  done = run_command(tmp_path / "whole", **RUN | {"optim__name": "adamw"})
  assert done.code == 1
  assert "optim.name='adamw8bit', not 'adamw'" in done.err
