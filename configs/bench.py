"""How fast this machine is: ceilings, kernels, training, generation, start.

  python -m experiments.bench --config=configs/bench.py:llama2-7b

  --config=configs/bench.py:llama3-8b,n_layers=4   a geometry, and its changes
  --config=configs/bench.py                        tiny, for any laptop

Random weights and tokens: nothing is downloaded. On one H100 a 7 B model takes
about 10 GiB with remat full; on a laptop use tiny or smollm2-135m.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common

# Geometries that a laptop is measured with, in float32 and at small shapes.
SMALL = ("tiny", "smollm2-135m")


def get_config(arg: str = "tiny") -> config_dict.ConfigDict:
  """The benchmark of a geometry: `"llama2-7b"`, `"llama2-7b,n_layers=4"`."""
  c = config_dict.ConfigDict
  defaults = common.get_config()
  config = c()
  config.seed = 0
  # In this order; a part that needs no model has no use for `model`.
  config.parts = "ceilings,kernels,train,decode,startup"
  config.limit = 900  # seconds of one part, after which it is given up

  config.model = c()
  # A key of experiments/bench/geometry.py, and fields of its ModelConfig:
  # "n_layers=4,vocab_size=32000".
  name, _, changes = arg.partition(",")
  config.model.geometry = name
  config.model.changes = changes

  # As in configs/common.py.
  for block in ("quant", "adapter", "optim", "compute"):
    config[block] = defaults[block]
  config.optim.schedule = "constant"
  config.optim.learning_rate = 1e-3
  config.optim.clip_norm = 0.0
  config.compute.dtype = "bfloat16"
  del config.compute.remat  # config.train has a list of them

  config.train = c()
  config.train.shapes = "4x2048"  # rows x tokens of a micro-batch
  config.train.remat = "named,full"  # see lora_jax/models/remat.py
  config.train.packed = 0  # segments a row; 0: a row is one example
  config.train.accumulation = 1
  config.train.warmup = 2
  config.train.steps = 10

  config.decode = c()
  config.decode.batches = "1,32"
  config.decode.prompt = 128  # tokens
  config.decode.new = 128
  config.decode.repeats = 3

  config.kernels = c()
  config.kernels.formats = "nf4,fp4,int4"
  # in_features x out_features
  config.kernels.shapes = "4096x4096,4096x11008,14336x4096,8192x28672"
  config.kernels.rows = "1,16"  # of the activations of a product
  # Read and written by one timed call, so that no cache helps.
  config.kernels.span_bytes = 2**29

  config.ceilings = c()
  config.ceilings.copy_bytes = 2**30
  config.ceilings.matmul = 8192  # n of n x n products
  config.ceilings.products = 8  # in a timed call

  # Python with torch for --peers, "" is this one; a folder put in front of
  # its path.
  config.peers = c()
  config.peers.python = ""
  config.peers.site = ""
  config.peers.impls = "unsloth,hf-bnb-liger,hf-bnb"
  config.peers.kernels = True

  if name in SMALL:
    config.compute.dtype = "float32"
    config.train.shapes = "2x64"
    config.train.remat = "named"
    config.train.steps = 3
    config.decode.batches = "1,4"
    config.decode.prompt = 16
    config.decode.new = 16
    config.kernels.formats = "nf4,int4"
    config.kernels.shapes = "128x192"
    config.kernels.rows = "1"
    config.kernels.span_bytes = 2**20
    config.ceilings.copy_bytes = 2**22
    config.ceilings.matmul = 256
    config.ceilings.products = 2
  return config
