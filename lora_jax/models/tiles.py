"""Work on a row of tokens, a tile of them at a time.

What is computed for one token alone (an MLP and the adapters on it) need not
exist for all of them at once: with n tiles its intermediate values take an
n-th of the memory, in the forward pass and in the backward pass, where each
tile is computed again (the idea of ALST's TiledMLP, arXiv 2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import adapters as adapters_lib
from lora_jax import keep as keep_lib
from lora_jax import types


def over_tokens(
    function: Callable,
    x: types.Tree,
    noise: adapters_lib.Noise | None,
    tiles: int,
    keep: keep_lib.Keep = keep_lib.named,
) -> types.Array:
  """`function(keep, x, noise)`, of which no more than one tile exists at a
  time.

  Args:
    function: `(keep, x [b, c, d], noise) -> [b, c, d]`, for each token alone.
    x: `[b, t, d]`, or a tree of such.
    noise: of x's tokens, or None; every tile is given that of its own.
    tiles: into how many the t columns are cut; every tile has all rows, so
      that on a mesh each device has its part of all of them. The last is
      filled up with zeros. 1 is `function` itself.
    keep: for a `function` in one piece; of tiles nothing is kept.

  Returns:
    `[b, t, d]`, to rounding what `function` gives.
  """
  b, t = jax.tree.leaves(x)[0].shape[:2]
  width = -(-t // max(tiles, 1))
  if width >= t:
    return function(keep, x, noise)

  def cut(leaf):
    leaf = jnp.pad(
        leaf, ((0, 0), (0, -t % width)) + ((0, 0),) * (leaf.ndim - 2))
    leaf = leaf.reshape(b, -1, width, *leaf.shape[2:])
    return jnp.moveaxis(leaf, 1, 0)

  def one(tile):
    part, tokens = tile
    if noise is None:
      return function(keep_lib.nothing, part, None)
    ids, positions = tokens
    return function(keep_lib.nothing, part, dataclasses.replace(
        noise, example_ids=ids, positions=positions))

  tokens = None if noise is None else (noise.example_ids, noise.positions)
  # Inside a scan nothing merges the second computation with the first.
  out = jax.lax.map(
      jax.checkpoint(one, prevent_cse=False), jax.tree.map(cut, (x, tokens)))
  return jnp.moveaxis(out, 0, 1).reshape(b, -1, *out.shape[3:])[:, :t]
