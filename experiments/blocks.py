"""From the blocks of a config to the checked values that lora_jax takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
import re
from typing import Any, TypeVar

from lora_jax import adapters
from lora_jax import api
from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant as quant_lib
from lora_jax.adapters import registry
from lora_jax.adapters import rules
from lora_jax.kernels import attention
from lora_jax.models import hf
from lora_jax.models import remat
from lora_jax.train import loop
from lora_jax.train import memory as memory_lib
from lora_jax.train import optim as optim_lib
from lora_jax.train import precision as precision_lib
from lora_jax.train import sinks as sinks_lib

T = TypeVar("T")
Config = Mapping[str, Any]


def _fields(cls: type[T], block: Config, **given) -> T:
  names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
  return cls(**{k: v for k, v in block.items() if k in names} | given)


def quant(config: Config) -> quant_lib.QuantSpec:
  try:
    spec = _fields(quant_lib.QuantSpec, config["quant"])
    quant_lib.check(spec)
  except errors.UserError as error:  # Here it is a mistake in the config.
    raise errors.UsageError(str(error)) from None
  return spec


def skip(config: Config) -> tuple[str, ...]:
  found = tuple(s for s in config["quant"]["skip"].split(",") if s)
  known = dict.fromkeys([*hf.MODULES, *hf.OUTER])
  for target in found:
    errors.choose("quant.skip", target, known)
  return found


def adapter(config: Config) -> adapters.AdapterConfig:
  """The `adapter` block, checked."""
  return _adapter(config["adapter"])


def adapters_of(config: Config) -> adapters.hybrid.Configs:
  """The `adapter` block; with those of `hybrid` by name, if there are any.

  Raises:
    errors.UsageError: for the first value that cannot be, as `hybrid.<name>`.
  """
  first = adapter(config)
  others = config.get("hybrid")  # Runs of earlier versions do not have it.
  if not others:
    return first
  if config["adapter"]["init_from"]:
    raise errors.UsageError(
        f"adapter.init_from={config['adapter']['init_from']} says what stands "
        "in the model; leave hybrid empty")
  if first.method in others:
    raise errors.UsageError(
        f"hybrid.{first.method}: the adapter block has this name, its method's;"
        f" call the other {first.method}_2, or the like")
  found = {first.method: first}
  for name in sorted(others):
    with adapters.hybrid.named(name):
      if not isinstance(others[name], Mapping) or "method" not in others[name]:
        raise errors.UsageError(
            f"hybrid.{name} is no adapter block; write config.hybrid.{name} = "
            'common.adapter(method="houlsby", rank=8)')
      if others[name]["init_from"]:
        raise errors.UsageError(
            f"adapter.init_from={others[name]['init_from']}: only the adapter "
            "block can start from a folder, with all that is in it")
      found[name] = _adapter(others[name])
  found = adapters.hybrid.by_name(found)
  adapters.hybrid.alone(found)
  return found


def _adapter(block: Config) -> adapters.AdapterConfig:
  found = _fields(
      adapters.AdapterConfig, block, options=_options("adapter.options", block),
      init_options=_options("adapter.init_options", block, "rho=2.0"),
      rank_pattern=_pattern("adapter.rank_pattern", block, int),
      alpha_pattern=_pattern("adapter.alpha_pattern", block, float),
      modules_to_save=names(block["modules_to_save"]),
      trainable_token_indices=_token_indices(block))
  return registry.checked(found)


def _options(
    field: str, block: Config, example: str = "d_initial=0.1,projection_key=3"
) -> dict[str, str]:
  """`"d_initial=0.1,projection_key=3"` as a dict of texts."""
  found = {}
  # Runs of earlier versions do not have it.
  for part in names(block.get(field.partition(".")[2], "")):
    name, equals, value = part.partition("=")
    if not equals:
      raise errors.UsageError(
          f'{field}: "{part}" is not <name>=<value>; write "{example}"')
    found[name.strip()] = value.strip()
  return found


def names(value: str) -> tuple[str, ...]:
  """`"a, b"` as a tuple."""
  return tuple(s.strip() for s in value.split(",") if s.strip())


def _token_indices(block: Config) -> tuple[int, ...] | str:
  value = block["trainable_token_indices"]
  try:
    return value if value == "new" else tuple(map(int, names(value)))
  except ValueError:
    raise errors.UsageError(
        f"adapter.trainable_token_indices={value} is no list of token ids; "
        'write "49152,49153", or new') from None


def load(
    config: Config, dtype: str | None = None, *, trains: bool = False
) -> api.Model:
  """The model of a config, on its mesh.

  Args:
    config: all blocks.
    dtype: compute type; the config's by default.
    trains: whether the `memory` block applies.

  Raises:
    errors.UserError: see `api.load`.
  """
  return api.load(
      locate(config["model"]["path"]), quant=quant(config),
      dtype=dtype or config["compute"]["dtype"],
      base_dtype=base_dtype(config), skip=skip(config),
      chat_template=chat_template(config), mesh=mesh(config),
      # Runs of earlier versions do not have these.
      attention=config["compute"].get("attention", "auto"),
      cache=config["model"].get("cache", True),
      add_tokens=names(config["model"].get("add_tokens", "")),
      pad_vocab_multiple=config["model"].get("pad_vocab_multiple", 1),
      offload=offload(config), memory=memory(config) if trains else None,
      scratch=scratch(config), seed=config["seed"])


def _pattern(field: str, block: Config, number: Callable) -> dict[str, Any]:
  """`"v_proj=32,up_proj=4"` as a dict."""
  found = {}
  for part in filter(None, block[field.partition(".")[2]].split(",")):
    name, _, value = part.strip().rpartition("=")
    try:
      re.compile(name)
      found[name] = number(value)
    except (ValueError, re.error) as error:
      raise errors.UsageError(
          f'{field}: "{part}" is not <module>=<number> ({error}); write '
          '"v_proj=32,up_proj=4"') from None
    if not name:
      raise errors.UsageError(
          f'{field}: "{part}" names no module; write "v_proj=32,up_proj=4"')
  return found


def train(config: Config) -> loop.TrainConfig:
  return _fields(loop.TrainConfig, config["train"]).validate()


def optim(config: Config) -> optim_lib.OptimConfig:
  return _fields(optim_lib.OptimConfig, config["optim"]).validate()


def precision(config: Config) -> precision_lib.Precision:
  return _fields(precision_lib.Precision, config["compute"]).validate()


def memory(config: Config) -> memory_lib.MemoryConfig:
  """The `memory` block, and `compute.mlp_tiles`."""
  found = _fields(
      memory_lib.MemoryConfig, config["memory"],
      mlp_tiles=config["compute"]["mlp_tiles"]).validate()
  found.parts(config["train"]["batch_size"])
  return found


def log(config: Config) -> sinks_lib.LogConfig:
  return _fields(sinks_lib.LogConfig, config["log"]).validate()


def base_dtype(config: Config) -> str:
  """`compute.base_dtype`, checked; configs of older runs have none."""
  compute = config["compute"]
  name = compute.get("base_dtype", "auto")
  precision_lib.base_dtype(compute["dtype"], name)
  return name


def scratch(config: Config) -> dict[str, str] | None:
  """`model.scratch`; None loads the checkpoint's weights."""
  return _options(
      "model.scratch", config["model"], "n_layers=6,d_model=256") or None


