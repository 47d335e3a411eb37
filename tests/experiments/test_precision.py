"""A float16 run on an 8-bit base, killed and resumed."""

from __future__ import annotations

import itertools
import json

import pytest

from tests.experiments import conftest
from tests.experiments import test_resume

# The first scales overflow; the scale doubles again within the run.
RUN = dict(
    variant=":quant=int8", compute__dtype="float16",
    compute__adapter_dtype="bfloat16", compute__optim_dtype="bfloat16",
    compute__base_dtype="float32", compute__loss_scale=2.0**19,
    compute__loss_scale_interval=2, train__steps=9,
    train__checkpoint_every=4, optim__learning_rate=0.01)


# Four runs; test_resume.py kills runs, train/test_precision.py keeps states.
@pytest.mark.slow
def test_float16_goes_on_bit_by_bit(run_command, tmp_path):
  done = run_command(tmp_path / "whole", **RUN)
  assert done.code == 0, done.err
  process = run_command.start(
      tmp_path / "killed", die="lora_jax.train.step:train_step:7",
      **RUN)
  assert process.wait(conftest.LIMIT) == -9
  # Where metrics are shown is no part of what a run is.
  done = run_command(tmp_path / "killed", log__project="other", **RUN)
  assert done.code == 0, done.err
  assert "going on from step 4" in done.out
  assert (test_resume.result(tmp_path / "killed")
          == test_resume.result(tmp_path / "whole"))
  steps = [x for x in conftest.metrics(tmp_path / "whole") if "loss" in x]
  scales = [x["loss_scale"] for x in steps]
  ratios = {b / a for a, b in itertools.pairwise(scales)}
  assert ratios == {0.5, 1.0, 2.0}
  skipped = [x["skipped"] for x in steps]
  assert skipped == sorted(skipped) and 2 <= skipped[-1] <= 6
  assert all((x["grad_norm"] is None) == (now > before) for x, before, now in
             zip(steps, [0, *skipped], skipped))
  found = json.loads((tmp_path / "whole/summary.json").read_text())
  assert found["final_eval_loss"] < found["initial_eval_loss"]
  # Blocks of 8: 8 + 8/8 bits, and a little for the blocks of scales.
  assert 9 < found["bits_per_parameter"] < 9.2
