"""Where A and B start, and what that leaves of the base.

*Drawn* starts look at shapes alone and have A B = 0. *Decomposed* ones take A
and B out of the weight W `[i, o]` itself, and what they leave replaces it in
the base, quantised as the base is (q, with Q = q(...) dequantised):

  pissa           s A B = SVD_r(W),     base q(W - s A B)     2404.02948
  pissa_niter_<n> the same by a randomised SVD with n power iterations
                  (Halko et al. 2011, 0909.4061, algorithm 4.4), much faster
  loftq           Q_t = q(W - s A_{t-1} B_{t-1}),
                  s A_t B_t = SVD_r(W - Q_t), A_0 B_0 = 0     2310.08659

SVD_r = U S V' gives A = U sqrt(S/s), B = sqrt(S/s) V'. The scale s is divided
out, as Hugging Face PEFT does for PiSSA; for LoftQ it does not, which is right
for s = 1 only. On an unquantised base PiSSA changes no output; on a quantised
one, pissa (QPiSSA) and loftq quantise less of W than q(W) does.

Embeddings are looked up, not multiplied: theirs is always the drawn start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import re
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.adapters import runs

# `(target, layer or None) -> [i, o] float32`: weights before quantisation.
Originals = Callable[[str, int | None], types.Array]
NITER = re.compile(r"pissa_niter_(\d+)")


def kaiming(key, i, o, width, rank):
  """A `[i, width]` ~ U(+-1/sqrt(i)), B = 0; columns from `rank` on zero."""
  bound = i ** -0.5
  a = jax.random.uniform(key, (i, width), jnp.float32, -bound, bound)
  return a * _used(width, rank), jnp.zeros((width, o), jnp.float32)


def gaussian(key, i, o, width, rank):
  """A `[i, width]` ~ N(0, 1/r^2), B = 0: PEFT's "gaussian"."""
  a = jax.random.normal(key, (i, width), jnp.float32)
  a = a / jnp.maximum(rank, 1)
  return a * _used(width, rank), jnp.zeros((width, o), jnp.float32)


def embedding(key, v, d, width, rank):
  """A `[v, width]` = 0, B `[width, d]` ~ N(0, 1)."""
  b = jax.random.normal(key, (width, d), jnp.float32)
  return jnp.zeros((v, width), jnp.float32), b * _used(width, rank)[:, None]


def pissa(w, like, width, rank, scale, niter=None):
  """(what replaces the weight, A, B); see the module's text.

  Args:
    w: `[i, o]` float32, the original.
    like: the base's weight, whose type the replacement takes.
    width: columns of A; those from `rank` on are zero.
    rank: `[]` int32.
    scale: `[]`, s.
    niter: power iterations of the randomised SVD; None is the exact one.
  """
  a, b = _factors(w, width, rank, scale, niter)
  return _like(w - _product(a, b, scale), like), a, b


def loftq(w, like, width, rank, scale, iterations=1):
  """(what replaces the weight, A, B); see `pissa`."""
  a = jnp.zeros((w.shape[0], width), jnp.float32)
  b = jnp.zeros((width, w.shape[1]), jnp.float32)

  def alternate(_, found):
    _, a, b = found
    replacement = _like(w - _product(a, b, scale), like)
    residual = w - quant.dequantize(replacement, jnp.float32)
    return replacement, *_factors(residual, width, rank, scale)

  return jax.lax.fori_loop(0, iterations, alternate, (like, a, b))


DRAWN: dict[str, Callable] = {"default": kaiming, "gaussian": gaussian}
DECOMPOSED: dict[str, Callable] = {"pissa": pissa, "loftq": loftq}


@dataclasses.dataclass(frozen=True)
class Start:
  """A start that was chosen.

  Attributes:
    draw: `(key, i, o, width, rank) -> (A, B)`.
    decompose: a row of `DECOMPOSED`, or None.
    options: of `decompose`, as pairs.
  """

  draw: Callable = kaiming
  decompose: Callable | None = None
  options: tuple[tuple[str, int], ...] = ()


