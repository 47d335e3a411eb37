"""Devices to compile for that this machine does not have.

TPUs come from libtpu, the H100 from jax's CUDA plugin and a description of the
card; a program compiled for either cannot run here.
"""

from __future__ import annotations

import importlib.util
import os

import jax
from jax.experimental import topologies

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# A second process may load libtpu beside another test's.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# What XLA asks a card for when it compiles.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# What a program that contains the kernel calls.
CALLS = {"tpu": "tpu_custom_call", "gpu": "mosaic_gpu"}


def missing(name: str) -> str:
  """Why devices `name` cannot be compiled for here, or an empty string."""
  module = "jax_plugins.xla_cuda13" if name.startswith("h100") else "libtpu"
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:
    found = None
  return "" if found else f'{module} is not installed: pip install ".[aot]"'


def devices(name: str) -> list[jax.Device]:
  """Devices of a TPU topology such as `"v5e:2x2"`, or `"h100"`, `"h100:4"`."""
  if name.startswith("h100"):
    count = name.partition(":")[2] or "1"
    return topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=f"1x1x{count}",
        target_config=H100).devices
  return topologies.get_topology_desc(
      platform="tpu", topology_name=name).devices
