"""What the backward pass keeps of a layer, by name.

  none   everything
  dots   outputs of the matrix products without batch axes
  named  the values in `NAMES`: every projection's output that the backward
         pass reads, so that only norms, softmax and products of elements
         are computed again
  full   the layer's input only
  auto   named, where nothing else is chosen (`train.memory`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.adapters import base as base_lib

# q, k (after RoPE), v, o: attention output; mid: residual stream after
# attention; gate, up: in the MLP; o_out, down_out: outputs of o_proj
# and down_proj, where a norm reads them; low: x A of joined products; PRODUCT
# and NORMS: the sums that DoRA scales, in place of q, k and v, and c.
NAMES = ("q", "k", "v", "o", "mid", "gate", "up", "o_out", "down_out",
         "low", base_lib.PRODUCT, base_lib.NORMS)
# Weights that are on the device, or whole, only while they are used.
USED = "used"


def _all_but_used(primitive, *unused, **parameters) -> bool:
  if primitive.name == "name":
    return parameters["name"] != USED
  # The last two are how a layer is read out of a stack.
  return primitive.name not in (
      "sharding_constraint", "dynamic_slice", "squeeze")


POLICIES: dict[str, Any] = {
    "none": _all_but_used,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "named": jax.checkpoint_policies.save_only_these_names(*NAMES),
    "full": jax.checkpoint_policies.nothing_saveable,
}
POLICIES["auto"] = POLICIES["named"]
# What `tape` does as well, on one condition: see `stream.scan`.
BY_NAME = ("named", "auto")


def wrap(function: Callable, policy: str, gathers: bool = False) -> Callable:
  """`function` under a policy of `POLICIES`, for use inside `lax.scan`.

  Args:
    function: a layer.
    policy: a key of `POLICIES`.
    gathers: whether it gathers its weights (`sharding.gathered`), or they
      come from host memory (`stream.scan`); they are never kept: together
      they are the whole model, on every device.
  """
  if policy == "none" and not gathers:
    return function
  # Scan keeps XLA from merging the second computation with the first.
  return jax.checkpoint(
      function, policy=POLICIES[policy], prevent_cse=False)
