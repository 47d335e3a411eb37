"""Bits that are promised, in optimised code, as users run it.

The other tests run code that is compiled fast (tests/conftest.py), in which
LLVM fuses and reorders less.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

# Codes, statistics and values; and what is like them.
FILES = ("tests/quant/test_base.py", "tests/quant/test_double.py",
         "tests/quant/test_registry.py", "tests/kernels/test_exact.py")
OTHERS = ("tests/quant/test_codebook.py", "tests/quant/test_bnb.py",
          "tests/kernels/test_dequantise.py")
# Of two formats that differ in a table or in the axis of a scale, one.
LIKE_OTHERS = " and not fp4 and not llm_int8"
PROMISED = ("numpys or bitsandbytes or rounded or rounding "
            "or outer_jit")


# Optimised code takes three times as long to compile.
@pytest.mark.parametrize("files, but, least", [
    (FILES, LIKE_OTHERS, 30),
    pytest.param(FILES + OTHERS, "", 80, marks=pytest.mark.slow)],
    ids=["some", "all"])
def test_bits_are_the_same_in_optimised_code(files, but, least):
  run = subprocess.run(
      [sys.executable, "-m", "pytest", *files, "-k",
       f"({PROMISED}){but}", "-rs"],
      cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True,
      timeout=580, env=os.environ | {"XLA_FLAGS": ""})
  assert run.returncode == 0, run.stdout[-3000:]
  passed = re.search(r"(\d+) passed", run.stdout)
  assert passed and int(passed[1]) > least, run.stdout[-3000:]
