"""Loss and adapter gradients against Hugging Face PEFT, on the same weights.

With and without a bitsandbytes NF4 base; A, B and m random, none of it zero.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.export import peft as peft_export
from lora_jax.models import config as config_lib
from lora_jax.models import init
from lora_jax.quant import bnb
from lora_jax.train import step as step_lib
from tests import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

CONFIG = config_lib.ModelConfig(
    family="qwen2", vocab_size=61, d_model=64, d_ff=128, n_layers=2,
    n_heads=4, n_kv_heads=2, head_dim=16, tie_embeddings=True, qkv_bias=True)


def to_bitsandbytes(model, nested):
  """Replaces the projections by `Linear4bit`; gives their tensors by path."""
  saved = {}
  for path, module in list(model.named_modules()):
    if not isinstance(module, torch.nn.Linear) or path == "lm_head":
      continue
    new = bitsandbytes.nn.Linear4bit(
        module.in_features, module.out_features,
        bias=module.bias is not None, compute_dtype=torch.float32,
        compress_statistics=nested, quant_type="nf4")
    new.weight = bitsandbytes.nn.Params4bit(
        module.weight.data.clone(), requires_grad=False, quant_type="nf4",
        compress_statistics=nested)
    if module.bias is not None:
      new.bias = module.bias
    new = new.to("cpu")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
    saved[path] = {k: v.numpy() for k, v in new.state_dict().items()}
  model.is_loaded_in_4bit = True
  return saved


def from_bitsandbytes(base, saved):
  """The same weights, byte for byte, in ours."""
  layers = dict(base.layers)
  for target in tiny.TARGETS:
    paths = tiny.paths(CONFIG)[target]
    weights = [bnb.from_bnb({
        k: v for k, v in saved[p].items() if k != "bias"}) for p in paths]
    layers[target] = layers[target].replace(
        weight=jax.tree.map(lambda *x: np.stack(x), *weights))
  return base.replace(layers=layers)


# rsLoRA is LoRA with another scale; each format under both of the others.
@pytest.mark.parametrize("method, fmt", [
    ("lora", "none"), ("rslora", "none"), ("dora", "none"),
    ("lora", "nf4 nested"), ("dora", "nf4"),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in (
        ("lora", "nf4"), ("rslora", "nf4"), ("rslora", "nf4 nested"),
        ("dora", "nf4 nested")))])
def test_loss_and_gradients_are_those_of_peft(method, fmt, tmp_path):
  base = init.random_base(jax.random.key(0), CONFIG)
  model = tiny.to_torch(CONFIG, base, tmp_path / "base")
  if fmt != "none":
    base = from_bitsandbytes(
        base, to_bitsandbytes(model, nested=fmt == "nf4 nested"))
    assert isinstance(
        base.layers["q_proj"].weight, quant.QuantizedArray)
  block = adapters_lib.AdapterConfig(
      method=method, rank=4, alpha=8.0, rank_pattern={"o_proj": 2})
  # Larger ones drive the softmax into saturation, where float32 itself is
  # 7e-6 off float64 on either side.
  tree = tiny.random_adapters(CONFIG, base, block, scale=0.1)
  peft_export.write(
      tmp_path / "adapter", tree,
      peft_export.peft_config(block, tree, tiny.paths(CONFIG)),
      tiny.paths(CONFIG))
  adapted = peft.PeftModel.from_pretrained(
      model, tmp_path / "adapter", is_trainable=True)

  rng = np.random.default_rng(0)
  tokens = rng.integers(0, CONFIG.vocab_size, (2, 17))
  labels = torch.from_numpy(tokens)
  loss = adapted(labels, labels=labels).loss
  loss.backward()

  b, t = 2, 16
  data = types.Batch(
      tokens=tokens[:, :-1].astype(np.int32),
      targets=tokens[:, 1:].astype(np.int32),
      loss_weights=np.ones((b, t), np.float32),
      positions=np.arange(t, dtype=np.int32)[None].repeat(b, 0),
      segment_ids=np.ones((b, t), np.int32),
      example_ids=np.arange(b, dtype=np.int32)[:, None].repeat(t, 1))
  trainable, frozen = adapters_lib.split(tree)
  value, grads = jax.jit(
      step_lib.loss_and_grads, static_argnames=("model", "settings"))(
          trainable, frozen, base, jax.tree.map(lambda x: x[None], data),
          jax.random.key(0), model=CONFIG, settings=step_lib.Settings())

  assert abs(value - loss.item()) / loss.item() <= 1e-6
  ours = peft_export.tensors(
      adapters_lib.join(grads, frozen), tiny.paths(CONFIG))
  theirs = {name.replace(".default", ""): p.grad.numpy()
            for name, p in adapted.named_parameters() if p.requires_grad}
  theirs = {k.replace("magnitude_vector.weight", "magnitude_vector"): v
            for k, v in theirs.items()}
  assert ours.keys() == theirs.keys() and len(ours) >= 28
  for name, gradient in theirs.items():
    error = np.linalg.norm(ours[name] - gradient) / np.linalg.norm(gradient)
    assert error <= 1e-5, (name, error)


def test_module_names_are_the_models(tmp_path):
  base = init.random_base(jax.random.key(0), CONFIG)
  model = tiny.to_torch(CONFIG, base, tmp_path)
  names = dict(model.named_modules())
  for target, paths in tiny.paths(CONFIG).items():
    for path in paths if target != "prompt" else ():
      assert path in names, path
