"""Which modules an adapter is attached to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import re
from typing import Any

from lora_jax import errors

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Places that are no projections, but blocks, whole layers and the input.
SITES = ("self_attn", "mlp", "layer", "prompt")
NORMS = ("input_layernorm", "post_attention_layernorm",
         "pre_feedforward_layernorm", "post_feedforward_layernorm",
         "q_norm", "k_norm", "norm")
PRESETS = {
    "all-linear": ATTENTION + MLP,
    "attention": ATTENTION,
    "mlp": MLP,
    # What some checkpoints, and PEFT's recipes for them, hold as one.
    "qkv_proj": ATTENTION[:3],
    "gate_up_proj": MLP[:2],
}


def open_to(
    paths: Mapping[str, Sequence[str]], row: Any, method: str
) -> dict[str, Sequence[str]]:
  """The part of `paths` that a method can adapt.

  Args:
    paths: of all places, by target.
    row: the method's row of the registry.
    method: its name, for errors.

  Raises:
    errors.UsageError: if the model has none of its places.
  """
  if row.sites:
    found = {name: p for name, p in paths.items() if name in row.sites}
  else:
    found = {name: p for name, p in paths.items()
             if name not in SITES + NORMS
             and (row.embeddings or name != "embed_tokens")
             and not (row.mixes_tokens and name == "lm_head")}
  if not found:
    raise errors.UsageError(
        f"adapter.method={method} adapts {', '.join(row.sites)}, which this "
        "model lacks; choose another method")
  return found


def select(
    paths: Mapping[str, Sequence[str]],
    targets: str | Iterable[str],
    layers: str | Iterable[int] | None = None,
) -> dict[str, list[bool]]:
  """Marks the modules that `targets` names, in the layers asked for.

  `targets` is one of
    - a preset: `all-linear` (every projection but the head, as in PEFT),
      `attention`, `mlp`, `qkv_proj`, `gate_up_proj`;
    - names or dotted suffixes, as a list or separated by commas:
      `q_proj,v_proj`, `self_attn.q_proj`, `embed_tokens`;
    - any other string: a regular expression for the full path, e.g.
      `.*layers\\.(0|1)\\.mlp\\..*`.

  Args:
    paths: module paths by target; one for each layer, or a single one.
    targets: see above.
    layers: indices, or ranges like `"0-7,20"` and `"last 8"`; None means all.

  Returns:
    For each target that matched, one flag for each of its paths.

  Raises:
    errors.UsageError: if a part of `targets` matches nothing, or a layer does
      not exist.
  """
  depth = max(len(p) for p in paths.values())
  wanted = _layers(layers, depth)
  tests = _tests(targets, paths)
  hits = {name: [False] * len(p) for name, p in paths.items()}
  for text, test in tests:
    found = False
    for name, group in paths.items():
      for i, path in enumerate(group):
        if test(path):
          found = True
          hits[name][i] |= len(group) == 1 or i in wanted
    if not found:
      example = max((g[0] for g in paths.values()), key=len)
      raise errors.UsageError(
          f'adapter.targets: "{text}" matches no module'
          f"{errors.nearest(text, [*paths, *PRESETS])}"
          f" (paths look like {example})")
  return {name: flags for name, flags in hits.items() if any(flags)}


def _tests(targets, paths):
  if isinstance(targets, str):
    if targets not in PRESETS and not re.fullmatch(r"[\w.,\s-]*", targets):
      try:
        pattern = re.compile(targets)
      except re.error as error:
        raise errors.UsageError(
            f'adapter.targets: "{targets}" is not a regular expression '
            f"({error})") from None
      return [(targets, lambda path: pattern.fullmatch(path) is not None)]
    targets = [t.strip() for t in targets.split(",") if t.strip()]
  # Of a method that adapts blocks, `mlp` is the block.
  names = [n for t in targets for n in (
      PRESETS[t] if t in PRESETS and PRESETS[t][0] in paths else (t,))]
  if not names:
    raise errors.UsageError(
        "adapter.targets is empty; name modules, or use all-linear")
  return [(n, lambda path, n=n: path == n or path.endswith(f".{n}"))
          for n in names]


def _layers(layers, depth: int) -> set[int]:
  if layers is None or layers == "":
    return set(range(depth))
  if isinstance(layers, str):
    spans: list[int] = []
    for part in layers.split(","):
      last = re.fullmatch(r"\s*last\s+(\d+)\s*", part)
      if last and 1 <= int(last[1]) <= depth:
        spans.extend(range(depth - int(last[1]), depth))
        continue
      match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
      if not match:
        raise errors.UsageError(
            f'adapter.layers="{layers}" is not a list of ranges of the '
            f'{depth} layers; write "0-7,20" or "last 8"')
      first = int(match[1])
      spans.extend(range(first, int(match[2] or first) + 1))
    layers = spans
  wanted = {int(i) for i in layers}
  beyond = sorted(i for i in wanted if not 0 <= i < depth)
  if beyond or not wanted:
    raise errors.UsageError(
        f"adapter.layers names layer {beyond[0] if beyond else 'none'}; the "
        f"model has layers 0 to {depth - 1}")
  return wanted
