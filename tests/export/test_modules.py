"""PEFT adapts exactly the modules that we do, however they were named."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax.adapters import assemble
from lora_jax.export import peft as peft_export
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import modules
from tests import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

# Layers 1 and 11 begin alike.
DEPTH = 12
LLAMA = dataclasses.replace(tiny.CONFIGS["llama"], n_layers=DEPTH)
PHI3 = dataclasses.replace(tiny.CONFIGS["phi3"], n_layers=3)

# Our fields; the ranks that PEFT is to have, by layer and module.
OURS = {
    "one layer": (
        dict(targets="q_proj,mlp.up_proj", layers="1"),
        {(1, "q_proj"): 2, (1, "up_proj"): 2}),
    "ranges": (
        dict(targets="q_proj", layers="0-2,11"),
        {(n, "q_proj"): 2 for n in (0, 1, 2, 11)}),
    "the last layers": (
        dict(targets="v_proj", layers="10-11"),
        {(n, "v_proj"): 2 for n in (10, 11)}),
    "a regex": (
        dict(targets=r".*layers\.(1|11)\.(mlp\.down|self_attn\.k)_proj"),
        {(n, name): 2 for n in (1, 11) for name in ("down_proj", "k_proj")}),
    "one target everywhere, one in part": (
        dict(targets=r".*\.q_proj|.*layers\.1\.mlp\.up_proj"),
        {(n, "q_proj"): 2 for n in range(DEPTH)} | {(1, "up_proj"): 2}),
    "patterns by path": (
        dict(targets="q_proj", layers="0-3",
             rank_pattern={"layers.1.self_attn.q_proj": 5, "q_proj": 3},
             alpha_pattern={r"layers\.[01]\..*": 7.0}),
        {(0, "q_proj"): 3, (1, "q_proj"): 5, (2, "q_proj"): 3,
         (3, "q_proj"): 3}),
    "widely different ranks": (
        dict(targets="q_proj,o_proj", rank_pattern={r"layers\.11\..*": 24}),
        {(n, name): 24 if n == 11 else 2 for n in range(DEPTH)
         for name in ("q_proj", "o_proj")}),
}
# PEFT's options; the layers and modules that it adapts with them.
THEIRS = {
    "layers_to_transform": (
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 11]),
        {(n, name) for n in (1, 11) for name in ("q_proj", "up_proj")}),
    "one layer": (
        dict(target_modules=["q_proj"], layers_to_transform=1),
        {(1, "q_proj")}),
    "layers_pattern": (
        dict(target_modules=["down_proj"], layers_to_transform=[0, 2],
             layers_pattern="layers"),
        {(0, "down_proj"), (2, "down_proj")}),
    "several patterns": (
        dict(target_modules=["down_proj"], layers_to_transform=[2],
             layers_pattern=["h", "layers"]), {(2, "down_proj")}),
    "exclude by suffix": (
        dict(target_modules=["q_proj", "v_proj"],
             exclude_modules=["layers.1.self_attn.q_proj", "v_proj"]),
        {(n, "q_proj") for n in range(DEPTH) if n != 1}),
    "exclude by regex": (
        dict(target_modules="all-linear",
             exclude_modules=r".*layers\.\d\..*|.*layers\.1\d\.mlp.*"
                             r"|.*[kvo]_proj"),
        {(10, "q_proj"), (11, "q_proj")}),
    "a regex": (
        dict(target_modules=r".*layers\.(1|11)\.mlp\.(up|gate)_proj"),
        {(n, name) for n in (1, 11) for name in ("up_proj", "gate_proj")}),
    "a regex, and one excluded": (
        dict(target_modules=r".*\.self_attn\.[qk]_proj",
             exclude_modules=r".*layers\.[0-9]\..*"),
        {(n, name) for n in (10, 11) for name in ("q_proj", "k_proj")}),
}


@functools.cache
def parts(config):
  return init.random_base(jax.random.key(1), config)


def adapted(model):
  """(layer, name) -> (rank, scale) of what PEFT has adapted."""
  found = {}
  for path, module in model.named_modules():
    if hasattr(module, "lora_A") and hasattr(module, "r"):
      *_, layer, _, name = path.split(".")
      found[int(layer), name] = (
          module.r["default"], float(np.float32(module.scaling["default"])))
  return found


def placed(tree):
  """The same of ours."""
  return {(layer, name): (int(rank), float(scale))
          for name, p in assemble.placements(tree).items()
          for layer, (rank, scale) in enumerate(zip(p.rank, p.scale)) if rank}


@pytest.mark.parametrize("case", OURS)
def test_peft_adapts_what_we_do(case, tmp_path):
  fields, expected = OURS[case]
  block = adapters_lib.AdapterConfig(rank=2, alpha=4.0, **fields)
  paths = modules.paths(LLAMA)
  _, tree = adapters_lib.build(jax.random.key(0), block, parts(LLAMA), paths)
  peft_export.write(
      tmp_path / "a", tree, peft_export.peft_config(block, tree, paths), paths)
  config = peft.LoraConfig.from_pretrained(str(tmp_path / "a"))
  model = peft.get_peft_model(
      tiny.to_torch(LLAMA, parts(LLAMA), tmp_path / "base"), config)
  found = adapted(model)
  assert {k: rank for k, (rank, _) in found.items()} == expected
  assert found == placed(tree)


@pytest.mark.parametrize("case", THEIRS)
def test_we_adapt_what_peft_does(case, tmp_path):
  options, expected = THEIRS[case]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(
        tiny.to_torch(LLAMA, parts(LLAMA), tmp_path / "base"), peft.LoraConfig(
            r=2, lora_alpha=4, init_lora_weights=False, **options))
  assert set(adapted(model)) == expected
  model.save_pretrained(tmp_path / "a")
  paths = modules.paths(LLAMA)
  loaded = peft_export.read(tmp_path / "a", paths, modules.shapes(LLAMA))
  assert placed(loaded.adapters) == adapted(model)
  # Written with their config, and with one of ours: PEFT adapts the same.
  again = {"theirs": loaded.peft_config, "ours": peft_export.peft_config(
      loaded.config, loaded.adapters, paths)}
  for name, content in again.items():
    peft_export.write(tmp_path / name, loaded.adapters, content, paths)
    config = peft.LoraConfig.from_pretrained(str(tmp_path / name))
    second = peft.get_peft_model(
        tiny.to_torch(LLAMA, parts(LLAMA), tmp_path / "base"), config)
    assert adapted(second) == adapted(model), name


@pytest.mark.parametrize("options", [
    dict(target_modules=["qkv_proj", "down_proj"], layers_to_transform=[1]),
    dict(target_modules="all-linear",
         exclude_modules=r".*layers\.[02]\..*|.*o_proj"),
    dict(target_modules=r".*layers\.2\.mlp\.gate_up_proj"),
], ids=["list", "excluded", "regex"])
def test_fused_modules_of_some_layers(options, tmp_path):
  """What is read as q, k and v goes back as the same qkv_proj."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(
        tiny.to_torch(PHI3, parts(PHI3), tmp_path / "base"), peft.LoraConfig(
            r=2, lora_alpha=4, init_lora_weights=False, **options))
  model.save_pretrained(tmp_path / "a")
  paths, fused = modules.paths(PHI3), hf.fused_modules(PHI3)
  loaded = peft_export.read(
      tmp_path / "a", paths, modules.shapes(PHI3), fused)
  ours = peft_export.peft_config(loaded.config, loaded.adapters, paths)
  for name, content in (("theirs", loaded.peft_config), ("ours", ours)):
    peft_export.write(
        tmp_path / name, loaded.adapters, content, paths, fused=fused)
    config = peft.LoraConfig.from_pretrained(str(tmp_path / name))
    second = peft.get_peft_model(
        tiny.to_torch(PHI3, parts(PHI3), tmp_path / "base"), config)
    assert adapted(second) == adapted(model), name
