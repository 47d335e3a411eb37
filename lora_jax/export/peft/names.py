"""Names of files, keys and tensors in an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import registry

PREFIX = "base_model.model."
# Of what all modules share.
SHARED = "base_model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Metadata key of the fingerprint of the base an adapter was trained on.
FINGERPRINT = "lora_jax.base"
# Of the base weights that the start of an adapter replaced; see `starts`.
REPLACED = "lora_jax.replaced"
# Of an adapter that is written as its difference from its start: what of its
# config was changed to that end, as JSON; see `difference`.
BEGAN = "lora_jax.began"
# Key of a config that PEFT does not know: the adapter block itself.
OWN = "lora_jax"
# Initialisations after which the folder needs no other base weights.
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


def method_of(
    config: Mapping[str, Any], place: str
) -> tuple[str, method_lib.Method]:
  """(name, row) of the method that an `adapter_config.json` is of.

  Of several rows with its `peft_type` the one that asks for most counts.

  Args:
    config: the file's content.
    place: the file, for errors.

  Raises:
    errors.UserError: if there is none, or an option is not supported.
  """
  if OWN in config:
    name = config[OWN].get("method")
    return name, errors.choose(f"{place}: {OWN}.method", name, {
        k: v for k, v in registry.METHODS.items() if v.adapter})
  forms = {name: row.form for name, row in registry.METHODS.items()
           if row.form is not None and not row.form.same_as}
  kind = config.get("peft_type")
  fitting = [
      name for name, form in forms.items() if form.peft_type == kind
      and all(_is(config.get(k), v) for k, v in form.requires.items())]
  if not fitting:
    known = ", ".join(sorted({form.peft_type for form in forms.values()}))
    raise errors.UserError(
        f'{place}: peft_type="{kind}" is not supported; supported: {known}')
  name = max(fitting, key=lambda n: len(forms[n].requires))
  for option, values in forms[name].neutral.items():
    if option in config and config[option] not in values:
      raise errors.UserError(
          f"{place}: {option}={config[option]!r} is not supported; merge the "
          "adapter with PEFT and use the merged model")
  return name, registry.METHODS[name]


def _is(value: Any, required: Any) -> bool:
  """Whether an option is as required; of True and False, whether it is set."""
  if isinstance(required, bool):
    return bool(value) == required
  return value == required
