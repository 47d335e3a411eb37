"""Training with frozen products in 8-bit floats, against bfloat16.

  python -m experiments.run --config=configs/fp8.py:matmul=fp8,seed=1

  matmul=auto        in bfloat16, what the others are compared with
  matmul=fp8         a scale a token
  matmul=fp8_tensor  a scale a tensor

The quickstart's model and rows at 8 x 512 tokens, in bfloat16. Needs an NVIDIA
GPU of Ada or later. Held-out losses are those of the adapter in bfloat16, as
it will be used: they should differ by less than 0.01 nats in the mean of three
seeds, which `python -m tests.quant.fp8_study` runs and compares.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """One run of the comparison."""
  chosen = common.parse(
      arg, matmul=("auto", "fp8", "fp8_tensor"), seed=())
  config = common.get_config()
  config.model.path = "asset:smollm2-135m-instruct"
  config.seed = int(chosen.get("seed", "0"))
  config.compute.dtype = "bfloat16"
  config.compute.frozen_matmul = chosen.get("matmul", "fp8")
  config.data.max_length = 512
  config.train.batch_size = 8
  config.train.steps = 60
  config.train.samples = 0
  config.optim.learning_rate = 1e-3
  config.optim.warmup = 0.1
  return config
