"""The table of methods of quantised checkpoints.

Adding one: a file with `open_scheme`, a row here, a test that compares the
weights with the method's own library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax import errors
from lora_jax.models.checkpoints import awq
from lora_jax.models.checkpoints import bnb
from lora_jax.models.checkpoints import gptq
from lora_jax.models.checkpoints import scheme

METHODS: dict[str, Callable[[Mapping[str, Any], str], scheme.Scheme]] = {
    "bitsandbytes": bnb.open_scheme,
    "gptq": gptq.open_scheme,
    "awq": awq.open_scheme,
}


def open_scheme(config: Mapping[str, Any], source: str) -> scheme.Scheme:
  """The scheme of a `quantization_config`.

  Args:
    config: its content.
    source: the file it stands in, for messages.

  Raises:
    errors.UserError: if the method, or a value, is unsupported.
  """
  name = config.get("quant_method")
  if name is None and ("load_in_4bit" in config or "load_in_8bit" in config):
    name = "bitsandbytes"  # Before transformers 4.34 it was the only one.
  if name not in METHODS:
    raise errors.UserError(
        f'{source}: quantization_config: quant_method="{name}" is '
        f"unsupported; supported: {', '.join(METHODS)}; or give the "
        "unquantised checkpoint, and quant.format to quantise it here")
  return METHODS[name](config, source)
