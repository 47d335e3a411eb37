"""How long, and how often, XLA compiled."""

from __future__ import annotations

from typing import Self

from jax import monitoring

_COUNTED = "/jax/core/compile/backend_compile_duration"
_EVENTS = (_COUNTED, "/jax/core/compile/jaxpr_to_mlir_module_duration")


class CompileClock:
  """Sums lowering and compilation while it is entered.

  Tracing is left out: its events nest, and would count twice.

  Attributes:
    seconds: spent so far.
    count: programs compiled so far.
  """

  def __init__(self):
    self.seconds, self.count = 0.0, 0

  def __enter__(self) -> Self:
    monitoring.register_event_duration_secs_listener(self._on_event)
    return self

  def __exit__(self, *unused) -> None:
    monitoring.unregister_event_duration_listener(self._on_event)

  def _on_event(
      self, event: str, duration_secs: float, **unused: str | int) -> None:
    if event in _EVENTS:
      self.seconds += duration_secs
      self.count += event == _COUNTED
