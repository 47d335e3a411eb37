"""Every method computes on eight virtual devices what it does on one."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from tests import devices
from tests.adapters import contract

# One of each kind: what is shared, blocks, norms and the input. The rest of
# the default run's methods are in tests/models/test_sharding.py.
DEFAULT = ("vera", "ln_tuning", "prompt", "houlsby")


def check(methods):
  run = subprocess.run(
      [sys.executable, "-m", "tests.adapters.sharded", *methods],
      cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True,
      timeout=3000, env=devices.environ(8))
  assert run.returncode == 0, run.stderr[-3000:]
  found = json.loads(run.stdout.splitlines()[-1])
  assert set(found) == set(methods)
  for name, result in found.items():
    one, many = result["losses"]
    print(f"{name:18} loss {abs(many / one - 1):.1e} "
          f"gradients {result['worst']:.1e}")
  for name, result in found.items():
    one, many = result["losses"]
    assert abs(many / one - 1) < 1e-5, name
    assert result["worst"] < 2e-5, name


def test_methods_of_each_kind():
  check(DEFAULT)


@pytest.mark.slow  # Two programs a method, one of them for eight devices.
@pytest.mark.timeout(3100)
def test_every_method():
  check(contract.METHODS)
