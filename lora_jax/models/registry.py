"""The table of model families.

Adding one: a file in `families/` with `from_hf`, a row here, its options in
`tests/models/test_oracle.py`. All of them share `decoder` and the module
names of `hf.MODULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax import errors
from lora_jax.models import config as config_lib
from lora_jax.models.families import gemma2
from lora_jax.models.families import gemma3
from lora_jax.models.families import llama
from lora_jax.models.families import mistral
from lora_jax.models.families import phi3
from lora_jax.models.families import qwen2
from lora_jax.models.families import qwen3

FAMILIES: dict[str, Callable[..., config_lib.ModelConfig]] = {
    "llama": llama.from_hf,
    "mistral": mistral.from_hf,
    "qwen2": qwen2.from_hf,
    "qwen3": qwen3.from_hf,
    "gemma2": gemma2.from_hf,
    "gemma3_text": gemma3.from_hf,
    "gemma3": gemma3.from_multimodal,
    "phi3": phi3.from_hf,
}


def from_hf(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of a Hugging Face `config.json`.

  Args:
    hf: the file's content.
    source: its path, for messages.

  Raises:
    errors.UserError: if the family, or a value, is unsupported.
  """
  family = hf.get("model_type")
  if family not in FAMILIES:
    raise errors.UserError(
        f'{source}: model_type="{family}" is unsupported; supported: '
        f"{', '.join(FAMILIES)}")
  return FAMILIES[family](hf, source)
