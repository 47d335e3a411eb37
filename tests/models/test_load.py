"""Reading checkpoints: values, fingerprints, errors, memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import errors
from lora_jax import quant
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load
from tests.models import tiny

CONFIG = tiny.CONFIGS["qwen3"]
ROOT = pathlib.Path(__file__).parents[2]


def write(folder, config=CONFIG, dtype=np.float32, seed=0, edit=None):
  """A Hugging Face folder of a random model; returns its tensors."""
  base = init.random_base(jax.random.key(seed), config)
  tensors = {
      name: x.astype(dtype) for name, x in hf.state(config, base, "float32")}
  if edit:
    edit(tensors)
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return tensors


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_of_every_source_type(tmp_path, dtype):
  tensors = write(tmp_path, dtype=dtype)
  loaded = load.load(tmp_path)
  assert loaded.config == CONFIG and loaded.source == str(tmp_path)
  read = dict(hf.state(CONFIG, loaded.base, "float32"))
  assert read.keys() == tensors.keys() == hf.names(CONFIG).keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(read[name], value.astype(np.float32))
  q = tensors["model.layers.1.self_attn.q_proj.weight"]
  np.testing.assert_array_equal(
      loaded.base.layers["q_proj"].weight[1], q.astype(np.float32).T)
  assert jax.tree.leaves(load.load(tmp_path, dtype="bfloat16").base)[
      0].dtype == jnp.bfloat16


def test_ends_of_turns_in_the_generation_config(tmp_path):
  write(tmp_path, dataclasses.replace(CONFIG, eos_ids=(4,)))
  assert load.open_source(tmp_path).config.eos_ids == (4,)
  file = tmp_path / "generation_config.json"
  file.write_text('{"eos_token_id": [7, 4, 9]}')
  assert load.open_source(tmp_path).config.eos_ids == (4, 7, 9)
  file.write_text('{"temperature": 0.6}')
  assert load.open_source(tmp_path).config.eos_ids == (4,)
  file.write_text("{")
  _fails(tmp_path, "generation_config.json cannot be read")


def test_shards_are_one_model(tmp_path):
  one, many = tmp_path / "one", tmp_path / "many"
  one.mkdir(), many.mkdir()
  tensors = write(one)
  (many / "config.json").write_text(json.dumps(CONFIG.to_hf()))
  weight_map = {}
  for i, name in enumerate(tensors):
    weight_map[name] = f"model-{i % 3}.safetensors"
  for file in set(weight_map.values()):
    part = {n: tensors[n] for n, f in weight_map.items() if f == file}
    safetensors.numpy.save_file(part, many / file)
  (many / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
  a, b = load.load(one), load.load(many)
  assert a.fingerprint == b.fingerprint
  jax.tree.map(np.testing.assert_array_equal, a.base, b.base)
  (many / "model-1.safetensors").unlink()
  _fails(many, "model-1.safetensors is missing")


def test_quantised_equals_quantise_of_each_layer(tmp_path):
  write(tmp_path)
  spec = quant.QuantSpec(block_size=8)
  plain, small = load.load(tmp_path), load.load(tmp_path, spec)
  assert plain.fingerprint == small.fingerprint
  for target in ("q_proj", "down_proj"):
    for layer in range(CONFIG.n_layers):
      ours = jax.tree.map(
          lambda x: x[layer], small.base.layers[target].weight)  # noqa: B023
      theirs = quant.quantize(
          plain.base.layers[target].weight[layer], spec)
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  for skipped in ("embed_tokens", "norm"):
    assert isinstance(getattr(small.base, skipped), jax.Array)
  assert isinstance(small.base.lm_head.weight, jax.Array)
  more = load.load(tmp_path, spec, skip=("embed_tokens", "q_proj")).base
  assert isinstance(more.lm_head.weight, quant.QuantizedArray)
  assert isinstance(more.layers["q_proj"].weight, jax.Array)


def test_fingerprint_by_hand(tmp_path):
  tensors = write(tmp_path)
  lines = sorted(
      f"{name} F32 {list(x.shape)} "
      f"{hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()}"
      for name, x in tensors.items())
  expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()
  assert load.load(tmp_path).fingerprint == expected

  def nudge(tensors):
    tensors["model.norm.weight"][0] += 1e-6

  write(tmp_path, edit=nudge)
  assert load.load(tmp_path).fingerprint != expected


def test_tied_head_and_stale_buffers_are_ignored(tmp_path):
  config = tiny.CONFIGS["qwen2"]

  def edit(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(
        4, np.float32)

  write(tmp_path, config, edit=edit)
  assert load.load(tmp_path).base.lm_head is None


def _fails(path, *parts, **kwargs):
  with pytest.raises(errors.UserError) as caught:
    load.load(path, **kwargs)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


def test_bad_folders(tmp_path):
  _fails(tmp_path, str(tmp_path / "config.json"), "missing")
  _fails(tmp_path / "nothing", "nothing", "does not exist")
  write(tmp_path)
  file = tmp_path / "model.safetensors"
  whole = file.read_bytes()
  file.write_bytes(whole[:-10])
  _fails(tmp_path, str(file), "cut short", "download")
  file.write_bytes(whole[:5])
  _fails(tmp_path, str(file), "cut short")
  file.unlink()
  _fails(tmp_path, "neither model.safetensors")
  (tmp_path / "config.json").write_text('{"model_type": ')
  _fails(tmp_path, "config.json", "JSON")
  _fails(tmp_path / "config.json", ".json file", ".gguf")


def test_bad_tensors(tmp_path):
  name = "model.layers.1.mlp.up_proj.weight"
  write(tmp_path, edit=lambda t: t.pop(name))
  _fails(tmp_path, name, "missing")
  write(tmp_path, edit=lambda t: t.update({name: t[name][1:]}))
  _fails(tmp_path, name, "[39, 24]", "[40, 24]")
  write(tmp_path, edit=lambda t: t.update({name: t[name].astype(np.int8)}))
  _fails(tmp_path, name, "I8", "F32, BF16, F16")
  write(tmp_path, edit=lambda t: t.update(odd=t[name]))
  _fails(tmp_path, "tensor odd")


def test_bad_arguments(tmp_path):
  write(tmp_path)
  _fails(tmp_path, "nf5", "nf4", spec=quant.QuantSpec(format="nf5"))
  _fails(tmp_path, "lm_haed", "lm_head",
         skip=("lm_haed", "embed_tokens"))
  _fails(tmp_path, "embed_tokens", spec=quant.QuantSpec(), skip=())


_MEASURE = """
import sys
from lora_jax import quant, trees
from lora_jax.models import load
def memory(kind):
  for line in open("/proc/self/status"):
    if line.startswith(kind):
      return int(line.split()[1]) * 1024
