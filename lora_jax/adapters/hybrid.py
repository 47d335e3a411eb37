"""What configs of several methods must be, and how their parts start.

  adapter + hybrid = {"lora": AdapterConfig(...), "houlsby": AdapterConfig(...)}

The first is the config's `adapter` block; errors of the others speak of
`hybrid.<name>`. See `several` for what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import re
from typing import Any

from lora_jax import errors
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import registry
from lora_jax.adapters import several
from lora_jax.adapters import targets
from lora_jax.adapters import tokens

NAME = re.compile(r"[A-Za-z][\w-]*")
# Names by which the tree's own nodes are known.
TAKEN = {"layers", "embed_tokens", "lm_head", *targets.ATTENTION, *targets.MLP}

Configs = (config_lib.AdapterConfig
           | Sequence[config_lib.AdapterConfig]
           | Mapping[str, config_lib.AdapterConfig])


def by_name(
    configs: Sequence[config_lib.AdapterConfig]
    | Mapping[str, config_lib.AdapterConfig]
) -> dict[str, config_lib.AdapterConfig]:
  """Configs by the names of their parts, in order.

  Names that are not given are the methods', numbered where there are two of
  one: lora, lora_2.

  Raises:
    errors.UsageError: if there is none, or a name that cannot be.
  """
  if isinstance(configs, Mapping):
    found = dict(configs)
  else:
    found = {}
    for config in configs:
      same = sum(c.method == config.method for c in found.values())
      found[f"{config.method}_{same + 1}" if same else config.method] = config
  if not found:
    raise errors.UsageError(
        "there is no adapter block; give one, or adapter.method=none")
  for name in found:
    if not NAME.fullmatch(name) or name in TAKEN:
      why = ("is a module's name" if name in TAKEN
             else "is no name of letters, digits, _ and -")
      raise errors.UsageError(f'hybrid: "{name}" {why}; call it otherwise')
  return found


@contextlib.contextmanager
def named(name: str | None) -> Iterator[None]:
  """Errors about `adapter.<field>` speak of `hybrid.<name>.<field>`."""
  try:
    yield
  except errors.UsageError as error:
    if name is None:
      raise
    raise errors.UsageError(
        re.sub(r"\badapter\.(?=[a-z])", f"hybrid.{name}.", str(error))
    ) from None


def check(
    config: config_lib.AdapterConfig, placed: Mapping[str, Any],
    before: Mapping[str, base.Adapters], whole: Sequence[str] = ()
) -> None:
  """Whether a part can stand where it does.

  Args:
    config: its block.
    placed: its placements by target; see `assemble.place`.
    before: the parts before it, by name.
    whole: modules that the first part trains whole.

  Raises:
    errors.UsageError: if it cannot.
  """
  if not before:
    return
  for field in ("modules_to_save", "trainable_token_indices"):
    if getattr(config, field):
      raise errors.UsageError(
          f"adapter.{field} belongs to the first of several parts, the "
          "adapter block; leave it empty")
  start = config.start()
  if start.replaces or start.informed is not None:
    raise errors.UsageError(
        f"adapter.init={config.init} replaces weights of the base or looks at "
        "rows, as only the first of several parts can do; make it the adapter "
        "block, or use adapter.init=default")
  first = next(iter(before.values()))
  rows = [t for t, a in first.outer.items()
          if isinstance(a, tokens.TokenRows)]
  for target, placement in placed.items():
    if target in (*whole, *rows):
      raise errors.UsageError(
          f'adapter.targets: "{target}" is trained whole, by the modules_to_'
          "save or trainable_token_indices of the adapter block; take it out "
          "of one of them")
    if target not in targets.NORMS:
      continue
    for name, tree in before.items():
      other = {**tree.layers, **tree.outer}.get(target)
      if other is not None and ((other.rank > 0) & (placement.rank > 0)).any():
        raise errors.UsageError(
            f'adapter.targets: "{target}" is trained by {name}, too; take it '
            "out of one of them")


def alone(configs: Mapping[str, config_lib.AdapterConfig]) -> None:
  """Refuses, among several, methods that make no adapter.

  Raises:
    errors.UsageError: names the first.
  """
  first = next(iter(configs))
  for name, config in configs.items():
    with named(None if name == first else name):
      if registry.method(config.method).build is not None:
        raise errors.UsageError(
            f"adapter.method={config.method} makes no adapter, and cannot be "
            "one of several; use it alone, or choose another method")


@dataclasses.dataclass(frozen=True)
class After:
  """`Method.init` of a part that stands after others.

  What it is given as shared is its own, and what the others share.
  """

  init: Callable[..., base.Adapter]

  def __call__(self, key, weight, slot, shared):
    own, others = shared
    if isinstance(weight, several.Adapted):
      weight = dataclasses.replace(
          weight, adapter=weight.adapter.bound(others))
    return self.init(key, weight, slot, own)


def adapted(
    weights: Mapping[str, types.Tree], below: base.Adapters
) -> dict[str, types.Tree]:
  """Projections and tables, perhaps stacked, as other parts leave them.

  Args:
    weights: by place; those of norms, blocks and the input stay.
    below: the other parts.
  """
  adapters = {**below.layers, **below.outer}

  def one(name, weight):
    if name not in adapters or name in targets.SITES + targets.NORMS:
      return weight
    return several.Adapted(weight, adapters[name])

  return {name: one(name, weight) for name, weight in weights.items()}
