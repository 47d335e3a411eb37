"""Values of a config that are written as text."""

from __future__ import annotations

import re

import pytest

from configs import common
from experiments import blocks
from experiments import run
from lora_jax import errors


def adapter(**fields):
  config = common.get_config()
  config.adapter.update(fields)
  return blocks.adapter(config.to_dict())


def test_patterns_of_modules():
  found = adapter(
      rank_pattern=r"v_proj=32, layers\.0\.mlp\.up_proj=4",
      alpha_pattern="v_proj=2.5")
  assert found.rank_pattern == {
      "v_proj": 32, r"layers\.0\.mlp\.up_proj": 4}
  assert found.alpha_pattern == {"v_proj": 2.5}
  assert adapter().rank_pattern == {}


@pytest.mark.parametrize("written, message", [
    ("v_proj", '"v_proj" is not <module>=<number>'),
    ("v_proj=x", '"v_proj=x" is not <module>=<number>'),
    ("v_proj=2.5", '"v_proj=2.5" is not <module>=<number>'),
    ("[=2", '"[=2" is not <module>=<number>'),
    ("=2", '"=2" names no module'),
    ("v_proj=0", 'adapter.rank_pattern["v_proj"]=0 is out of range'),
])
def test_a_pattern_that_cannot_be_read(written, message):
  with pytest.raises(errors.UsageError, match=re.escape(message)):
    adapter(rank_pattern=written)


def test_what_is_offloaded():
  config = common.get_config()
  assert blocks.offload(config.to_dict()) == ()
  before = run._identity(config.to_dict())
  config.compute.offload = "optimiser, base"
  assert blocks.offload(config.to_dict()) == ("base", "optimiser")
  # Where things are decides no result: a run goes on elsewhere.
  assert run._identity(config.to_dict()) == before
  config.compute.offload = "optimizer"
  with pytest.raises(errors.UsageError, match='did you mean "optimiser"'):
    blocks.check(config.to_dict())