def choose(name: str, loftq_iterations: int = 1) -> Start:
  """The start `adapter.init` names.

  Raises:
    errors.UsageError: if there is none of that name; it names the nearest.
  """
  match = NITER.fullmatch(name)
  if match:
    return Start(decompose=pissa, options=(("niter", int(match[1])),))
  known = DRAWN | DECOMPOSED | {"pissa_niter_<n>": pissa}
  if name == "pissa_niter_<n>":
    raise errors.UsageError(
        'adapter.init="pissa_niter_<n>": write a number, as in pissa_niter_4')
  row = errors.choose("adapter.init", name, known)
  if name in DRAWN:
    return Start(draw=row)
  return Start(decompose=row, options=(
      (("iterations", loftq_iterations),) if row is loftq else ()))


def replaces(init: Any) -> bool:
  """Whether a start of this name replaces weights of the base."""
  return isinstance(init, str) and (
      init in DECOMPOSED or bool(NITER.fullmatch(init)))


def replace(
    start: Start,
    tree: types.Tree,
    placements: Mapping[str, Any],
    originals: Originals | None,
    donate: bool = False,
) -> tuple[types.Tree, dict[str, tuple[jax.Array, jax.Array]]]:
  """Decomposes every adapted weight, one at a time.

  Args:
    start: with `decompose`.
    tree: the base.
    placements: `rank` and `scale` `[l]` by target.
    originals: weights before quantisation; of unquantised targets the base's
      own are taken.
    donate: whether the base's weights are given up and written over, so that
      memory holds the base and two matrices.

  Returns:
    The base with its weights replaced, and the stacked (A, B) by target.

  Raises:
    errors.UsageError: for loftq where nothing is quantised, without
      `originals` where something is, or for weights in host memory.
  """
  found = {}
  for name, placement in placements.items():
    if name == "embed_tokens":
      continue
    stacked = name in tree.layers
    linear = tree.layers[name] if stacked else tree.lm_head
    weight = linear.weight
    _check(start, name, weight, originals)
    if not stacked:
      weight = jax.tree.map(lambda x: x[None], weight)
    elif not donate:
      weight = jax.tree.map(jnp.copy, weight)
    weight, found[name] = _replace_stack(
        start, name, weight, placement, originals, stacked)
    if stacked:
      linear = linear.replace(weight=weight)
      tree = tree.replace(layers=tree.layers | {name: linear})
    else:
      weight = jax.tree.map(lambda x: x[0], weight)
      tree = tree.replace(lm_head=linear.replace(weight=weight))
  return tree, found


def attached(
    adapters: types.Tree,
    factors: Mapping[str, tuple[jax.Array, jax.Array]]) -> types.Tree:
  """Adapters with the A0 and B0 that `replace` found, where it found some."""

  def stacked(name, adapter):
    if name not in factors:
      return adapter
    a, b = factors[name]

    def attach(stack, start, stop):
      width = stack.a.shape[-1]
      return stack.replace(a0=a[start:stop, :, :width],
                           b0=b[start:stop, :width])

    return runs.mapped(attach, adapter)

  def outer(name, adapter):
    if name not in factors:
      return adapter
    a, b = factors[name]
    return adapter.replace(a0=a[0], b0=b[0])

  return adapters.replace(
      layers={k: stacked(k, v) for k, v in adapters.layers.items()},
      outer={k: outer(k, v) for k, v in adapters.outer.items()})


def taken(
    adapters: types.Tree) -> dict[str, tuple[types.Array, types.Array]]:
  """The A0 and B0 in adapters, as `replace` found them; see `attached`."""
  found = {name: (one.a0, one.b0) for name, one in adapters.outer.items()
           if getattr(one, "a0", None) is not None}
  for name, one in adapters.layers.items():
    parts = [(stack.a0, stack.b0, start, stop)
             for stack, start, stop in runs.each(one)
             if getattr(stack, "a0", None) is not None]
    if not parts:
      continue
    if not isinstance(one, runs.Runs):
      found[name] = parts[0][:2]
      continue
    width = max(a.shape[-1] for a, *_ in parts)
    whole_a = np.zeros((one.ends[-1], parts[0][0].shape[1], width), np.float32)
    whole_b = np.zeros((one.ends[-1], width, parts[0][1].shape[2]), np.float32)
    for a, b, start, stop in parts:
      whole_a[start:stop, :, :a.shape[-1]] = mesh_lib.fetch(a)
      whole_b[start:stop, :b.shape[1]] = mesh_lib.fetch(b)
    found[name] = whole_a, whole_b
  return found


