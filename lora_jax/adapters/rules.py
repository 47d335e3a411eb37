"""What the parts of a model with several methods add to training.

A rule knows the tree of its own method; here it is shown that of its part.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import optax

from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import hybrid
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import registry
from lora_jax.adapters import several


def of_parts(
    configs: Mapping[str, config_lib.AdapterConfig], steps: int,
    adapters: base.Adapters
) -> tuple[method_lib.Rule, ...]:
  """`registry.rules` of all parts.

  Args:
    configs: by the name of the part; "" is one that is alone.
    steps: of the run.
    adapters: what is trained.

  Raises:
    errors.UsageError: see `registry.rules`.
  """
  if "" in configs:
    return registry.rules(configs[""], steps, adapters)
  names = tuple(configs)
  trees = several.apart(adapters, names)
  found: list[method_lib.Rule] = []
  for name, config in configs.items():
    with hybrid.named(None if name == names[0] else name):
      found += [OfPart(rule, name, names) for rule in registry.rules(
          config, steps, trees[name])]
  return tuple(found)


def check(configs: hybrid.Configs, steps: int) -> None:
  """`registry.rules` of configs alone, for its errors."""
  if isinstance(configs, config_lib.AdapterConfig):
    registry.rules(configs, steps)
    return
  found = hybrid.by_name(configs)
  for number, (name, config) in enumerate(found.items()):
    with hybrid.named(name if number else None):
      registry.rules(config, steps)


@dataclasses.dataclass(frozen=True)
class OfPart(method_lib.Rule):
  """Attributes:

    rule: of the part.
    name: the part's.
    names: of all parts, in their order.
  """

  rule: method_lib.Rule
  name: str
  names: tuple[str, ...]

  def _own(self, tree: base.Adapters) -> base.Adapters:
    return several.apart(tree, self.names)[self.name]

  def _with(self, tree: base.Adapters, own: base.Adapters) -> base.Adapters:
    """The whole tree with other adapters of the part."""

    def at(field):
      mine = getattr(own, field)
      return {target: one if target not in mine else dataclasses.replace(
          one, parts=one.parts | {self.name: mine[target]})
              for target, one in getattr(tree, field).items()}

    return dataclasses.replace(tree, layers=at("layers"), outer=at("outer"))

  def penalty(self, params: types.Tree):
    return self.rule.penalty(self._own(params))

  def wrap(self, inner):
    inner = optax.with_extra_args_support(inner)

    def init(params):
      # The rule's own state is of the part, the optimiser's of all.
      whole = optax.GradientTransformation(
          lambda own: inner.init(params), inner.update)
      return self.rule.wrap(whole).init(self._own(params))

    def update(updates, state, params=None, **extra):
      found = []

      def whole(own, held, own_params=None, **unused):
        del own_params, unused
        new, held = inner.update(
            self._with(updates, own), held, params, **extra)
        found.append(new)
        return self._own(new), held

      told = {name: self._own(value) if isinstance(value, base.Adapters)
              else value for name, value in extra.items()}
      ruled = self.rule.wrap(optax.GradientTransformationExtraArgs(
          inner.init, whole))
      own, state = ruled.update(
          self._own(updates), state, self._own(params), **told)
      return self._with(found[0], own), state

    return optax.GradientTransformationExtraArgs(init, update)
