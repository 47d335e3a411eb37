"""The table of PEFT methods.

Adding one: a file with an `Adapter`, its `init` and a `METHOD`, a row here, a
test of its formula. The contract tests pick it up from this table.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from lora_jax import errors
from lora_jax.adapters import base
from lora_jax.adapters import bias
from lora_jax.adapters import bottleneck
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import dora
from lora_jax.adapters import full
from lora_jax.adapters import ia3
from lora_jax.adapters import lora
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import norms
from lora_jax.adapters import prefix
from lora_jax.adapters import prompt
from lora_jax.adapters import vera

METHODS: dict[str, method_lib.Method] = {
    "none": full.NONE,
    "full": full.METHOD,
    "lora": lora.METHOD,
    "rslora": lora.RSLORA,
    "dora": dora.METHOD,
    "vera": vera.METHOD,
    "ia3": ia3.METHOD,
    "bitfit": bias.METHOD,
    "ln_tuning": norms.METHOD,
    "prefix": prefix.METHOD,
    "prompt": prompt.METHOD,
    "houlsby": bottleneck.HOULSBY,
    "pfeiffer": bottleneck.PFEIFFER,
    "parallel": bottleneck.PARALLEL,
}


def method(name: str) -> method_lib.Method:
  """The row of `name`, or a `UsageError` that names the nearest one."""
  return errors.choose("adapter.method", name, METHODS)


def checked(config: config_lib.AdapterConfig) -> config_lib.AdapterConfig:
  """The config with every value checked; `options` is the method's dataclass.

  Raises:
    errors.UsageError: for the first value that cannot be.
  """
  row = method(config.method)
  config = config.validate(row.options)
  if not config.layer_replication:
    return config
  if row.form is None or row.form.peft_type != "LORA":
    raise errors.UsageError(
        f"adapter.layer_replication: adapter.method={config.method} is not of "
        "LoRA's kind, which alone has it in PEFT; leave it empty, or use lora")
  if config.start().decompose is not None:
    raise errors.UsageError(
        f"adapter.layer_replication: adapter.init={config.init} replaces each "
        "layer's weights, which repetitions share; use adapter.init=default")
  return config


def count(
    row: method_lib.Method, options: Any, target: str,
    shape: Sequence[int], rank: int, geometry: base.Geometry
) -> int:
  """Trainable parameters of one place, by the row's formula.

  Args:
    row: of the table.
    options: the method's.
    target: the place.
    shape: `(i, o)` of a projection, `(d,)` of a norm, `()` of others.
    rank: r.
    geometry: the model's sizes.
  """
  names = dataclasses.asdict(geometry) | dataclasses.asdict(options) | {
      "target": target, "r": rank, "min": min, "max": max}
  if len(shape) == 2:
    names |= {"i": shape[0], "o": shape[1]}
  elif shape:
    names["width"] = shape[0]
  return int(eval(row.count, {"__builtins__": {}}, names))


def shared_count(
    row: method_lib.Method, options: Any, rank: int) -> int:
  """Trainable parameters that all places share; see `count`."""
  names = dataclasses.asdict(options) | {"r": rank}
  return int(eval(row.count_shared or "0", {"__builtins__": {}}, names))
