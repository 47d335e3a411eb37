"""The table of PEFT methods.

Adding one: a file with an `Adapter`, its `init` and a `METHOD`, a row here, a
test of its formula. The contract tests pick it up from this table.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from lora_jax import errors
from lora_jax.adapters import adalora
from lora_jax.adapters import adamss
from lora_jax.adapters import base
from lora_jax.adapters import bd_lora
from lora_jax.adapters import bias
from lora_jax.adapters import boft
from lora_jax.adapters import bottleneck
from lora_jax.adapters import c3a
from lora_jax.adapters import cartridge
from lora_jax.adapters import compacter
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import cpt
from lora_jax.adapters import deft
from lora_jax.adapters import delora
from lora_jax.adapters import dora
from lora_jax.adapters import fourierft
from lora_jax.adapters import frod
from lora_jax.adapters import full
from lora_jax.adapters import glora
from lora_jax.adapters import gralora
from lora_jax.adapters import hira
from lora_jax.adapters import hra
from lora_jax.adapters import ia3
from lora_jax.adapters import kasa
from lora_jax.adapters import lily
from lora_jax.adapters import llama_adapter
from lora_jax.adapters import loha
from lora_jax.adapters import lokr
from lora_jax.adapters import lora
from lora_jax.adapters import lora_bias
from lora_jax.adapters import lora_fa
from lora_jax.adapters import lora_xs
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import miss
from lora_jax.adapters import mixture
from lora_jax.adapters import multitask_prompt
from lora_jax.adapters import norms
from lora_jax.adapters import oft
from lora_jax.adapters import osf
from lora_jax.adapters import p_tuning
from lora_jax.adapters import peanut
from lora_jax.adapters import poly
from lora_jax.adapters import prefix
from lora_jax.adapters import prompt
from lora_jax.adapters import psoft
from lora_jax.adapters import pvera
from lora_jax.adapters import qa_lora
from lora_jax.adapters import randlora
from lora_jax.adapters import road
from lora_jax.adapters import shadow
from lora_jax.adapters import shira
from lora_jax.adapters import supertuning
from lora_jax.adapters import tinylora
from lora_jax.adapters import unilora
from lora_jax.adapters import vblora
from lora_jax.adapters import vera
from lora_jax.adapters import waveft
from lora_jax.adapters import xlora

METHODS: dict[str, method_lib.Method] = {
    "none": full.NONE,
    "full": full.METHOD,
    "lora": lora.METHOD,
    "rslora": lora.RSLORA,
    "dora": dora.METHOD,
    "lora_xs": lora_xs.METHOD,
    "lora_bias": lora_bias.METHOD,
    "lora_fa": lora_fa.METHOD,
    "boft": boft.METHOD,
    "hra": hra.METHOD,
    "oft": oft.METHOD,
    "osf": osf.METHOD,
    "psoft": psoft.METHOD,
    "road": road.METHOD,
    "shira": shira.METHOD,
    "supertuning": supertuning.METHOD,
    "frod": frod.METHOD,
    "adalora": adalora.METHOD,
    "adamss": adamss.METHOD,
    "kasa": kasa.METHOD,
    "bd_lora": bd_lora.METHOD,
    "qa_lora": qa_lora.METHOD,
    "vera": vera.METHOD,
    "pvera": pvera.METHOD,
    "mixture": mixture.METHOD,
    "poly": poly.METHOD,
    "lily": lily.METHOD,
    "tinylora": tinylora.METHOD,
    "xlora": xlora.METHOD,
    "randlora": randlora.METHOD,
    "vblora": vblora.METHOD,
    "unilora": unilora.METHOD,
    "fourierft": fourierft.METHOD,
    "waveft": waveft.METHOD,
    "ia3": ia3.METHOD,
    "bitfit": bias.METHOD,
    "ln_tuning": norms.METHOD,
    "prefix": prefix.METHOD,
    "p_tuning_v2": prefix.P_TUNING_V2,
    "cartridge": cartridge.METHOD,
    "prompt": prompt.METHOD,
    "loha": loha.METHOD,
    "lokr": lokr.METHOD,
    "hira": hira.METHOD,
    "delora": delora.METHOD,
    "miss": miss.METHOD,
    "gralora": gralora.METHOD,
    "c3a": c3a.METHOD,
    "deft": deft.METHOD,
    "glora": glora.METHOD,
    "peanut": peanut.METHOD,
    "para": deft.PARA,
    "cpt": cpt.METHOD,
    "multitask_prompt": multitask_prompt.METHOD,
    "p_tuning": p_tuning.METHOD,
    "llama_adapter": llama_adapter.METHOD,
    "adaption_prompt": llama_adapter.ADAPTION_PROMPT,
    "houlsby": bottleneck.HOULSBY,
    "pfeiffer": bottleneck.PFEIFFER,
    "parallel": bottleneck.PARALLEL,
    "compacter": compacter.METHOD,
    "compacter_plus": compacter.PLUS,
    "shadow": shadow.METHOD,
}


def method(name: str) -> method_lib.Method:
  """The row of `name`, or a `UsageError` that names the nearest one."""
  return errors.choose("adapter.method", name, METHODS)


def targets(config: config_lib.AdapterConfig) -> str | tuple[str, ...]:
  """Which places a config means: its method's own for "auto"."""
  return method(config.method).targets if config.targets == "auto" else (
      config.targets)


