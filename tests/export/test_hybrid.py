"""Models of several methods: saved, read again, merged; beside PEFT's."""

from __future__ import annotations

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax.export import hybrid
from tests import tiny
from tests.adapters import contract
from tests.experiments import conftest

TOKENS = np.random.default_rng(0).integers(0, 258, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return conftest.write_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def model(source):
  return api.load(str(source), cache=False)


def block(method, **fields):
  tiny_fields = dict(adapters_lib.METHODS[method].tiny)
  return adapters_lib.AdapterConfig(**{
      "method": method, "rank": 2, "alpha": 4.0} | tiny_fields | fields)


def moved(model):
  """With every trained value moved off its start."""
  return dataclasses.replace(
      model, adapters=tiny.mask(contract.moved(model.adapters)))


def logits(model):
  virtual = adapters_lib.virtual_tokens(model.adapters)
  ahead = np.tile(-1 - np.arange(virtual, dtype=np.int32), (2, 1))
  tokens = np.concatenate([ahead, TOKENS], 1)
  t = tokens.shape[1]
  found = tiny.logits(
      model.config, model.base, tokens,
      np.tile(np.arange(t, dtype=np.int32), (2, 1)),
      np.ones((2, t), np.int32), model.adapters)
  return np.asarray(found)[:, virtual:]


def files(folder):
  return {str(p.relative_to(folder)): p.read_bytes()
          for p in folder.rglob("*") if p.is_file()}


def test_every_byte_comes_back(model, tmp_path):
  """Frozen values that are shared, virtual tokens, modules trained whole."""
  ours = moved(model.adapt([
      block("lora", modules_to_save=("norm",), trainable_token_indices=(3, 5),
            rank_pattern={"layers.1.mlp.up_proj": 1}),
      block("vera", targets="q_proj,up_proj"), block("prompt"),
      block("houlsby", layers="1"), block("lora", targets="k_proj")]))
  ours.save(tmp_path / "a")
  names = ["lora", "vera", "prompt", "houlsby", "lora_2"]
  assert files(tmp_path / "a").keys() == {hybrid.FILE} | {
      f"{name}/adapter_{part}" for name in names
      for part in ("config.json", "model.safetensors")}
  assert hybrid.order(tmp_path / "a") == names
  back = model.with_adapter(tmp_path / "a")
  assert list(back.parts) == names
  assert back.parts["vera"].config.method == "vera"
  assert back.adapters.layers["q_proj"].order == ("lora", "vera")
  np.testing.assert_array_equal(logits(back), logits(ours))
  assert np.abs(logits(back) - logits(model)).max() > 1e-2
  back.save(tmp_path / "b")
  assert files(tmp_path / "a") == files(tmp_path / "b")
  # A part alone is a folder like any other.
  one = model.with_adapter(tmp_path / "a" / "houlsby")
  assert not one.parts and one.adapter_config.method == "houlsby"
  changed = model.with_adapter(tmp_path / "a", dropout=0.5)
  assert changed.parts["lora_2"].config.dropout == 0.5
  assert changed.parts["vera"].peft_config["vera_dropout"] == 0.5


def test_merging_all_and_merging_one(model, tmp_path):
  both = moved(model.adapt([block("lora"), block("ia3")]))
  assert both.mergeable == ("lora", "ia3")
  both.save_merged(tmp_path / "all")
  assert not (tmp_path / "all" / "adapter").exists()
  merged = api.load(str(tmp_path / "all"), cache=False)
  assert tiny.distance(logits(merged), logits(both)) < 1e-5
  both.save_merged(tmp_path / "one", parts=("lora",))
  merged = api.load(str(tmp_path / "one"), cache=False)
  assert tiny.distance(logits(merged), logits(both)) > 1e-2
  rest = merged.with_adapter(tmp_path / "one" / "adapter")
  assert list(rest.parts) == ["ia3"]
  assert tiny.distance(logits(rest), logits(both)) < 1e-5
  with pytest.raises(errors.UserError, match=(
      "parts=ia3: ia3 acts on what lora has made of down_proj; merge lora")):
    both.save_merged(tmp_path / "two", parts=("ia3",))
  with pytest.raises(errors.UserError, match='parts="lorra" is unknown'):
    both.save_merged(tmp_path / "two", parts=("lorra",))
  with pytest.raises(errors.UserError, match="parts=lora: there is nothing"):
    model.adapt(block("lora")).save_merged(tmp_path / "two", parts=("lora",))


def test_what_cannot_be_merged_is_left_beside(model, tmp_path):
  """The second can be merged, because the first is not at its places."""
  ours = moved(model.adapt({"block": block("houlsby"), "low": block("lora")}))
  assert ours.mergeable == ("low",)
  with pytest.raises(errors.UserError, match="block stands beside the weights"):
    ours.save_merged(tmp_path / "m")
  ours.save_merged(tmp_path / "m", parts=ours.mergeable)
  merged = api.load(str(tmp_path / "m"), cache=False)
  rest = merged.with_adapter(tmp_path / "m" / "adapter")
  assert tiny.distance(logits(rest), logits(ours)) < 1e-5
  assert tiny.distance(logits(merged), logits(ours)) > 1e-2


def test_a_start_that_replaces_weights(model, tmp_path):
  ours = moved(model.adapt([
      block("lora", init="pissa"), block("vera", targets="q_proj")]))
  assert ours.replaced
  ours.save(tmp_path / "a")
  back = model.with_adapter(tmp_path / "a")
  assert back.replaced == ours.replaced
  np.testing.assert_array_equal(logits(back), logits(ours))
  # For the original base, on which it is of twice the rank.
  back.save(tmp_path / "b", difference=True)
  found = model.with_adapter(tmp_path / "b")
  assert found.replaced is None and found.parts["lora"].config.rank == 4
  assert tiny.distance(logits(found), logits(ours)) < 1e-4
  with pytest.raises(errors.UserError, match="lora has replaced weights"):
    ours.save_merged(tmp_path / "m", parts=("vera",))
  # The other way round there is no base for the first.
  hybrid.write(tmp_path / "a", ["vera", "lora"])
  with pytest.raises(errors.UserError, match="has to be the first"):
    model.with_adapter(tmp_path / "a")


@pytest.mark.parametrize("text, message", [
    ("{", "is damaged"), ('{"order": []}', "is damaged"),
    ('{"order": ["../a"]}', "is damaged"),
    ('{"order": ["lora", "lora"]}', "is damaged"),
    ('{"order": ["lora"]}', "there is no folder"),
])
def test_a_damaged_folder(model, tmp_path, text, message):
  (tmp_path / hybrid.FILE).write_text(text)
  with pytest.raises(errors.UserError, match=message):
    model.with_adapter(tmp_path)


def test_another_folder_is_left_alone(model, tmp_path):
  ours = model.adapt([block("lora"), block("ia3")])
  ours.save(tmp_path / "a")
  ours.save(tmp_path / "a")
  model.adapt(block("lora")).save(tmp_path / "b")
  with pytest.raises(errors.UserError, match=r"no hybrid\.json"):
    ours.save(tmp_path / "b")


# What PEFT's PeftMixedModel takes, as far as it is in the table. It nests
# methods of different kinds. LoRA and DoRA are one kind to it, and all add to
# W0: a DoRA behind a LoRA does not see it there, as it does here. An OFT that
# comes first it does not load.
MIXED = [pair for pair in (
    ("lora", "lora"), ("dora", "lora"), ("lora", "loha"), ("loha", "lora"),
    ("lora", "lokr"), ("lora", "oft"))
         if set(pair) <= set(adapters_lib.METHODS)]


@pytest.mark.parametrize("pair", MIXED, ids="+".join)
def test_peft_computes_the_same(model, source, tmp_path, pair):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  import transformers

  parts = {f"p{n}": block(method, targets="q_proj,down_proj")
           for n, method in enumerate(pair)}
  ours = moved(model.adapt(parts))
  ours.save(tmp_path / "a")
  base = transformers.AutoModelForCausalLM.from_pretrained(
      source, dtype=torch.float32, attn_implementation="eager").eval()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mixed = peft.PeftMixedModel.from_pretrained(
        base, str(tmp_path / "a" / "p0"), adapter_name="p0")
    mixed.load_adapter(str(tmp_path / "a" / "p1"), adapter_name="p1")
    mixed.set_adapter(["p0", "p1"])
    theirs = tiny.torch_logits(mixed.eval(), TOKENS)
  assert tiny.distance(logits(ours), theirs) <= 2e-5
  for name in parts:  # It is both, not one of them.
    one = dataclasses.replace(ours, adapters=adapters_lib.beside(
        adapters_lib.several.joined({
            name: adapters_lib.several.apart(
                ours.adapters, ["p0", "p1"])[name]}), model.base))
    assert tiny.distance(logits(one), theirs) > 1e-3


def test_two_of_peft_are_read(model, source, tmp_path):
  """LoRAs of `add_adapter`, saved by PEFT, each with values of its own."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  import transformers

  base = transformers.AutoModelForCausalLM.from_pretrained(
      source, dtype=torch.float32, attn_implementation="eager").eval()
  torch.manual_seed(0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = peft.get_peft_model(base, peft.LoraConfig(
        r=2, target_modules=["q_proj"]), adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
      for name, value in theirs.named_parameters():
        if "lora_" in name:
          value += 0.1 * torch.randn_like(value)
    theirs.save_pretrained(str(tmp_path / "a"))
    theirs.base_model.set_adapter(["one", "two"])
    expected = tiny.torch_logits(theirs.eval(), TOKENS)
  hybrid.write(tmp_path / "a", ["one", "two"])
  found = model.with_adapter(tmp_path / "a")
  assert tiny.distance(logits(found), expected) <= 2e-5
  found.save(tmp_path / "b")
  for name in "one", "two":
    first, second = (safetensors.numpy.load_file(
        tmp_path / f / name / "adapter_model.safetensors") for f in "ab")
    assert first.keys() == second.keys()
    assert all(x.tobytes() == second[k].tobytes() for k, x in first.items())
    assert len({(tmp_path / f / name / "adapter_config.json").exists()
                for f in "ab"}) == 1
    first, second = (json.loads(
        (tmp_path / f / name / "adapter_config.json").read_text())
                     for f in "ab")
    assert first == second
  assert jax.tree.leaves(found.adapters)
