"""Folders of X-LoRA: the classifier, and the experts it names; see `xlora`.

  adapter_config.json        adapters: {"0": path, "1": path, ...}
  adapter_model.safetensors  base_model.internal_xlora_classifier.layers ...
  0/, 1/, ...                LoRAs, each an adapter's folder of its own

Experts that are trained, or were made here, lie in the folder, and their paths
are relative to it. Hugging Face PEFT looks for relative paths where it runs:

  config = peft.PeftConfig.from_pretrained(folder)
  config.adapters = {n: f"{folder}/{p}" for n, p in config.adapters.items()}
  model = peft.PeftModel.from_pretrained(model, folder, config=config)

Those that only were named, and are not trained, stay where they are.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from lora_jax import errors
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import lora
from lora_jax.adapters import method
from lora_jax.adapters import targets
from lora_jax.adapters import xlora_classifier as classifier

# Tensors of the classifier's layers in PEFT's files, and its other options.
LAYERS = "base_model.internal_xlora_classifier.layers"
KEYS = {
    "enable_softmax": "softmax", "enable_softmax_topk": "softmax_top",
    "global_scaling_weight": "weight", "layerwise_scalings": "layerwise",
    "softmax_temperature": "temperature", "use_trainable_adapters": "trainable",
    "xlora_depth": "depth", "xlora_dropout_p": "dropout", "xlora_size": "size"}


def _named(config: Mapping[str, Any]) -> dict[str, str]:
  """Names and paths of the experts, in the classifier's order.

  PEFT counts them, and sorts what it saves as text: 0, 1, 10, 2.
  """
  found = dict(config["adapters"])
  if all(name.isdecimal() for name in found):
    return dict(sorted(found.items(), key=lambda one: int(one[0])))
  return found


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return {key: getattr(options, name) for key, name in KEYS.items()} | {
      "adapters": {str(k): str(k) for k in range(options.experts)},
      "scaling_pass_value": 0.0, "top_k_lora": options.top or None}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  if config.get("scaling_pass_value"):
    raise errors.UsageError(
        f"scaling_pass_value={config['scaling_pass_value']} gives the first "
        "pass experts, which has none here; set it to 0 and train the "
        "classifier with that")
  options = {name: config[key] for key, name in KEYS.items() if key in config}
  # What PEFT leaves out when it is the default there.
  return {"options": {"trainable": False} | options | {
      "experts": len(config["adapters"]),
      "top": config.get("top_k_lora") or 0}}


def _names(depth: int, dropout: bool) -> list[str]:
  """Of the layers in torch's sequence of linear, ReLU and dropout."""
  return [f"{LAYERS}.{(2 + dropout) * n}" for n in range(depth)]


def _tensors(adapters: base.Adapters) -> dict[str, Any]:
  layers = adapters.shared.layers()
  names = _names(len(layers), float(adapters.shared.drop) > 0)
  return {f"{name}.{part}": value
          for name, (w, b) in zip(names, layers, strict=True)
          for part, value in (("weight", w.T), ("bias", b))}


def _adapters(kinds, tensors, config, geometry, parts) -> base.Adapters:
  options, layers = config.options, {}
  for block, tree in parts:
    if block.method not in ("lora", "rslora") or tree.outer:
      raise errors.UserError(
          "adapters: an expert of X-LoRA is a LoRA of projections in layers, "
          f"and one is {block.method} of {', '.join(tree.outer) or 'these'}; "
          "use others")
  for target in targets.ATTENTION + targets.MLP:
    found = [tree.layers.get(target) for _, tree in parts]
    if any(one is not None for one in found):
      layers[target] = _mixed(found, kinds[options.trainable])
  modules = method.Modules(
      {}, 1, options, geometry,
      {target: one.rank.tolist() for target, one in layers.items()})
  numbers = modules.numbers()
  return base.Adapters(
      layers={target: dataclasses.replace(one, number=numbers[target])
              for target, one in layers.items()},
      shared=_classifier(tensors, modules))


