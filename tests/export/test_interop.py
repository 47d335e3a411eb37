"""Every method against Hugging Face PEFT: load, save, merge, save again.

The cases come from the registry. Of each method that PEFT has, PEFT itself
reads the config that is written here, builds the model, and computes logits
from our tensors; and it fills an adapter of its own with random values that
are read here. `pytest tests/export/test_interop.py -s` prints the matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import json
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
from tests.adapters import with_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

# With biases, which methods that scale outputs scale, too.
CONFIG = dataclasses.replace(contract.CONFIG, o_bias=True, mlp_bias=True)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)
ROWS = adapters_lib.METHODS
CASES = [m for m in contract.ADAPTING if ROWS[m].form is not None]
LACKING = [m for m in contract.ADAPTING if ROWS[m].form is None]
STEPS = ("load", "save", "merge", "stable")
# Mergeable methods that PEFT has no `merge` of.
UNMERGED = ("poly",)
# What PEFT has to be told, or told by.
NOTES = {
    "psoft": "with A and B in the file, which PEFT does not save: "
             "docs/FORMATS.md",
}
MATRIX: dict[str, dict[str, str]] = {}

each = pytest.mark.parametrize("method", CASES)


@pytest.fixture(scope="module", autouse=True)
def matrix():
  yield
  print("\nmethods x {load, save, merge, stable on re-save}, against PEFT "
        + peft.__version__)
  for method in contract.ADAPTING:
    found = MATRIX.get(method, {})
    marks = ["-" if method in LACKING else found.get(s, "not run")
             for s in STEPS]
    print(f"  {method:24}" + "".join(f"{m:14}" for m in marks))
  theirs = {kind.value for kind in peft.PeftType}
  lacking = [m for m in LACKING if m.upper() not in theirs]
  if lacking:
    print("  - PEFT lacks " + ", ".join(lacking))
  # Trained tokens are a field of the adapter block, beside any method.
  ours = {"TRAINABLE_TOKENS"} | {
      ROWS[m].form.peft_type for m in CASES}
  for kind in sorted(theirs - ours):
    print(f"  PEFT's {kind} is refused")
  for method, note in NOTES.items():
    print(f"  {method}: {note}")


@functools.cache
def base():
  return init.random_base(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The base as transformers reads it."""
  where = tmp_path_factory.mktemp("base")
  hf_export.write(where / "m", CONFIG, base(), None)
  return where / "m"


def torch_model(folder, method):
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager").eval()
  model.config.use_cache = False  # X-LoRA asks for it.
  if method == "adaption_prompt":
    # PEFT 0.21.2 adds o_proj's bias twice: o_proj(o) + o_proj(what is added).
    # Halved, it is as often there as it should be; see test_llama_adapter.py.
    with torch.no_grad():
      for layer in model.model.layers:
        layer.self_attn.o_proj.bias /= 2
  return model


def block(method):
  """As the contract's, without the head and the table, which PEFT unties."""
  row, full = ROWS[method], contract.block(method)
  if row.sites:
    return full
  targets = [t for t in full.targets.split(",")
             if t not in ("lm_head", "embed_tokens")]
  return contract.block(method, targets=",".join(targets))


@functools.cache
def ours(method):
  _, tree = adapters_lib.build(
      jax.random.key(1), block(method), base(), modules.paths(CONFIG),
      geometry=modules.geometry(CONFIG))
  return tiny.mask(contract.moved(tree))


def write(folder, method, tree):
  paths = modules.paths(CONFIG)
  config = peft_export.peft_config(block(method), tree, paths, "some/base")
  peft_export.write(folder, tree, config, paths)


def read(folder):
  return peft_export.read(
      folder, modules.paths(CONFIG), modules.shapes(CONFIG),
      geometry=modules.geometry(CONFIG))


def read_as(method):
  """What a folder says of the method that it is of."""
  form = ROWS[method].form
  return (form and form.same_as) or method


def our_logits(tree):
  virtual = adapters_lib.virtual_tokens(tree)
  ahead = np.tile(-1 - np.arange(virtual, dtype=np.int32), (2, 1))
  tokens = np.concatenate([ahead, TOKENS], 1)
  t = tokens.shape[1]
  found = tiny.logits(
      CONFIG, base(), tokens, np.tile(np.arange(t, dtype=np.int32), (2, 1)),
      np.ones((2, t), np.int32), tree)
  return np.asarray(found)[:, virtual:]