# The runtime and the compiled conversions are not what is measured.
load.load(sys.argv[1], quant.QuantSpec())
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
  file.write("5")  # Resets the peak.
loaded = load.load(sys.argv[2], quant.QuantSpec())
print(memory("VmHWM") - before, trees.nbytes(loaded.base))
"""


def _write_large(folder, config):
  """Like `write`, at numpy's speed; returns the tensors' sizes."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  tensors = {name: rng.standard_normal(shape, np.float32)
             for name, shape in hf.names(config).items()}
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return sorted(x.nbytes for x in tensors.values())


# A process of its own, which converts a base and is measured.
@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_streaming_conversion(tmp_path):
  config = dataclasses.replace(
      tiny.CONFIGS["mistral"], vocab_size=512, d_model=1024, d_ff=18432,
      n_heads=8, n_kv_heads=8, head_dim=64, n_layers=2)
  _write_large(tmp_path / "warm", dataclasses.replace(config, n_layers=1))
  sizes = _write_large(tmp_path / "large", config)
  assert sum(sizes) > 400e6
  out = subprocess.run(
      [sys.executable, "-c", _MEASURE, tmp_path / "warm", tmp_path / "large"],
      cwd=ROOT, capture_output=True, text=True, check=True).stdout
  grown, result = map(int, out.split())
  # malloc keeps freed blocks of up to 32 MiB for itself, and this process'
  # threads their arenas; a third tensor (75 MB) does not fit in here.
  slack = 40 * 2**20
  assert result < grown <= result + sum(sizes[-2:]) + slack
