"""One optimisation step: a pure function of state, batch and frozen trees."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from lora_jax import adapters
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import method as method_lib
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import beside
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import sharding
from lora_jax.train import loss
from lora_jax.train import optim
from lora_jax.train import precision as precision_lib

# XLA for GPUs has cuBLAS write a product into its slice of a stack, or add to
# what is there, only where it has not made it a fusion for Triton to compete
# for: of a 7B model's step on an H100 that is 4%. See `models.tape`.
# Nor is it to put products of one x together, for which it copies weights side
# by side, and the products apart again.
COMPILER_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}


@struct.dataclass
class TrainState:
  """What a step changes; the frozen base is not in here.

  Attributes:
    step: int32 scalar, steps done.
    params: trainable part of the adapters, float32 or as stored.
    opt_state: optax state.
    loss_scale: of float16 activations, else None.
  """

  step: types.Array
  params: types.Tree
  opt_state: types.Tree
  loss_scale: precision_lib.LossScale | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
  """Static choices of the program.

  Attributes:
    dtype: compute type of activations, one of `precision.COMPUTE`.
    remat: a key of `models.remat.POLICIES`.
    noise: whether the adapters' dropout, and what else is random, is drawn.
    optim_dtype: how Adam's first moment is stored.
    optimizer: a key of `optim.OPTIMIZERS`.
    mesh: the devices that the trees are spread over, or None for one.
    attention: what computes attention, and the layout of the rows.
    mlp_tiles: into how many tiles of tokens a row is cut for the MLP.
    offload: keys of `host_lib.KINDS`, what is kept in host memory. A base says
      itself where it is; see `host_lib.placed`.
    frozen_matmul: in what the layers' frozen weights are multiplied, a key of
      `quant.fp8.RECIPES`.
    rules: what methods add to training, `adapters.registry.rules`.
    neftune: alpha of the noise on embeddings (`models.embedding`); 0 is off.
  """

  dtype: str = "float32"
  remat: str = "named"
  noise: bool = False
  optim_dtype: str = "float32"
  optimizer: str = "adamw"
  mesh: Mesh | None = None
  attention: attention_lib.Options = attention_lib.Options(layout="packed")
  mlp_tiles: int = 1
  offload: tuple[str, ...] = ()
  frozen_matmul: str = "auto"
  rules: tuple[method_lib.Rule, ...] = ()
  neftune: float = 0.0


def init_state(
    params: types.Tree,
    precision: precision_lib.Precision | None = None,
    dtype: str = "float32",
    optimizer: str = "adamw",
    offload: tuple[str, ...] = (),
    rules: Sequence[method_lib.Rule] = (),
) -> TrainState:
  """State before the first step; `params` is copied (steps donate it).

  Args:
    params: trainable part of the adapters, float32.
    precision: how the state is stored.
    dtype: compute type of activations.
    optimizer: a key of `optim.OPTIMIZERS`.
    offload: as in `Settings`.
    rules: as in `Settings`.
  """
  precision = precision or precision_lib.Precision()
  zero = optim.Hyper(*([jnp.float32(0)] * 6))
  opt_state = optim.transform(
      zero, precision.optim_dtype, optimizer, rules).init(params)
  if "optimiser" in offload:
    opt_state = host_lib.on_host(opt_state)
  return TrainState(
      step=jnp.int32(0),
      params=jax.tree.map(
          lambda p: jnp.array(p, precision.adapter_dtype), params),
      opt_state=opt_state,
      loss_scale=precision_lib.loss_scale(precision, dtype))


def weighted_sum(
    params: types.Tree,
    frozen: types.Tree,
    base: types.Tree,
    batch: types.Batch,
    key: jax.Array,
    *,
    model: config_lib.ModelConfig,
    settings: Settings,
) -> jax.Array:
  """Sum of `loss_weights * nll` over a `[b, t]` batch.

  Of a decoder that reads the input first (`models.beside`) the same sum, with
  the model's head, is added `auxiliary` times.

  Args:
    params: trainable part of the adapters.
    frozen: frozen part of the adapters.
    base: the frozen base.
    batch: `[b, t]`.
    key: PRNG key of this step.
    model: the architecture.
    settings: static choices.

  Returns:
    A float32 scalar.
  """

  def noise(part):
    if not settings.noise:
      return None
    return adapters.Noise(
        key, part.example_ids, part.positions, settings.neftune)

  tree = adapters.join(params, frozen)
  rows = batch.tokens, batch.positions, batch.segment_ids
  options: dict[str, Any] = dict(
      dtype=settings.dtype, remat=settings.remat, mesh=settings.mesh,
      attention=settings.attention, mlp_tiles=settings.mlp_tiles,
      spill="activations" in settings.offload)
  state, _ = beside.begun(
      decoder.forward, model, base, tree, *rows, **options)
  hidden, _ = decoder.forward(
      model, base, tree, *rows, noise=noise(batch), state=state,
      frozen_matmul=settings.frozen_matmul, **options)

  def unembed(trainable, rest, chunk, part):
    head_base, head_frozen, step_key = rest
    del step_key
    joined = adapters.join(trainable, head_frozen)
    return decoder.unembed(
        model, head_base, joined, chunk, noise=noise(part))

  head_base, head_frozen = decoder.head_parts(base, frozen)
  _, head_params = decoder.head_parts(None, params)
  # Once, not for every chunk of the loss. What is trained stays in float32,
  # in which the gradients of the chunks are summed.
  head_base = sharding.gathered(settings.mesh, head_base, settings.dtype)
  head_frozen, head_params = sharding.gathered(
      settings.mesh, (head_frozen, head_params))


  def nll(hidden):
    return loss.weighted_nll(
        unembed, head_params, (head_base, head_frozen, key), hidden, batch,
        model.vocab_size, mesh_lib.ways(settings.mesh))

  reader = adapters.reader(tree)
  if reader is None or not reader.auxiliary:
    return nll(hidden)
  return nll(hidden) + reader.auxiliary * nll(state)


def penalty(
    params: types.Tree, rules: Sequence[method_lib.Rule]) -> jax.Array | None:
  """What the rules add to the loss, `[]` float32; None if they add nothing."""
  terms = [term for term in (rule.penalty(params) for rule in rules)
           if term is not None]
  return sum(terms[1:], terms[0]) if terms else None


def loss_and_grads(
    params, frozen, base, batch, key, *, model, settings, scale=None):
  """Loss normalised by the batch's weight, and its gradient.

  The gradient is that of the loss and of what `settings.rules` add to it.

  Args:
    params, frozen, base, key, model, settings: see `weighted_sum`.
    batch: `[a, b, t]`; micro-batches are accumulated. The weight of all of
      them is the denominator, so that the split into micro-batches and the
      padding in each change nothing.
    scale: `[]`, what the loss is multiplied by while it is differentiated,
      or None.

  Returns:
    (float32 scalar, tree like `params`), unscaled.
  """
  total = jnp.maximum(jnp.sum(batch.loss_weights), 1e-9)
  if scale is not None:
    # In the weights, since the head's gradient is taken in the forward pass,
    # and of the mean: the sum's gradient would leave float16's range.
    batch = batch.replace(loss_weights=batch.loss_weights * (scale / total))
    total = scale
  value_and_grad = jax.value_and_grad(weighted_sum)

  def micro(carry, part):
    value, grads = value_and_grad(
        params, frozen, base, part, key, model=model, settings=settings)
    return jax.tree.map(jnp.add, carry, (value, grads)), None

  start = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
  (value, grads), _ = jax.lax.scan(micro, start, batch)
  value, grads = jax.tree.map(lambda x: x / total, (value, grads))
  if penalty(params, settings.rules) is not None:
    added = jax.grad(penalty)(params, settings.rules)
    grads = jax.tree.map(jnp.add, grads, added)
  return value, grads


def _after(first: types.Tree, state: types.Tree) -> tuple:
  """`first`, and `state` on the device, to which it goes after that."""
  if not any(map(host_lib.in_host, jax.tree.leaves(state))):
    return first, state
  first, state = jax.lax.optimization_barrier((first, state))
  return first, host_lib.on_device(state)


@functools.partial(
    jax.jit, static_argnames=("model", "settings"), donate_argnames="state",
    compiler_options=COMPILER_OPTIONS)
def train_step(
    state: TrainState,
    frozen: types.Tree,
    base: types.Tree,
    batch: types.Batch,
    hyper: optim.Hyper,
    key: jax.Array,
    *,
    model: config_lib.ModelConfig,
    settings: Settings,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step.

  A step whose loss or gradient is not finite changes nothing but the
  counter, so that the state stays fit to be saved and looked at. In float16
  it is skipped and the loss scale halved; it only counts as not finite once
  the scale has fallen below `precision.MIN_SCALE`.

  Args:
    state: donated.
    frozen: frozen part of the adapters.
    base: the frozen base.
    batch: `[a, b, t]`.
    hyper: learning rate and the like, traced.
    key: PRNG key of the run; the step is folded in here.
    model: static.
    settings: static.

  Returns:
    The next state, and scalars `loss`, `grad_norm`, `tokens`, `finite`; in
    float16 also `loss_scale` and `skipped`, the steps skipped so far; where
    rules add to the loss also `penalty`, which is no part of `loss`.
  """
  key = jax.random.fold_in(key, state.step)
  wide, scaling = precision_lib.widen(state.params), state.loss_scale
  value, grads = loss_and_grads(
      wide, frozen, base, batch, key, model=model, settings=settings,
      scale=None if scaling is None else scaling.scale)
  norm = optax.global_norm(grads)
  finite = jnp.isfinite(value) & jnp.isfinite(norm)
  # Not before the gradient is there: until then the activations are.
  grads, held = _after(grads, state.opt_state)
  updates, opt_state = optim.transform(
      hyper, settings.optim_dtype, settings.optimizer, settings.rules).update(
          grads, held, wide, **({"frozen": frozen} if settings.rules else {}))
  params = precision_lib.store(
      key, optax.apply_updates(wide, updates), state.params)
  params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (params, opt_state), (state.params, held))
  params, opt_state = sharding.constrain(
      settings.mesh, (params, opt_state))
  if "optimiser" in settings.offload:
    opt_state = host_lib.on_host(opt_state)
  metrics = {
      "loss": value,
      "grad_norm": norm,
      "tokens": jnp.sum(batch.segment_ids > 0),
      "finite": finite,
  }
  added = penalty(wide, settings.rules)
  if added is not None:
    metrics["penalty"] = added
  if scaling is not None:
    after = precision_lib.adjust(scaling, finite)
    metrics |= {
        "loss_scale": scaling.scale, "skipped": after.skipped,
        "finite": finite | (after.scale >= precision_lib.MIN_SCALE)}
    scaling = after
  return TrainState(state.step + 1, params, opt_state, scaling), metrics