def peft_logits(model):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    several = any(hasattr(model.active_peft_config, name)
                  for name in ("num_tasks", "n_tasks"))
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if several else {}
    found = tiny.torch_logits(model.eval(), TOKENS, **tasks)
  # Those of virtual tokens come first.
  return found[:, -TOKENS.shape[1]:]


def begun(method, *steps):
  if method == "adamss":
    pytest.importorskip("sklearn")  # PEFT's needs it.
  for step in steps:
    done(method, step, "FAILED")


def done(method, step, text="ok"):
  MATRIX.setdefault(method, {})[step] = text


@each
def test_peft_reads_ours_and_merges_alike(method, folder, tmp_path):
  begun(method, "save", "merge")
  tree = ours(method)
  write(tmp_path / "a", method, tree)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = with_peft.loaded(peft.PeftModel.from_pretrained(
        torch_model(folder, method), str(tmp_path / "a"),
        config=with_peft.peft_config(tmp_path / "a")), tmp_path / "a")
  here = our_logits(tree)
  assert tiny.distance(here, our_logits(None)) > 1e-3
  assert tiny.distance(here, peft_logits(model)) <= 2e-5
  done(method, "save")
  if not ROWS[method].mergeable:
    done(method, "merge", "not mergeable")
    return
  if method in UNMERGED:
    with pytest.raises(NotImplementedError):
      model.merge_and_unload()
    done(method, "merge", "not by PEFT")
    return
  merged = model.merge_and_unload()
  expected = {name: value.numpy() for name, value in
              merged.state_dict().items()}
  _, tensors = hf_export.merged(CONFIG, base(), tree)
  seen = 0
  for name, value in tensors:
    assert tiny.distance(value, expected[name]) <= 2e-5, name
    seen += 1
  assert seen >= len(expected) - 1
  done(method, "merge")


@each
def test_ours_reads_peft(method, folder, tmp_path):
  """An adapter that PEFT made from our config, with random values."""
  begun(method, "load", "stable")
  write(tmp_path / "a", method, ours(method))
  config = with_peft.peft_config(tmp_path / "a")
  config.inference_mode = False
  torch.manual_seed(0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(torch_model(folder, method), config)
  with torch.no_grad():
    for value in model.parameters():
      if value.requires_grad:
        value += 0.1 * torch.randn_like(value)
  with_peft.save(model, tmp_path / "theirs")
  loaded = read(tmp_path / "theirs")
  assert loaded.config.method == read_as(method)
  there = peft_logits(model)
  known = adapters_lib.beside(loaded.adapters, base())
  assert tiny.distance(our_logits(known), there) <= 2e-5
  assert tiny.distance(our_logits(None), there) > 1e-3
  done(method, "load")
  # Saved again: every tensor's bytes, and the config as a JSON value.
  peft_export.write(tmp_path / "again", loaded.adapters, loaded.peft_config,
                    modules.paths(CONFIG))
  first, second = (safetensors.numpy.load_file(
      tmp_path / f / peft_export.WEIGHTS) for f in ("theirs", "again"))
  assert first.keys() == second.keys()
  for name, value in first.items():
    assert value.dtype == second[name].dtype, name
    assert value.tobytes() == second[name].tobytes(), name
  first, second = (json.loads((tmp_path / f / peft_export.CONFIG).read_text())
                   for f in ("theirs", "again"))
  assert first == second
  done(method, "stable")


@pytest.mark.parametrize("method", contract.ADAPTING)
def test_our_own_files_come_back_byte_for_byte(method, tmp_path):
  tree = ours(method)
  write(tmp_path / "a", method, tree)
  loaded = read(tmp_path / "a")
  assert loaded.config.method == read_as(method)
  peft_export.write(tmp_path / "b", loaded.adapters, loaded.peft_config,
                    modules.paths(CONFIG))
  for name in (peft_export.CONFIG, peft_export.WEIGHTS):
    assert ((tmp_path / "a" / name).read_bytes()
            == (tmp_path / "b" / name).read_bytes())
  back = adapters_lib.beside(loaded.adapters, base())
  np.testing.assert_array_equal(our_logits(back), our_logits(tree))
