"""What a study's claims came to.

  better  the arm's loss is lower than `times` another's by more than `by`
  same    the two differ by no more than `within`
  between a `field` of the arm's summaries is from `low` to `high`
  rises   the loss of the arm's watched rows is higher than before training

The loss is that of held-out rows, or, `of` watched rows, how much theirs rose.

"better" holds if the 95% interval of the difference is below -by, and is
refuted if it is above. "same" holds if the 90% interval is within the margin:
two one-sided tests at 5% (Schuirmann 1987); it is refuted if the 95% interval
is outside. "rises" holds if the 95% interval is above 0, and is refuted if it
is below; a claim about a share of what another arm loses is undecided where
that arm loses nothing. "between" holds if it does for all seeds, and is refuted
if it does for none. Anything else is undecided. A claim about an arm some of
whose cells are not done has no verdict yet; that an arm was tuned to an end of
what was tried, so that its best may lie outside, is told with the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from experiments.table import results
from lora_jax import errors
from lora_jax.evaluate import statistics

HELD, REFUTED, UNDECIDED, OPEN = "held", "refuted", "undecided", "not run"


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A claim, what was found, and the numbers."""

  text: str
  verdict: str
  numbers: str


def judge(
    claims: Sequence[Mapping[str, Any]], arms: Sequence[results.Arm]
) -> list[Verdict]:
  """A verdict for every claim.

  Raises:
    errors.UsageError: for a kind of claim that does not exist.
  """
  found = []
  for claim in claims:
    rule = errors.choose("claim kind", claim["kind"], RULES)
    its = [results.arm_of(arms, claim[k]) for k in ("arm", "than")
           if k in claim]
    if None in its:
      found.append(Verdict(claim["text"], OPEN, "its arms are not there"))
    elif missing := [f"{arm.name}: {arm.missing} of its cells not done"
                     for arm in its if arm and arm.missing]:
      found.append(Verdict(claim["text"], OPEN, "; ".join(missing)))
    else:
      verdict, numbers = rule(claim, *its)
      if edge := [arm.name for arm in its if arm and arm.edge]:
        numbers += f"; at the edge of what was tried: {', '.join(edge)}"
      found.append(Verdict(claim["text"], verdict, numbers))
  return found


def _less(claim, arm, than):
  return arm.less(than, claim.get("of", "held_out"), claim.get("times", 1.0))


def _better(claim, arm, than):
  difference = _less(claim, arm, than)
  by = claim.get("by", 0.0)
  low, high = difference.interval()
  verdict = (HELD if high < -by else REFUTED if low > -by else UNDECIDED)
  wanted = f"below {-by:+g}" if by else "below 0"
  if claim.get("times", 1.0) != 1:
    whole = than.loss(claim["of"]).interval()
    if whole[0] <= 0:  # A share of nothing.
      verdict, wanted = UNDECIDED, (
          f"{wanted}, where {than.name}'s own [{whole[0]:+.4f}, "
          f"{whole[1]:+.4f}] is above 0")
  return verdict, _text(
      arm, than, difference, (low, high), "95%", wanted,
      claim.get("times", 1.0))


def _same(claim, arm, than):
  difference = _less(claim, arm, than)
  within = claim.get("within", 0.01)
  low, high = difference.interval(0.9)
  wide = difference.interval()
  if -within <= low and high <= within:
    verdict = HELD
  elif wide[0] > within or wide[1] < -within:
    verdict = REFUTED
  else:
    verdict = UNDECIDED
  return verdict, _text(
      arm, than, difference, (low, high), "90%", f"within {within:g}")


def _text(
    arm: results.Arm, than: results.Arm, difference: statistics.Samples,
    interval: tuple[float, float], level: str, wanted: str,
    times: float = 1.0) -> str:
  low, high = interval
  share = "" if times == 1 else f"{times:g} of "
  return (f"{arm.name} less {share}{than.name}: {difference.value:+.4f}, "
          f"{level} [{low:+.4f}, {high:+.4f}], wanted {wanted}; "
          f"{len(arm.runs)} seed{'s' * (len(arm.runs) > 1)}")


def _rises(claim, arm):
  del claim
  change = arm.loss("watched")
  low, high = change.interval()
  return HELD if low > 0 else REFUTED if high < 0 else UNDECIDED, (
      f"{arm.name}: {change.value:+.4f}, 95% [{low:+.4f}, {high:+.4f}], wanted "
      f"above 0; {len(arm.runs)} seed{'s' * (len(arm.runs) > 1)}")


def _between(claim, arm):
  values = [run.summary[claim["field"]] for run in arm.runs
            if run.summary.get(claim["field"]) is not None]
  inside = [claim["low"] <= v <= claim["high"] for v in values]
  verdict = (HELD if inside and all(inside) else
             UNDECIDED if any(inside) or not inside else REFUTED)
  return verdict, (
      f"{arm.name}: {claim['field']} " + ", ".join(f"{v:.3g}" for v in values)
      + f", wanted {claim['low']:.3g} to {claim['high']:.3g}")


RULES = {"better": _better, "same": _same, "between": _between,
         "rises": _rises}
