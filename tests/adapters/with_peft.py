"""A config's adapter in PEFT and PEFT's here, for what interop has no case of.

`tests/export/test_interop.py` does the same for each method's defaults.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pathlib
import tempfile
from unittest import mock
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax.export import hf as hf_export
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from lora_jax.models import modules
from tests import tiny
from tests.adapters import contract

# With biases, as transformers has them.
CONFIG = dataclasses.replace(contract.CONFIG, o_bias=True, mlp_bias=True)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)
PATHS = modules.paths(CONFIG)


@functools.cache
def base():
  return init.random_base(jax.random.key(0), CONFIG)


def torch_model():
  """The base in transformers, to be changed."""
  return copy.deepcopy(_torch_model(CONFIG))


@functools.cache
def _torch_model(config):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  with tempfile.TemporaryDirectory() as folder:
    hf_export.write(f"{folder}/m", config, base(), None)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/m", dtype=torch.float32, attn_implementation="eager").eval()
  model.config.use_cache = False  # X-LoRA asks for it.
  return model


def peft_config(folder):
  """A folder's config in PEFT, which looks for other folders that it names
  where it runs."""
  import peft

  config = peft.PeftConfig.from_pretrained(str(folder))
  if hasattr(config, "adapters"):
    config.adapters = {
        name: str(folder / path) for name, path in config.adapters.items()}
  return config


@functools.cache
def psoft():
  """The functions of docs/FORMATS.md that hand over A and B of PSOFT."""
  text = pathlib.Path(__file__).parents[2].joinpath(
      "docs/FORMATS.md").read_text()
  found = {}
  exec(text.partition("```python\n")[2].partition("```")[0], found)
  return found


def loaded(model, folder):
  """A model that PEFT has made of a folder, with what it has to be told."""
  if model.peft_type == "PSOFT":
    psoft()["take_factors"](model, folder / peft_export.WEIGHTS)
  return model


def save(model, folder):
  """PEFT's `save_pretrained`, with what PEFT 0.21.2 leaves out of X-LoRA.

  It takes `layers.0` for a part of the expert "0", and so on: of the
  classifier nothing is saved, of an expert only the layer of its number, with
  the base's weights (`test_what_peft_saves` of test_xlora.py). Of the others
  there is one adapter, of which nothing is left out.
  """
  import peft.utils.save_and_load as peft_files
  import safetensors.torch

  with mock.patch.object(peft_files, "_filter_state_dict_for_adapter_name",
                         lambda tensors, names: tensors):
    model.save_pretrained(str(folder), selected_adapters=["default"])
  if model.peft_type == "PSOFT":
    psoft()["add_factors"](model, folder / peft_export.WEIGHTS)
  config, state = model.peft_config["default"], model.state_dict()
  if not getattr(config, "use_trainable_adapters", False):
    return
  for name in config.adapters:
    own = {
        key.replace(".lora_model.", ".").replace(f".{name}.weight", ".weight"):
        value.contiguous() for key, value in state.items()
        if ".lora_" in key and key.endswith(f".{name}.weight")}
    model.peft_config[name].save_pretrained(str(folder / name))
    safetensors.torch.save_file(own, folder / name / peft_export.WEIGHTS)
  config.adapters = {name: name for name in config.adapters}
  config.save_pretrained(str(folder))


def build(config, move=0.1):
  """Adapters of a config, with `move` times noise on what is trained."""
  _, tree = adapters_lib.build(
      jax.random.key(1), config, base(), PATHS,
      geometry=modules.geometry(CONFIG))
  return contract.moved(tree, move)


def logits(tree):
  positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  return np.asarray(tiny.logits(
      CONFIG, base(), TOKENS, positions, np.ones_like(positions), tree))


def write(folder, config, tree):
  peft_export.write(
      folder, tree, peft_export.peft_config(config, tree, PATHS), PATHS)


def read(folder):
  return peft_export.read(
      folder, PATHS, modules.shapes(CONFIG),
      geometry=modules.geometry(CONFIG))


def tensors(folder):
  return safetensors.numpy.load_file(folder / peft_export.WEIGHTS)


def check(config, tmp_path, keys=None, **more):
  """PEFT reads ours, we read PEFT's, and save it again byte for byte.

  Args:
    config: an adapter block.
    tmp_path: an empty folder.
    keys: to add to PEFT's config, which lacks them.
    **more: what PEFT's model is told beside the tokens.

  Returns:
    What was read, and PEFT's tensors.
  """
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  tree = build(config)
  write(tmp_path / "ours", config, tree)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = loaded(peft.PeftModel.from_pretrained(
        torch_model(), str(tmp_path / "ours"),
        config=peft_config(tmp_path / "ours")), tmp_path / "ours")
    assert tiny.distance(logits(tree), logits(None)) > 1e-3
    assert tiny.distance(
        logits(tree), tiny.torch_logits(
            model.eval(), TOKENS, **more)) <= 2e-5
    theirs = peft_config(tmp_path / "ours")
    theirs.inference_mode = False
    torch.manual_seed(0)
    model = peft.get_peft_model(torch_model(), theirs).eval()
    with torch.no_grad():
      for value in model.parameters():
        if value.requires_grad:
          value += 0.1 * torch.randn_like(value)
    save(model, tmp_path / "theirs")
    place = tmp_path / "theirs" / peft_export.CONFIG
    place.write_text(json.dumps(json.loads(place.read_text()) | (keys or {})))
    expected = tiny.torch_logits(model, TOKENS, **more)
  back = read(tmp_path / "theirs")
  assert tiny.distance(logits(None), expected) > 1e-3
  known = adapters_lib.beside(back.adapters, base())
  assert tiny.distance(logits(known), expected) <= 2e-5
  peft_export.write(
      tmp_path / "again", back.adapters, back.peft_config, PATHS)
  first, second = tensors(tmp_path / "theirs"), tensors(tmp_path / "again")
  assert {k: (v.dtype, v.tobytes()) for k, v in first.items()} == {
      k: (v.dtype, v.tobytes()) for k, v in second.items()}
  first_config, second_config = (
      json.loads((tmp_path / name / peft_export.CONFIG).read_text())
      for name in ("theirs", "again"))
  assert first_config == second_config
  return back, first


def prompted(family, peft_config, folder):
  """A tiny model of a family under a config of PEFT's prompt learning.

  Returns:
    Its config, the base, PEFT's model, and the adapters as we read them.
  """
  import peft
  import torch

  config = tiny.CONFIGS[family]
  base = init.random_base(jax.random.key(1), config)
  model = tiny.to_torch(config, base, folder / "base")
  torch.manual_seed(0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(model, peft_config)
  model.save_pretrained(folder / "a")
  loaded = peft_export.read(
      folder / "a", modules.paths(config), modules.shapes(config),
      geometry=modules.geometry(config))
  return config, base, model, loaded.adapters