def _mixed(found, kind):
  """A target's experts `[l, K, ...]` of its LoRAs `[l, ...]` or None."""
  like = next(one for one in found if one is not None)
  width = max(one.a.shape[-1] for one in found if one is not None)
  none = jax.tree.map(np.zeros_like, like)
  padded = [dataclasses.replace(
      one,
      a=np.pad(one.a, ((0, 0), (0, 0), (0, width - one.a.shape[-1]))),
      b=np.pad(one.b, ((0, 0), (0, width - one.a.shape[-1]), (0, 0))))
            for one in (one or none for one in found)]
  a, b, scales, rates, ranks = (
      np.stack([getattr(one, name) for one in padded], 1)
      for name in ("a", "b", "scale", "rate", "rank"))
  return kind(
      a=a, b=b, scales=scales, rates=rates, ranks=ranks, rank=ranks.max(1),
      number=np.zeros_like(ranks[:, 0]))


def _classifier(tensors, modules) -> classifier.Classifier:
  if not tensors:
    raise errors.UserError(
        f"{LAYERS}.0.weight is missing: save_pretrained of PEFT 0.21.2 leaves "
        "the classifier out; save {k: v for k, v in model.state_dict().items()"
        ' if "internal_xlora_classifier" in k} as adapter_model.safetensors')
  options = modules.options
  names = _names(options.depth, options.dropout > 0)
  layers = [(np.asarray(tensors[f"{name}.weight"], np.float32).T,
             np.asarray(tensors[f"{name}.bias"], np.float32))
            for name in names]
  (w, b), like = layers[-1], classifier.share(jax.random.key(0), modules)
  made = dataclasses.replace(
      like, w_out=w.reshape(-1, *like.b_out.shape),
      b_out=b.reshape(like.b_out.shape))
  if options.depth > 1:
    made = dataclasses.replace(made, w_in=layers[0][0], b_in=layers[0][1])
  if options.depth > 2:
    inner = (np.stack(x) for x in zip(*layers[1:-1], strict=True))
    made = dataclasses.replace(made, **dict(zip(("w_mid", "b_mid"), inner)))
  shapes = [jax.tree.map(np.shape, one) for one in (made, like)]
  if len(tensors) != 2 * len(names) or shapes[0] != shapes[1]:
    raise ValueError(f"the classifier is not of {options}")
  return made


def _split(adapters, config, paths):
  """See `method.Form`. Frozen experts of other folders stay where they are."""
  named, stacks = _named(config), adapters.layers
  if config.get("use_trainable_adapters"):
    named = {name: name for name in named}
  own = {path: _expert(stacks, k, paths)
         for k, path in enumerate(named.values())
         if not pathlib.PurePath(path).is_absolute() and ".." not in path}
  return {**config, "hidden_size": adapters.shared.layers()[0][0].shape[0],
          "adapters": {name: named[name] for name in config["adapters"]}}, own


def _expert(stacks, k, paths):
  """(adapter block, Adapters) of expert k as a LoRA."""
  layers, ranks, alphas, rate = {}, {}, {}, 0.0
  for target, one in stacks.items():
    if not one.ranks[:, k].any():
      continue
    layers[target] = lora.LoRA(
        a=one.a[:, k], b=one.b[:, k], scale=one.scales[:, k],
        rate=one.rates[:, k], rank=one.ranks[:, k])
    rate = max(rate, _text(one.rates[:, k].max()))
    for path, r, s in zip(
        paths[target], one.ranks[:, k], one.scales[:, k], strict=True):
      if r:
        ranks[path], alphas[path] = int(r), _alpha(s, r)
  (r, _), = collections.Counter(ranks.values()).most_common(1)
  (alpha, _), = collections.Counter(alphas.values()).most_common(1)
  block = config_lib.AdapterConfig(
      method="lora", rank=r, alpha=alpha, dropout=rate,
      rank_pattern={p: x for p, x in ranks.items() if x != r},
      alpha_pattern={p: x for p, x in alphas.items() if x != alpha})
  return block, base.Adapters(layers=layers)


def _text(x) -> float:
  """The shortest number that is this one in float32: 0.1, not 0.10000000149."""
  return float(str(np.float32(x)))


def _alpha(scale, r) -> float:
  """Of which alpha / r is this scale, in float32."""
  found = _text(np.float32(scale) * np.float32(r))
  exact = np.float32(found / int(r)) == np.float32(scale)
  return found if exact else float(scale) * int(r)


def form(kinds: Mapping[bool, type]) -> method.Form:
  """X-LoRA's form in PEFT.

  Args:
    kinds: of the experts, by whether they are trained.
  """
  return method.Form(
      peft_type="XLORA", config=_config, block=_block, lists_targets=False,
      tensors=_tensors, adapters=functools.partial(_adapters, kinds),
      parts=lambda config: list(_named(config).values()), split=_split)
