"""Several processes that run one program: a pod, or a cluster of hosts.

Every process runs the same command on the same files; `mesh.fsdp` and the
like count the devices of all of them. Each computes the same batches and
keeps the parts of its own devices; one of them writes.

A process that fails ends at once, without waiting for the others. They notice
when they next exchange data, or, if it only fell silent, after 100 seconds,
and end too. The same commands then go on from the newest checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from lora_jax import errors


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """The `distributed` block of a config.

  Attributes:
    coordinator: "" for a single process; "auto" where JAX finds the others by
      itself (TPU pods, Slurm, Open MPI, Kubernetes, or the environment's
      JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID); or
      "host:port" of process 0.
    processes: how many; with "host:port".
    process: number of this one, from 0; with "host:port".
  """

  coordinator: str = ""
  processes: int = 0
  process: int = -1


def connect(config: DistributedConfig) -> None:
  """Joins the other processes; before anything else uses JAX.

  Raises:
    errors.UsageError: if the block is incomplete.
    errors.UserError: if the others are not found.
  """
  name = config.coordinator
  if not name:
    return
  arguments: dict[str, Any] = {}
  if name != "auto":
    host, _, port = name.rpartition(":")
    if not host or not port.isdigit():
      raise errors.UsageError(
          f'distributed.coordinator="{name}" is not an address; use '
          '"host:port" of process 0, or "auto"')
    if not 0 <= config.process < config.processes:
      raise errors.UsageError(
          f"distributed.process={config.process} of distributed.processes="
          f"{config.processes} is out of range; count processes from 0")
    arguments = dict(
        coordinator_address=name, num_processes=config.processes,
        process_id=config.process)
  try:
    jax.distributed.initialize(**arguments)
  except (ValueError, RuntimeError) as error:
    reason = str(error).splitlines()[0]
    raise errors.UserError(
        f"distributed.coordinator={name}: the processes did not meet "
        f"({reason}); start all of them with the same address, or name it as "
        '"host:port"') from None


def connected() -> bool:
  """Whether this is one of several processes; does not start a backend."""
  return jax.distributed.is_initialized()


def writes() -> bool:
  """Whether this process writes what is written once: process 0 does."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)
