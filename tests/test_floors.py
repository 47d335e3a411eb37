"""The house: what may import what, and how long a file may be."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A module may import those of its own rank's package and of lower ranks.
FLOORS = {
    "lora_jax.errors": 0,
    "lora_jax.struct": 0,
    "lora_jax.types": 0,
    "lora_jax.trees": 1,
    "lora_jax.host": 1,
    "lora_jax.keep": 1,
    "lora_jax.mesh": 1,
    "lora_jax.processes": 1,
    "lora_jax.kernels": 2,
    "lora_jax.quant": 3,
    "lora_jax.adapters": 4,
    "lora_jax.models": 5,
    "lora_jax.train": 6,
    "lora_jax.evaluate": 6,
    "lora_jax.merge": 6,
    "lora_jax.export": 6,
    "lora_jax.api": 7,
    "third_party": 7,
    "experiments": 8,
}
# Floors that stand beside the stairs, and all that they may import.
BESIDE = {
    "lora_jax.data": {"lora_jax.data", "lora_jax.types", "lora_jax.errors"},
    "configs": {"configs.common", "configs.grid"},
}
SOURCES = sorted(
    p for top in ("lora_jax", "experiments", "configs", "third_party")
    for p in (ROOT / top).rglob("*.py"))


def floor(module: str) -> str:
  known = [f for f in (*FLOORS, *BESIDE)
           if module == f or module.startswith(f"{f}.")]
  return max(known, key=len, default="")


def imports(tree: ast.AST) -> set[str]:
  """Modules of this project that a file imports, at any depth."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  tops = ("lora_jax", "experiments", "configs", "third_party")
  return {m for m in found if m.split(".")[0] in tops}


def complaints(path: pathlib.Path, text: str) -> list[str]:
  module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  here = floor(module)
  wrong = []
  for other in imports(ast.parse(text)):
    there = floor(other)
    if here in BESIDE:
      allowed = any(
          other == a or other.startswith(f"{a}.") for a in BESIDE[here])
    elif here == "third_party":
      allowed = there in ("third_party", "lora_jax.errors")
    elif there in BESIDE:
      allowed = FLOORS[here] >= 6
    else:
      allowed = FLOORS[there] <= FLOORS[here] and (
          there.split(".")[0] != "experiments" or here == "experiments")
    if not allowed:
      wrong.append(f"{module} imports {other}")
  return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(
    p.relative_to(ROOT)))
def test_a_file_keeps_to_its_floor_and_length(path):
  text = path.read_text()
  module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  if module != "lora_jax.__init__":
    assert floor(module), f"{module} stands on no floor"
    assert not complaints(path, text)
  assert text.count("\n") <= 500
  assert not re.search(r"import torch\b", text)
  # Structures of such dataclasses equal those of other classes; see `struct`.
  assert module == "lora_jax.struct" or not (
      "from flax import" in text or "register_dataclass" in text)


def test_the_rule_catches_a_wrong_import():
  quant = ROOT / "lora_jax" / "quant" / "new.py"
  assert complaints(quant, "from lora_jax.models import decoder")
  assert complaints(quant, "def f():\n  from lora_jax import data")
  assert not complaints(quant, "from lora_jax import trees")
  data = ROOT / "lora_jax" / "data" / "new.py"
  assert complaints(data, "from lora_jax import trees")
