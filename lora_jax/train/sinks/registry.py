"""The table of sinks."""

from __future__ import annotations

from collections.abc import Callable

from lora_jax.train.sinks import base
from lora_jax.train.sinks import mlflow
from lora_jax.train.sinks import tensorboard
from lora_jax.train.sinks import wandb

SINKS: dict[str, Callable[[base.LogConfig], base.Sink]] = {
    "tensorboard": tensorboard.TensorBoard,
    "wandb": wandb.WandB,
    "mlflow": mlflow.MLflow,
}
