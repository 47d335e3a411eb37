"""PEFT methods: small trainable trees beside a frozen base."""

from lora_jax.adapters import starts
from lora_jax.adapters.base import Adapter
from lora_jax.adapters.base import Adapters
from lora_jax.adapters.base import beside
from lora_jax.adapters.base import join
from lora_jax.adapters.base import keeps_sum
from lora_jax.adapters.base import Noise
from lora_jax.adapters.base import prepared
from lora_jax.adapters.base import project
from lora_jax.adapters.base import project_all
from lora_jax.adapters.base import split
from lora_jax.adapters.base import trainable_size
from lora_jax.adapters.base import without_constants
from lora_jax.adapters.config import AdapterConfig
from lora_jax.adapters.registry import build
from lora_jax.adapters.registry import METHODS

__all__ = [
    "METHODS", "Adapter", "AdapterConfig", "Adapters", "Noise", "beside",
    "build", "join", "keeps_sum", "prepared", "project", "project_all", "split",
    "starts", "trainable_size", "without_constants",
]