def checked(config: config_lib.AdapterConfig) -> config_lib.AdapterConfig:
  """The config with every value checked; `options` is the method's dataclass.

  Raises:
    errors.UsageError: for the first value that cannot be.
  """
  row = method(config.method)
  if config.init != "default" and not _takes(row, config.init):
    able = ", ".join(
        name for name, row in METHODS.items() if _takes(row, config.init))
    raise errors.UsageError(
        f"adapter.init={config.init} is for {able}; leave it at default with "
        f"adapter.method={config.method}")
  config = config.validate(row.options)
  if not config.layer_replication:
    return config
  if row.form is None or row.form.peft_type != "LORA":
    raise errors.UsageError(
        f"adapter.layer_replication: adapter.method={config.method} is not of "
        "LoRA's kind, which alone has it in PEFT; leave it empty, or use lora")
  start = config.start()
  if start.replaces or start.informed is not None:
    raise errors.UsageError(
        f"adapter.layer_replication: adapter.init={config.init} is made of "
        "each layer's weights, which repetitions share; use "
        "adapter.init=default")
  return config


def rules(
    config: config_lib.AdapterConfig, steps: int,
    adapters: base.Adapters | None = None,
) -> tuple[method_lib.Rule, ...]:
  """What a method adds to training.

  Args:
    config: the adapter block.
    steps: of the run; 0 if it does not train.
    adapters: what is trained, or None to check the config alone.

  Raises:
    errors.UsageError: for options that a run of so many steps cannot have.
  """
  row = method(config.method)
  if row.rule is None:
    return ()
  rule = row.rule(checked(config), steps)
  if rule is None:
    return ()
  return (rule if adapters is None else rule.bound(adapters),)


def _takes(row: method_lib.Method, init: str) -> bool:
  return row.starts is None or init in row.starts


def count(
    row: method_lib.Method, options: Any, target: str,
    shape: Sequence[int], rank: int, geometry: base.Geometry, turn: int = 0
) -> int:
  """Trainable parameters of one place, by the row's formula.

  Args:
    row: of the table.
    options: the method's.
    target: the place.
    shape: `(i, o)` of a projection, `(d,)` of a norm, `()` of others.
    rank: r.
    geometry: the model's sizes.
    turn: its number among the adapted ones of its target.
  """
  names = dataclasses.asdict(geometry) | dataclasses.asdict(options) | {
      "target": target, "turn": turn, "r": rank, "min": min, "max": max,
      "options": options}
  if len(shape) == 2:
    names |= {"i": shape[0], "o": shape[1]}
  elif shape:
    names["width"] = shape[0]
  return int(eval(row.count, {"__builtins__": {}}, names))


def shared_count(
    row: method_lib.Method, options: Any, rank: int, geometry: base.Geometry,
    modules: int = 1,
) -> int:
  """Trainable parameters that all places share; see `count`.

  Args:
    row, options, rank, geometry: see `count`.
    modules: that are adapted.
  """
  names = dataclasses.asdict(geometry) | dataclasses.asdict(options) | {
      "r": rank, "modules": modules, "options": options}
  return int(eval(row.count_shared or "0", {"__builtins__": {}}, names))
