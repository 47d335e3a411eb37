"""Where a run's metrics go beside its own files.

TensorBoard, Weights & Biases and MLflow, chosen by `config.log.sinks`. A new
one is one file with a `base.Sink`, one row in `registry.SINKS` and one test
that reads back what it has written.
"""

from lora_jax.train.sinks.base import LogConfig as LogConfig
from lora_jax.train.sinks.base import Sink as Sink
from lora_jax.train.sinks.fan import Sinks as Sinks
from lora_jax.train.sinks.registry import SINKS as SINKS
