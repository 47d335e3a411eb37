"""Selection of modules: presets, names, suffixes, regexes, layers."""

from __future__ import annotations

import re

import pytest

from lora_jax import errors
from lora_jax.adapters import assemble
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import targets
from lora_jax.models import config as model_config
from tests import tiny

PATHS = tiny.paths(model_config.ModelConfig(
    "llama", 31, 32, 48, 12, 4, 2, 8))
ALL = [True] * 12


def test_presets():
  chosen = targets.select(PATHS, "all-linear")
  assert set(chosen) == {*targets.ATTENTION, *targets.MLP}
  assert all(flags == ALL for flags in chosen.values())
  assert set(targets.select(PATHS, "mlp")) == set(targets.MLP)
  assert set(targets.select(PATHS, "qkv_proj,gate_up_proj")) == {
      "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
  both = targets.select(PATHS, ["attention", "up_proj"])
  assert set(both) == {*targets.ATTENTION, "up_proj"}


@pytest.mark.parametrize("written", ["q_proj,v_proj", ["q_proj", "v_proj"],
                                     "self_attn.q_proj, self_attn.v_proj"])
def test_names_and_suffixes(written):
  assert targets.select(PATHS, written) == {"q_proj": ALL, "v_proj": ALL}


def test_a_name_matches_whole_parts_only():
  with pytest.raises(errors.UsageError, match='"proj" matches no module'):
    targets.select(PATHS, "proj")


def test_a_regex_matches_the_whole_path():
  chosen = targets.select(PATHS, r".*\.layers\.(1|11)\.mlp\.(up|gate)_proj")
  flags = [i in (1, 11) for i in range(12)]
  assert chosen == {"up_proj": flags, "gate_proj": flags}


def test_layer_ranges():
  chosen = targets.select(PATHS, "q_proj", "0-2, 5,10-11")
  assert chosen["q_proj"] == [i in (0, 1, 2, 5, 10, 11) for i in range(12)]
  assert targets.select(PATHS, "q_proj", [3])["q_proj"].index(True) == 3


def test_outer_modules_ignore_layers():
  chosen = targets.select(PATHS, "q_proj,lm_head", "4")
  assert chosen["lm_head"] == [True]


@pytest.mark.parametrize("written, layers, message", [
    ("q_prj", None, '"q_prj" matches no module; did you mean "q_proj"?'),
    ("q_proj,nothing", None, '"nothing" matches no module'),
    (".*[", None, "is not a regular expression"),
    ("", None, "is empty"),
    ("q_proj", "12", "names layer 12; the model has layers 0 to 11"),
    ("q_proj", "a-b", "is not a list of ranges"),
])
def test_mistakes_are_named(written, layers, message):
  with pytest.raises(errors.UsageError, match=re.escape(message)):
    targets.select(PATHS, written, layers)


def test_ranks_alphas_and_scales_by_pattern():
  block = config_lib.AdapterConfig(
      method="rslora", rank=4, alpha=8.0, targets="q_proj,k_proj",
      rank_pattern={"k_proj": 16, r"layers\.1\.self_attn\.k_proj": 2},
      alpha_pattern={r"1\.self_attn\.q_proj": 2.0})
  placed = assemble.place(block, PATHS)
  # The first key that matches wins, as in PEFT: k_proj everywhere.
  assert placed["k_proj"].rank.tolist() == [16] * 12
  assert placed["k_proj"].scale.tolist() == [2.0] * 12
  assert placed["q_proj"].scale.tolist() == [4.0, 1.0] + [4.0] * 10
  # "1.self_attn" is layer 1 and no other: PEFT asks for a dot before a key.
  assert placed["q_proj"].width == 4


@pytest.mark.parametrize("fields, message", [
    ({"rank": 0}, "adapter.rank=0"), ({"rank": 5000}, "adapter.rank=5000"),
    ({"alpha": 0.0}, "adapter.alpha=0.0"), ({"dropout": 1.0}, "dropout=1.0"),
    ({"rank_pattern": {"q_proj": -1}}, 'adapter.rank_pattern["q_proj"]=-1'),
    ({"rank_pattern": {"qproj": 2}},
     'adapter.rank_pattern: "qproj" matches no adapted module; did you mean'),
    ({"targets": "mlp", "alpha_pattern": {"q_proj": 2.0}},
     'adapter.alpha_pattern: "q_proj" matches no adapted module'),
    ({"method": "lorra"}, 'adapter.method="lorra" is unknown; did you mean '
                          '"lora"?'),
])
def test_values_out_of_range_are_named(fields, message):
  with pytest.raises(errors.UsageError, match=re.escape(message)):
    assemble.place(config_lib.AdapterConfig(**fields), PATHS)
