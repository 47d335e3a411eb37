"""TinyLoRA: its equation, who shares a vector, and P that only a seed tells."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import partition
from lora_jax.adapters import tinylora
from tests import tiny
from tests.adapters import with_peft

CONFIG = adapters_lib.AdapterConfig(
    method="tinylora", rank=2, targets=("q_proj", "down_proj"),
    options=tinylora.Options(u=5, projection_seed=7, save_projection=False))


def with_options(**fields):
  return dataclasses.replace(
      CONFIG, options=dataclasses.replace(CONFIG.options, **fields))


def of(number, embedding=False):
  """Module `number` of three, the last two of which share a vector."""
  p = np.zeros((3, 2, 2, 2), np.float32)
  p[number] = [[[1, 0], [0, 0]], [[0, 1], [0, 2]]]
  return tinylora.TinyLoRA(
      a=np.float32([[1, 2], [3, 4]]), b=np.float32([[1, 0, 0], [0, 1, 1]]),
      rate=np.float32(0), rank=np.int32(2), number=np.int32(number),
      embedding=embedding).bound(
          tinylora.Vectors(v=np.float32([[5, 6], [7, -1]]), p=p))


@pytest.mark.parametrize("number, v", [(0, (5, 6)), (1, (7, -1)), (2, (7, -1))])
def test_the_equation_by_hand(number, v):
  x, w = np.float32([[1, 1]]), np.ones((2, 3), np.float32)
  # x A = (4, 6); PEFT's R = [[v0, v1], [0, 2 v1]], transposed for rows.
  y = (4 * v[0] + 6 * v[1], 12 * v[1])
  np.testing.assert_array_equal(
      of(number).apply(x, w), [[2 + y[0], 2 + y[1], 2 + y[1]]])
  np.testing.assert_array_equal(
      x @ of(number).merge(w), [[2 + y[0], 2 + y[1], 2 + y[1]]])
  # A table's rows take R as it is.
  row = of(number, True).lookup(np.int32([1]), w)
  y = (3 * v[0], 3 * v[1] + 8 * v[1])
  np.testing.assert_array_equal(row, [[1 + y[0], 1 + y[1], 1 + y[1]]])


def test_a_and_b_are_halves_of_the_truncated_svd():
  one = partition.module(with_peft.build(CONFIG), "down_proj", 1)
  w = np.asarray(with_peft.base().layers["down_proj"].weight[1])
  u, s, v = np.linalg.svd(w)
  expected = (u[:, :2] * s[:2]) @ v[:2]
  assert tiny.distance(one.a @ one.b, expected) < 1e-5
  np.testing.assert_allclose(
      [np.linalg.norm(one.a, axis=0), np.linalg.norm(one.b, axis=1)],
      [np.sqrt(s[:2])] * 2, rtol=1e-5)


@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_modules_share_vectors_as_in_peft(tying):
  """Seven modules, in the model's order: not one target after the other."""
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  model = with_peft.torch_model()
  names = ["q_proj", "down_proj", "1.mlp.up_proj"]
  model = peft.get_peft_model(model, peft.TinyLoraConfig(
      r=2, u=5, weight_tying=tying, target_modules=names, projection_seed=7))
  theirs = {name.removeprefix("base_model.model."): layer
            for name, layer in model.named_modules()
            if isinstance(layer, peft.tuners.tinylora.Linear)}
  options = tinylora.Options(u=5, weight_tying=tying, projection_seed=7)
  modules = method_lib.Modules(
      {"q_proj": (32, 32), "up_proj": (32, 48), "down_proj": (48, 32)}, 2,
      options, ranks={"q_proj": [2, 2, 2], "up_proj": [0, 2, 0],
                      "down_proj": [2, 2, 2]})
  shared = tinylora.share(jax.random.key(0), modules)
  numbers = modules.numbers()
  # v_g = (g + 1, 0, ...) here and there tells whose a module's is.
  shared = dataclasses.replace(shared, v=np.outer(
      np.arange(len(shared.v)) + 1, np.eye(5)[0]).astype(np.float32))
  with torch.no_grad():
    for group, v in model.base_model.tinylora_v["default"].items():
      v[0] = int(group) + 1
  assert len(shared.v) == len(model.base_model.tinylora_v["default"])
  for path, layer in theirs.items():
    _, _, at, _, target = path.split(".")
    one = tinylora.TinyLoRA(
        a=None, b=None, rate=0.0, rank=np.int32(2),
        number=numbers[target][int(at)]).bound(shared)
    np.testing.assert_allclose(
        one.core, layer._compute_R("default").detach().T, atol=2e-5)


@pytest.mark.parametrize("fields", [
    {}, {"weight_tying": 0.5}, {"save_projection": True},
    {"init_v_bound": 0.5, "save_projection": True}], ids=str)
def test_folders_are_read_and_written(fields, tmp_path):
  config = with_options(**fields)
  loaded, tensors = with_peft.check(config, tmp_path)
  assert loaded.config.options == config.options
  own = 3 if config.options.save_projection else 2
  groups = 3 if config.options.weight_tying else 6
  assert len(tensors) == 6 * own + groups


def test_a_table_comes_first_and_the_head_last(tmp_path):
  """Both ways with PEFT, which draws P by a module's number."""
  peft = pytest.importorskip("peft")
  config = dataclasses.replace(
      CONFIG, targets=("lm_head", "embed_tokens", "q_proj"), layers="1,2")
  tree = with_peft.build(config, move=0.3)
  assert [tree.outer[name].number for name in ("embed_tokens", "lm_head")] == [
      0, 3]
  with_peft.write(tmp_path / "ours", config, tree)
  model = peft.PeftModel.from_pretrained(
      with_peft.torch_model(), str(tmp_path / "ours"))
  theirs = tiny.torch_logits(model.eval(), with_peft.TOKENS)
  assert tiny.distance(with_peft.logits(tree), with_peft.logits(None)) > 1e-3
  assert tiny.distance(with_peft.logits(tree), theirs) <= 2e-5
  model.save_pretrained(tmp_path / "theirs")
  loaded = with_peft.read(tmp_path / "theirs")
  assert tiny.distance(with_peft.logits(loaded.adapters), theirs) <= 2e-5


def test_only_vectors_are_trained():
  tree = with_peft.build(with_options(weight_tying=0.5))
  trainable, _ = adapters_lib.split(tree)
  assert [x.shape for x in jax.tree.leaves(trainable)] == [(3, 5)]
  assert partition.trainable_size(tree) == 15


def test_what_cannot_be_is_refused(tmp_path):
  with pytest.raises(errors.UsageError, match="rank=40 is above the 32"):
    with_peft.build(dataclasses.replace(CONFIG, rank=40))
  for fields in ({"u": 0}, {"weight_tying": 1.5}):
    with pytest.raises(errors.UsageError, match="out of range"):
      with_peft.build(dataclasses.replace(CONFIG, options=fields))
  with_peft.write(tmp_path / "a", CONFIG, with_peft.build(CONFIG))
  (tmp_path / "a" / "adapter_config.json").write_text(
      (tmp_path / "a" / "adapter_config.json").read_text().replace(
          '"weight_tying": 0.0', '"weight_tying": -1.0'))
  with pytest.raises(errors.UserError, match="weight_tying"):
    with_peft.read(tmp_path / "a")
