"""PEFT methods: small trainable trees beside a frozen base."""

from lora_jax.adapters import hybrid
from lora_jax.adapters import several
from lora_jax.adapters import starts
from lora_jax.adapters.assemble import build
from lora_jax.adapters.base import Adapter
from lora_jax.adapters.base import Adapters
from lora_jax.adapters.base import Geometry
from lora_jax.adapters.config import AdapterConfig
from lora_jax.adapters.noise import Noise
from lora_jax.adapters.partition import beside
from lora_jax.adapters.partition import by_token
from lora_jax.adapters.partition import guided
from lora_jax.adapters.partition import is_guided
from lora_jax.adapters.partition import join
from lora_jax.adapters.partition import module
from lora_jax.adapters.partition import of_tokens
from lora_jax.adapters.partition import prepared
from lora_jax.adapters.partition import reader
from lora_jax.adapters.partition import split
from lora_jax.adapters.partition import trainable_size
from lora_jax.adapters.partition import unguided
from lora_jax.adapters.partition import virtual_places
from lora_jax.adapters.partition import virtual_tasks
from lora_jax.adapters.partition import virtual_tokens
from lora_jax.adapters.partition import with_rate
from lora_jax.adapters.partition import without_constants
from lora_jax.adapters.projection import keeps_sum
from lora_jax.adapters.projection import project
from lora_jax.adapters.projection import project_all
from lora_jax.adapters.registry import METHODS
from lora_jax.adapters.runs import cut as spans
from lora_jax.adapters.runs import each as stacks
from lora_jax.adapters.runs import layer
from lora_jax.adapters.runs import of_layers

__all__ = [
    "METHODS", "Adapter", "AdapterConfig", "Adapters", "Geometry", "Noise",
    "beside", "build", "by_token", "guided", "hybrid", "is_guided", "join",
    "keeps_sum", "layer", "module", "of_layers", "of_tokens", "prepared",
    "project", "project_all", "reader", "several", "spans", "split", "stacks",
    "starts", "trainable_size", "unguided", "virtual_places", "virtual_tasks",
    "virtual_tokens", "with_rate", "without_constants",
]
