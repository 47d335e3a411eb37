"""A small full-precision base, pretrained from nothing on Wikipedia's passages.

  python -m experiments.run --config=configs/pretrain_tiny.py \\
      --workdir=runs/pretrain_tiny
  python -m experiments.run --config=configs/pretrain_tiny.py:runlocal

Llama with SmolLM2's tokenizer, 18.5 M parameters (12.6 M of them the tied
embedding), float32; 12,271 passages of BoolQ less 300 held out, 1,500 steps of
32 x 256 packed tokens. The model is in runs/pretrain_tiny/model, where studies
of quantisation look for it; docs/TINY.md is its card.

:runlocal, on 2 cores of a current Xeon: a minute, 0.8 GiB; held-out loss 10.804
-> 7.635 nats a token.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run, or (:runlocal) one of a minute on a laptop's CPU."""
  common.parse(arg, runlocal=("",))
  config = common.get_config()
  config.model.path = "asset:smollm2-135m-instruct"
  config.model.scratch = (
      "n_layers=8,d_model=256,d_ff=704,n_heads=4,n_kv_heads=2,max_position=512")
  config.quant.format = "none"
  config.adapter.method = "full"

  config.data.path = "asset:boolq"
  config.data.format = "text"
  config.data.unique = True
  config.data.max_length = 256
  config.data.eval_max_length = 256
  config.data.eval_rows = 300
  config.data.eval_seed = 0  # Studies of this base hold out the same.

  config.train.steps = 1500
  config.train.batch_size = 32
  config.train.log_every = 10
  config.train.eval_every = 250
  config.train.checkpoint_every = 500
  config.train.samples = 0

  config.optim.learning_rate = 1e-3
  config.optim.warmup = 100
  config.optim.final = 0.1
  config.optim.b2 = 0.95
  config.optim.weight_decay = 0.1

  config.compute.dtype = "bfloat16"
  # What is trained starts in float32, and stays in it.
  config.compute.base_dtype = "float32"
  if arg:
    config.model.scratch = (
        "n_layers=2,d_model=64,d_ff=176,n_heads=2,n_kv_heads=1,max_position=512")
    config.data.rows = 2000
    config.data.eval_rows = 24
    config.train.steps = 40
    config.train.batch_size = 4
    config.train.eval_every = 0
    config.train.checkpoint_every = 0
    config.optim.warmup = 0.1
    config.optim.learning_rate = 4e-3
    config.compute.dtype = "float32"
  return config