def offload(config: Config) -> tuple[str, ...]:
  """`compute.offload`, checked; configs of older runs have none."""
  return host_lib.kinds(names(config["compute"].get("offload", "")))


def mesh(config: Config) -> mesh_lib.MeshConfig:
  return _fields(mesh_lib.MeshConfig, config["mesh"])


def check(config: Config) -> None:
  """Everything that can be told before a model is loaded.

  Raises:
    errors.UsageError: for the first value that cannot be.
  """
  for build in (quant, skip, adapters_of, train, optim, precision, base_dtype,
                memory, log, offload, scratch):
    build(config)
  rules.check(adapters_of(config), config["train"]["steps"])
  precision_lib.check_frozen_matmul(
      config["compute"]["frozen_matmul"], config["compute"]["dtype"],
      config["adapter"]["method"])
  errors.choose("compute.remat", config["compute"]["remat"], remat.POLICIES)
  errors.choose("compute.attention", config["compute"]["attention"],
                attention.CHOICES)
  for block, name, least in (
      ("data", "max_length", 2), ("data", "eval_max_length", 2),
      ("data", "rows", 0), ("data", "train_rows", 0), ("data", "eval_rows", 0),
      ("data", "watch_rows", 0), ("data", "eval_seed", -1),
      ("train", "samples", 0),
      ("train", "sample_tokens", 1)):
    value = config[block].get(name, least)  # Earlier versions lack some.
    if value < least:
      raise errors.UsageError(
          f"{block}.{name}={value} is out of range; use an integer of at "
          f"least {least}")
  if config["seed"] < 0:
    raise errors.UsageError(
        f"seed={config['seed']} is out of range; use an integer of at least 0")


def locate(path: str) -> str:
  """A path as it is, or the cached file of `asset:<name>`.

  Raises:
    errors.UserError: if the asset cannot be fetched; if the path is of a run
      of one of `configs/` that has not been made.
  """
  if not path.startswith("asset:"):
    _check_run(pathlib.Path(path))
    return path
  from third_party import assets

  return str(assets.fetch(path.removeprefix("asset:")))


def _check_run(path: pathlib.Path) -> None:
  top, name, *inside = (*path.parts, "", "")
  if top == "runs" and any(inside) and not path.exists() and (
      pathlib.Path("configs") / f"{name}.py").exists():
    raise errors.UserError(
        f"{path} does not exist; make it with python -m experiments.run "
        f"--config=configs/{name}.py --workdir=runs/{name}")


def chat_template(config: Config) -> str | None:
  """Jinja text of `model.chat_template`, which may name a file."""
  value = config["model"]["chat_template"]
  if value and "{" not in value:
    return pathlib.Path(value).read_text()
  return value or None
