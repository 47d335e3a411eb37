"""The starts by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

from lora_jax import errors
from lora_jax.adapters import options as options_lib
from lora_jax.adapters.starts import decomposed
from lora_jax.adapters.starts import drawn
from lora_jax.adapters.starts import informed as informed_lib

NITER = re.compile(r"pissa_niter_(\d+)")
DRAWN: dict[str, Callable] = {
    "default": drawn.kaiming, "gaussian": drawn.gaussian,
    "orthogonal": drawn.orthogonal}
DECOMPOSED: dict[str, Callable] = {
    "pissa": decomposed.pissa, "loftq": decomposed.loftq,
    "olora": decomposed.olora}


@dataclasses.dataclass(frozen=True)
class Start:
  """A start that was chosen.

  Attributes:
    draw: `(key, i, o, width, rank) -> (A, B)`.
    decompose: a row of `DECOMPOSED`, or None.
    options: of `decompose`, as pairs.
    informed: what it makes of rows, or None.
  """

  draw: Callable = drawn.kaiming
  decompose: Callable | None = None
  options: tuple[tuple[str, int], ...] = ()
  informed: informed_lib.Informed | None = None

  @property
  def replaces(self) -> bool:
    """Whether it replaces weights of the base."""
    return self.decompose is not None or (
        self.informed is not None and self.informed.replaces)


def choose(
    name: str, loftq_iterations: int = 1,
    options: Mapping[str, Any] | informed_lib.Informed | None = None,
) -> Start:
  """The start `adapter.init` names.

  Args:
    name: of the start.
    loftq_iterations: of "loftq".
    options: of informed starts.

  Raises:
    errors.UsageError: if there is none of that name (it names the nearest), or
      it has no such options.
  """
  match = NITER.fullmatch(name)
  known: dict[str, Any] = DRAWN | DECOMPOSED | informed_lib.INFORMED | {
      "pissa_niter_<n>": decomposed.pissa}
  if name == "pissa_niter_<n>":
    raise errors.UsageError(
        'adapter.init="pissa_niter_<n>": write a number, as in pissa_niter_4')
  row = decomposed.pissa if match else errors.choose(
      "adapter.init", name, known)
  kind = informed_lib.INFORMED.get(name)
  if kind is not None:
    return Start(informed=options_lib.parse(
        "adapter.init_options", options or {}, kind))
  if options:
    raise errors.UsageError(
        f"adapter.init_options={options}: adapter.init={name} has none; leave "
        "it empty")
  if match:
    return Start(decompose=row, options=(("niter", int(match[1])),))
  if name in DRAWN:
    return Start(draw=row)
  return Start(decompose=row, options=(
      (("iterations", loftq_iterations),) if row is decomposed.loftq else ()))


def derived(init: Any) -> bool:
  """Whether a start of this name replaces weights of the base by what the
  base alone tells."""
  return isinstance(init, str) and (
      init in DECOMPOSED or bool(NITER.fullmatch(init)))


def replaces(init: Any) -> bool:
  """Whether a start of this name replaces weights of the base."""
  return derived(init) or (
      isinstance(init, str) and init in informed_lib.INFORMED
      and informed_lib.INFORMED[init].replaces)
