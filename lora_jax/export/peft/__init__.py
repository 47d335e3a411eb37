"""Hugging Face PEFT's adapter folders, both ways.

  adapter_config.json        what is adapted, by which method
  adapter_model.safetensors  base_model.model.<module path>.lora_A.weight ...

Matrices are transposed to `[out, in]` there. What is read is decided by the
tensors: which modules, which ranks; the config decides the method and the
scale. A folder that asks for something this code does not do is refused:
loading the rest of it would compute another function. A method that PEFT lacks
is written in the same layout, with a config of this code's own.
"""

from __future__ import annotations

from lora_jax.export.peft.names import CONFIG
from lora_jax.export.peft.names import WEIGHTS
from lora_jax.export.peft.read import Loaded
from lora_jax.export.peft.read import read
from lora_jax.export.peft.read import replication
from lora_jax.export.peft.write import peft_config
from lora_jax.export.peft.write import tensors
from lora_jax.export.peft.write import with_dropout
from lora_jax.export.peft.write import write

__all__ = [
    "CONFIG", "WEIGHTS", "Loaded", "peft_config", "read", "replication",
    "tensors", "with_dropout", "write",
]
