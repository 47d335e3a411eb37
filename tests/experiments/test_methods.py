"""configs/methods/ and docs/METHODS.md, against the registry."""

from __future__ import annotations

import functools
import importlib
import json
import pathlib

import jax
import pytest

from experiments import blocks
from experiments import methods
from experiments.bench import geometry
from lora_jax.adapters import assemble
from lora_jax.adapters import registry
from lora_jax.models import init
from lora_jax.models import modules

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(
    p.stem for p in (ROOT / "configs" / "methods").glob("[a-z]*.py"))
SMOLLM2 = geometry.geometry("smollm2-135m")


@functools.cache
def base():
  """SmolLM2's shapes, without numbers."""
  return jax.eval_shape(
      lambda: init.random_base(jax.random.key(0), SMOLLM2))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_fits_the_model_it_is_for(name):
  config = importlib.import_module(f"configs.methods.{name}").get_config()
  resolved = json.loads(config.to_json_best_effort())
  blocks.check(resolved)
  block = blocks.adapter(resolved)
  assert block.method == name
  tree = jax.eval_shape(lambda: assemble.build(
      jax.random.key(0), block, base(), modules.paths(SMOLLM2),
      geometry=modules.geometry(SMOLLM2))[1])
  assert jax.tree.leaves(tree)


def test_every_method_has_a_config():
  assert set(CONFIGS) == {
      name for name, row in registry.METHODS.items() if row.adapter}


def test_the_page_is_what_the_registry_says():
  page = (ROOT / "docs" / "METHODS.md").read_text()
  assert page == methods.table(), (
      "run python -m experiments.methods --output=docs/METHODS.md")


def test_known_counts():
  """Llama-2-7B's and SmolLM2's, r=16 on all linears, and others' defaults."""
  llama = geometry.geometry("llama2-7b")
  assert methods.parameters("lora", llama) == 39_976_960
  assert methods.parameters("lora", SMOLLM2) == 4_884_480
  assert methods.parameters("dora", SMOLLM2) == 5_040_000
  assert methods.parameters("ia3", SMOLLM2) == 57_600
  assert methods.parameters("prefix", SMOLLM2) == 230_400
  assert methods.parameters("prompt", SMOLLM2) == 11_520
