"""Tiny models of every family, shared by the tests of `models`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lora_jax.models import init
from tests.models import tiny


@pytest.fixture(scope="session", params=sorted(tiny.CONFIGS))
def model(request):
  """(config, base) of each family, random."""
  config = tiny.CONFIGS[request.param]
  return config, init.random_base(jax.random.key(1), config)


@pytest.fixture(scope="session")
def row():
  """Tokens `[1, t]`, longer than the window and the context."""
  return jax.random.randint(jax.random.key(2), (1, 24), 0, tiny.VOCAB)


@pytest.fixture(scope="session")
def plain(model, row):
  """Logits `[t, v]` of one plain pass over `row`."""
  config, base = model
  positions = jnp.arange(row.shape[1])[None]
  return tiny.logits(
      config, base, row, positions, jnp.ones_like(row))[0]
