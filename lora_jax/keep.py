"""What the backward pass reads of the forward pass, as its maker sees it.

A layer, and what it calls, hands every value that may be worth keeping to a
`Keep`, by a name of `models.remat.NAMES` and in the same order every time, and
goes on with what that gives back. By default it is `named`, for the policies
of `jax.checkpoint`; `models.tape` has others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import ad_checkpoint

from lora_jax import types

Keep = Callable[[str, Any], Any]


def named(name: str, tree: types.Tree) -> types.Tree:
  """`tree`, whose arrays `jax.checkpoint` policies know by this name."""
  return jax.tree.map(
      lambda x: ad_checkpoint.checkpoint_name(x, name), tree)


def nothing(name: str, tree: types.Tree) -> types.Tree:
  """`tree`: where nothing is kept by name, as in a part that is computed again
  as a whole."""
  del name
  return tree
