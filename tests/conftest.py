"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import pathlib

# Before jax is imported, and inherited by the commands that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests take, and unoptimised code takes a third
# of it. XLA_FLAGS="" tests code as users run it; what promises bits is tested
# in such code in any case (tests/quant/test_optimised.py).
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0"
    # Small programs take a fifth longer when they are cut up for threads.
    " --xla_cpu_parallel_codegen_split_count=1" + (
        " --xla_cpu_use_fusion_emitters=false"  # jaxlib 0.11 has no such flag.
        if importlib.metadata.version("jaxlib").startswith("0.10.") else ""))
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"))
# Workers, commands and, as programs are forgotten, modules have many alike.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

# Tracing makes many objects, few of them in cycles: looking for those each 700
# takes a twentieth of the time, and more the more programs there are.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _imported():
  """What was imported stays; there is no use in looking at it for garbage."""
  gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _programs():
  """Forgets the programs of other modules.

  Every program compiled for a CPU has memory mappings; with thousands of them a
  test takes a tenth longer, and XLA crashes when it has the 65,530 that Linux
  gives a process.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def smollm2_path() -> pathlib.Path:
  """SmolLM2-135M-Instruct as GGUF, fetched once into the cache."""
  from third_party import assets

  return assets.fetch("smollm2-135m-instruct")
