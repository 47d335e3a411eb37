"""RandLoRA: its sum by hand, PEFT's bases, and folders that hold them."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import randlora
from tests import tiny
from tests.adapters import with_peft


def of(lambda_, gamma, rows, columns, bases):
  return randlora.RandLoRA(
      lambda_=np.float32(lambda_), gamma=np.float32(gamma),
      scale=np.float32(2), rate=0.0, rank=np.int32(1), rows=rows,
      columns=columns).bound(bases)


@pytest.mark.parametrize("i, o", [(3, 4), (4, 3)])
def test_the_sum_by_hand(i, o):
  """r = 2, m = 3, so that N = 2 bases span more than m."""
  rng = np.random.default_rng(0)
  a = rng.standard_normal((2, 5)).astype(np.float32)
  b = rng.standard_normal((6, 3, 2)).astype(np.float32)
  lambda_, gamma = rng.standard_normal((2, 2)), rng.standard_normal((2, 3))
  expected = np.zeros((4, 3))
  for k in range(4):
    row, n = divmod(k, 2)  # Of the trained side, (r, N).
    expected += 2 * np.outer(
        b[:4, k // 2, k % 2], lambda_[row, n] * a[row, :3] * gamma[n])
  expected = expected.T if i < o else expected
  adapter = of(lambda_, gamma, i, o, randlora.Bases(a=a, b=b))
  w = np.zeros((i, o), np.float32)
  assert tiny.distance(adapter.merge(w), expected) < 1e-6
  x = rng.standard_normal((2, i)).astype(np.float32)
  assert tiny.distance(adapter.apply(x, w), x @ expected) < 1e-6


@pytest.mark.parametrize("options", [
    {}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_bases_are_those_peft_draws(options):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
    pytest.skip("this CPU's torch rounds otherwise")
  layers = torch.nn.Sequential(torch.nn.Linear(40, 70), torch.nn.Linear(70, 9))
  config = peft.RandLoraConfig(
      r=6, target_modules=["0", "1"], projection_prng_key=3, **options)
  model = peft.get_peft_model(layers, config).base_model
  shared = randlora.share(
      None, method_lib.Modules({"0": (40, 70), "1": (70, 9)}, 6,
                               randlora.Options(projection_key=3, **options)))
  a, b = (x["default"].numpy() for x in (model.randlora_A, model.randlora_B))
  assert shared.b.shape == (70, 12, 6)
  # Exactly the same numbers in bfloat16; sparse ones are divided in float32.
  np.testing.assert_allclose(
      shared.a[:, None], a, rtol=2e-7 if options else 0)
  np.testing.assert_allclose(shared.b, b, rtol=2e-7 if options else 0)


def test_folders_that_hold_the_bases(tmp_path):
  """As PEFT writes them, with a copy for each module."""
  config = adapters_lib.AdapterConfig(
      method="randlora", rank=4, alpha=8.0, targets=("q_proj", "down_proj"),
      options=randlora.Options(save_projection=True))
  loaded, tensors = with_peft.check(config, tmp_path)
  assert loaded.config.options.save_projection
  assert sum("randlora_B" in name for name in tensors) == 7
