"""Answers prompts with the model of a run, or with any other.

  python -m experiments.generate --workdir=runs/quickstart-1a2b3c4d \\
      --prompt="Name three primary colours."
  python -m experiments.generate --model=MODEL --adapter=FOLDER --quant=nf4 \\
      --prompt=... --prompt=... --temperature=0.7 --top_p=0.9

A prompt is put into the chat template as the user's message, unless --raw. One
prompt is answered as the tokens come; several are answered as one batch.
"""

from __future__ import annotations

from typing import Any

from absl import flags
import jax

from experiments import cli
from experiments import trained
from lora_jax import api
from lora_jax import errors
from lora_jax.data import templates
from lora_jax.evaluate import generate as generate_lib
from lora_jax.evaluate import sampling


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Adds this command's flags."""
  own: dict[str, Any] = {"flag_values": values}
  trained.define_flags(values)
  flags.DEFINE_multi_string(
      "prompt", [], "What to answer; may be repeated.", **own)
  flags.DEFINE_integer(
      "max_new_tokens", 256, "Tokens of an answer at most.", **own)
  flags.DEFINE_float("temperature", 0.0, "0 is greedy.", **own)
  flags.DEFINE_integer(
      "top_k", 0, "Only the k likeliest tokens; 0 is all.", **own)
  flags.DEFINE_float(
      "top_p", 1.0, "Only the likeliest tokens of this share.", **own)
  flags.DEFINE_integer("seed", 0, "Of the sampling.", **own)
  flags.DEFINE_boolean(
      "raw", False, "Continue the prompt as plain text.", **own)
  flags.DEFINE_string("system", None, "A system message.", **own)
  flags.DEFINE_string(
      "dtype", None, "Compute type: float32, bfloat16, float16.", **own)


def encode(
    model: api.Model, prompts: list[str], raw: bool, system: str | None
) -> list[list[int]]:
  """Tokens of each prompt.

  Raises:
    errors.UserError: if there is no chat template, or it refuses a prompt.
  """
  found = []
  for prompt in prompts:
    if raw:
      found.append(templates.encode_text(prompt, model.tokenizer).tolist())
      continue
    turn = [{"role": "user", "content": prompt}]
    found.append(templates.encode_prompt(
        turn, model.tokenizer, add_system=system).tolist())
  return found


def stream(model: api.Model, prompt: list[int], **options) -> None:
  """Prints one answer as its tokens come."""
  streamer = generate_lib.Streamer(model.tokenizer)
  model.generate(
      [prompt], **options, on_token=lambda _, token: print(
          streamer.put(token), end="", flush=True))
  print(streamer.end(), flush=True)


def main(values: flags.FlagValues = flags.FLAGS) -> None:
  if not values.prompt:
    raise errors.UsageError(
        '--prompt is missing; e.g. --prompt="Name three colours."')
  if "" in values.prompt:
    raise errors.UsageError('--prompt="" is empty; write something')
  if values.raw and values.system is not None:
    raise errors.UsageError(
        "--system belongs to the chat template, which --raw leaves out; give "
        "one of them")
  if values.dtype is not None:
    trained.choose("dtype", values.dtype, trained.DTYPES)
  trained.positive(max_new_tokens=values.max_new_tokens)
  # Checked before minutes of loading.
  sampling.sampling(values.temperature, values.top_k, values.top_p)
  model = trained.from_flags(values, values.dtype)
  prompts = encode(model, values.prompt, values.raw, values.system)
  options = dict(
      max_new_tokens=values.max_new_tokens, temperature=values.temperature,
      top_k=values.top_k, top_p=values.top_p, seed=values.seed)
  precision = "highest" if model.dtype == "float32" else None
  with jax.default_matmul_precision(precision):
    if len(prompts) == 1:
      stream(model, prompts[0], **options)
      return
    answers = model.generate(prompts, **options)
  for i, (prompt, answer) in enumerate(zip(values.prompt, answers)):
    text = model.tokenizer.decode(answer, skip_special_tokens=True)
    print(f"{'' if not i else chr(10)}> {prompt}\n{text}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
