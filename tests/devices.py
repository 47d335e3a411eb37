"""The environment of processes that see several devices of a CPU."""

from __future__ import annotations

import os


def environ(count: int, **others: str) -> dict[str, str]:
  """As of this process, with its flags of XLA."""
  return os.environ | {
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
                   f"--xla_force_host_platform_device_count={count}",
      # Threads: with one a device, two collectives at once that devices come
      # to in another order wait for each other for ever.
      "NPROC": "64"} | others