def _replace_stack(start, name, weight, placement, originals, stacked):
  depth = len(placement.rank)
  i, o = weight.shape[-2:]
  width = int(max(placement.rank))
  factors = []
  for layer in range(depth):
    if not placement.rank[layer]:
      factors.append((jnp.zeros((i, width), jnp.float32),
                      jnp.zeros((width, o), jnp.float32)))
      continue
    original = None
    if isinstance(weight, quant.QuantizedArray):
      original = originals(name, layer if stacked else None)
    new, *pair = _decompose(
        original, weight, layer, placement.rank[layer],
        placement.scale[layer], start=start, width=width)
    # Waiting keeps the next original from being read while this one is held.
    weight = jax.block_until_ready(_put(weight, new, layer))
    factors.append(tuple(pair))
  a, b = (jnp.stack(x) for x in zip(*factors, strict=True))
  return weight, (a, b)


@functools.partial(jax.jit, static_argnames=("start", "width"))
def _decompose(original, stack, layer, rank, scale, *, start, width):
  like = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stack)
  w = like if original is None else original
  return start.decompose(
      w.astype(jnp.float32), like, width, rank, scale, **dict(start.options))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, one, layer):
  return jax.tree.map(
      lambda whole, x: jax.lax.dynamic_update_index_in_dim(
          whole, x, layer, 0), stack, one)


def _check(start, name, weight, originals):
  quantised = isinstance(weight, quant.QuantizedArray)
  if any(map(host_lib.in_host, jax.tree.leaves(weight))):
    raise errors.UsageError(
        f'adapter.init replaces the weights of "{name}", which '
        "compute.offload=base keeps in host memory; leave base out of it, or "
        "use adapter.init=default")
  if start.decompose is loftq and not quantised:
    raise errors.UsageError(
        f'adapter.init="loftq": "{name}" is not quantised; set quant.format, '
        "or take it out of adapter.targets, or use pissa")
  if quantised and originals is None:
    raise errors.UsageError(
        f'adapter.init: the base holds "{name}" quantised, and its original '
        "weights are not at hand; load the model from its source")


def digest(
    tree: types.Tree, factors: Mapping[str, tuple[types.Array, types.Array]]
) -> str:
  """sha256 hex of the replaced weights and the (A, B) taken out of them."""
  found = hashlib.sha256()
  for name in sorted(factors):
    linear = tree.layers.get(name, tree.lm_head)
    for leaf in jax.tree.leaves((linear.weight, factors[name])):
      # A layer at a time: the host need not hold a whole stack.
      for part in leaf if leaf.ndim > 2 else (leaf,):
        array = np.ascontiguousarray(mesh_lib.fetch(part))
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
  return found.hexdigest()


def _used(width, rank):
  return (jnp.arange(width) < rank).astype(jnp.float32)


def _product(a, b, scale):
  return scale * jnp.matmul(a, b, precision="highest")


def _like(w, like):
  if isinstance(like, quant.QuantizedArray):
    return quant.quantize(w, quant.spec_of(like))
  return w.astype(like.dtype)


def _factors(w, width, rank, scale, niter=None):
  """A `[i, width]` and B `[width, o]` with s A B = SVD_rank(w)."""
  if niter is None:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
  else:
    u, s, vt = _randomised_svd(w, width, niter)
  pad = max(width - s.shape[0], 0)
  u = jnp.pad(u[:, :width], ((0, 0), (0, pad)))
  vt = jnp.pad(vt[:width], ((0, pad), (0, 0)))
  root = jnp.sqrt(jnp.pad(s[:width], (0, pad)) / scale)
  root = jnp.where(_used(width, rank) > 0, root, 0.0)
  return u * root, root[:, None] * vt


def _randomised_svd(w, width, niter):
  """U, S, V' of `w`'s leading `width` directions, as `torch.svd_lowrank`."""
  i, o = w.shape
  # A fixed draw: what replaces the base must not depend on the run's seed, or
  # a folder could not be read again.
  key = jax.random.key(zlib.crc32(b"pissa"))
  matmul = functools.partial(jnp.matmul, precision="highest")
  q = jax.random.normal(key, (o, min(width, i, o)), jnp.float32)
  q, _ = jnp.linalg.qr(matmul(w, q))
  for _ in range(niter):
    q, _ = jnp.linalg.qr(matmul(w.T, q))
    q, _ = jnp.linalg.qr(matmul(w, q))
  u, s, vt = jnp.linalg.svd(matmul(q.T, w), full_matrices=False)
  return matmul(q, u), s, vt
