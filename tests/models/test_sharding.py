"""Eight virtual devices compute what one does, and exchange few bytes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import mesh as mesh_lib
from tests import devices
from tests.models import eight

RUNS = [f"{case} {mesh}" for case, names in eight.CASES.items()
        for mesh in names]
FLOATS = ("f32", "bf16", "f16")


def measure(folder, *parts):
  """`eight.main`'s report, from a process with 8 devices."""
  run = subprocess.run(
      [sys.executable, "-m", "tests.models.eight", str(folder), *parts],
      cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True,
      timeout=1500 if parts else 580, env=devices.environ(8))
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  return measure(tmp_path_factory.mktemp("eight"))


@pytest.mark.slow  # 24 programs for eight devices: ten minutes.
@pytest.mark.timeout(1600)
def test_every_method_and_base_on_every_mesh(tmp_path):
  found = measure(tmp_path, "every case")["every case"]
  del found["restored"]
  assert len(found) == 3 * 2 * 4
  for name, result in found.items():
    worst = max(*result["grads"].values(), *result["params"].values())
    loss = max(abs(a / b - 1) for a, b in zip(*result["losses"]))
    print(f"{name:18} loss {loss:.1e} gradients and parameters {worst:.1e}")
    assert max(worst, loss) <= 1e-5, name
    assert not result["astray"], name


@pytest.mark.parametrize("name", RUNS)
def test_two_steps_equal_those_of_one_device(report, name):
  result = report["equality"][name]
  np.testing.assert_allclose(*result["losses"], rtol=1e-5)
  assert max(result["grads"].values()) <= 1e-5, result["grads"]
  assert max(result["params"].values()) <= 1e-5, result["params"]


@pytest.mark.parametrize("name", RUNS)
def test_everything_lives_where_the_table_says(report, name):
  """Base, adapters and optimiser states, before and after each step."""
  result = report["equality"][name]
  assert not result["astray"]
  assert result["cut"] > 0 or name.endswith(" data")


@pytest.mark.parametrize("mesh", ["None", "fsdp"])
def test_a_checkpoint_of_one_mesh_goes_on_on_another(report, mesh):
  result = report["equality"]["restored"][mesh]
  np.testing.assert_allclose(*result["first"], rtol=1e-5)
  np.testing.assert_allclose(*result["second"], rtol=1e-5)
  assert max(result["params"].values()) <= 1e-5
  assert not result["astray"]


def test_parts_are_dequantised_where_they_are(report):
  """What TPUs need for a kernel; o_proj and down_proj are cut along i."""
  found = report["housed"]
  assert not found["unequal"]
  assert {"nf4 q_proj", "nf4 o_proj", "int4_affine gate_proj"} <= set(
      found["housed"])
  # A column's one scale has no part that belongs to some of its rows.
  assert "llm_int8 q_proj" in found["housed"]
  assert "llm_int8 o_proj" not in found["housed"]


@pytest.mark.parametrize("mesh", ["fsdp", "mixed"])
def test_codes_are_gathered_not_floats(report, mesh):
  check_collectives(report[f"collectives {mesh}"], mesh)


@pytest.mark.slow  # The mixed mesh has its axis, too.
def test_codes_are_gathered_along_the_model_s_axis_alone(tmp_path):
  name = "collectives tensor"
  check_collectives(measure(tmp_path, name)[name], "tensor")


def check_collectives(found, mesh):
  least = eight.SMALLEST // eight.MESHES[mesh][2]
  assert len(found) > 10
  for operation, dtype, elements in found:
    assert dtype not in FLOATS or elements < least, (operation, elements)
  codes = [n for operation, dtype, n in found
           if (operation, dtype) == ("all-gather", "u8") and n >= least // 2]
  # Seven weights, in the forward and again in the backward pass.
  assert len(codes) >= 14


def test_blocks_of_moments_are_cut_as_their_parameters(report):
  """8-bit Adam: the same codes, and no value leaves its device."""
  found = report["moments"]
  assert not found["unequal"] and not found["astray"]
  assert found["updates"] <= 1e-6
  assert found["shards"] == {
      "a uint8": [2, 128, 16], "a float32": [2, 8, 1],
      "b uint8": [2, 16, 256], "b float32": [2, 16, 1]}
  assert not found["collectives"]


def test_loading_in_parts(report):
  result = report["loading"]
  assert result["fingerprints"][0] == result["fingerprints"][1]
  assert not result["unequal"]  # Codes and scales, to the bit.
  assert not result["astray"] and not result["whole"]
  # [l, i / 2, o] of 24 x 32 and 40 x 24: along model by 2, the other by 2.
  assert result["codes"] == {"q_proj": [2, 6, 16], "down_proj": [2, 10, 12]}


def test_a_random_base_in_parts(report):
  assert report["loading"]["random"] <= 1e-6
  assert not report["loading"]["random astray"]


def test_evaluating_and_generating_on_a_mesh(report):
  one, mesh = report["evaluation"]["one"], report["evaluation"]["mesh"]
  np.testing.assert_allclose(mesh["nll"], one["nll"], rtol=1e-5)
  assert mesh["weight"] == one["weight"] and len(one["nll"]) == 7
  assert mesh["tokens"] == one["tokens"]
  assert {len(x) for x in one["tokens"]} == {6}


def test_sizes_that_do_not_fit_are_named():
  with pytest.raises(errors.UsageError, match=r"mesh\.data=3"):
    mesh_lib.make(mesh_lib.MeshConfig(data=3), jax.devices()[:1])
  with pytest.raises(errors.UsageError, match="use -1 for one of them"):
    mesh_lib.make(mesh_lib.MeshConfig(data=-1, fsdp=-1), jax.devices()[:1])


def test_every_device_has_its_part_in_host_memory(report):
  """Base, optimiser states and what the backward pass keeps."""
  found = report["offloaded"]
  np.testing.assert_allclose(*found["losses"], rtol=1e-5)
  assert max(found["params"].values()) <= 1e-5, found["params"]
  assert not found["astray"]
  assert found["cut"] >= 14  # Codes of seven matrices; moments of A and B.
  assert any("opt_state" in path for path in found["away"])
  assert any(".codes" in path for path in found["away"])


def test_a_base_is_read_into_host_memory_in_parts(report):
  found = report["loading"]
  assert len(found["in host memory"]) >= 14
  assert all("layers." in path for path in found["in host memory"])
  assert not found["unequal in host memory"]
