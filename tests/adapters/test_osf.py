"""OSF's gradients and options, by hand and against PEFT's."""

from __future__ import annotations

import collections
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import osf
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import against


def test_the_smallest_direction_by_hand():
  w = np.float32([[3, 0], [0, 2]])
  slot = against.slot("osf", Config(effective_rank=1), 2, 2)
  adapter = osf.init(None, w, slot)
  np.testing.assert_allclose(abs(adapter.u[:, 0]), [0, 1])
  np.testing.assert_allclose(adapter.s, [2])
  np.testing.assert_allclose(abs(adapter.v[0]), [0, 1])
  np.testing.assert_allclose(adapter.merge(w), w)
  # Doubled: what the other direction gives stays.
  adapter = adapter.replace(s=2 * adapter.s)
  np.testing.assert_allclose(adapter.merge(w), [[3, 0], [0, 4]])
  np.testing.assert_allclose(adapter.apply(np.float32([[1, 1]]), w), [[3, 4]])


class Config:
  """What `against.slot` asks of a config of PEFT's."""

  def __init__(self, **values):
    self.to_dict = lambda: values


@pytest.mark.parametrize("i, o", [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("rank", [None, 3, 0.25])
def test_products_and_gradients_are_those_of_peft(i, o, rank):
  """PEFT's tensors are moved along both subspaces, its gradients orthogonal to
  what is kept."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  torch.manual_seed(0)
  linear = torch.nn.Linear(i, o, bias=False)
  w = linear.weight.detach().numpy().T.copy()
  config = peft.OSFConfig(effective_rank=rank, target_modules=["q_proj"])
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(torch.nn.Sequential(
        collections.OrderedDict(q_proj=linear)), config)
  trained = {name.split("osf_svd_params.")[1].replace(".default", ""): p
             for name, p in model.named_parameters() if p.requires_grad}
  with torch.no_grad():
    for value in trained.values():
      value += 0.3 * torch.randn_like(value)
  x = torch.randn(5, i)
  y = model(x)
  torch.sin(y).sum().backward()
  row = adapters_lib.METHODS["osf"]
  slot = against.slot("osf", config, i, o)
  adapter = osf.OSF.from_peft(
      {f"osf_svd_params.{name.split('.')[-1]}": p.detach().numpy()
       for name, p in trained.items()}, slot)
  fresh = row.init(None, jnp.asarray(w), slot)
  assert fresh.u.shape == adapter.u.shape and fresh.v.shape == adapter.v.shape
  assert adapter.size() == registry.count(
      row, slot.options, "q_proj", (i, o), 1, against.GEOMETRY)

  def loss(params, frozen):
    found = adapters_lib.join(params, frozen).apply(x.numpy(), w)
    return jnp.sin(found).sum(), found

  # As it is read, and as a run has it.
  for one in (adapter, adapter.beside(w)):
    (_, found), grads = jax.value_and_grad(loss, has_aux=True)(
        one.selected(True), one.selected(False))
    assert tiny.distance(found, y.detach().numpy()) < 2e-6
    for name, value in trained.items():
      ours = getattr(grads, name.split(".")[-1][0].lower())
      assert tiny.distance(ours, value.grad.numpy()) < 2e-5, name
  merged = model.merge_and_unload().q_proj.weight.detach().numpy().T
  assert tiny.distance(adapter.merge(w), merged) < 2e-6


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_ranks_out_of_range_are_refused(rank):
  with pytest.raises(errors.UsageError, match="effective_rank"):
    registry.checked(adapters_lib.AdapterConfig(
        method="osf", options={"effective_rank": rank}))


def test_a_rank_that_leaves_nothing_is_refused():
  with pytest.raises(errors.UsageError, match="keeps 8 of 8 directions"):
    osf.Options(8).trained(12, 8)
  with pytest.raises(errors.UsageError, match="keeps every direction"):
    osf._block({"effective_rank": 1.0})
