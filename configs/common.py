"""Every field of an experiment, with its default.

A config is a function `get_config(arg)` that starts from here and changes
what it is about. On the command line `--config.adapter.rank=8` overrides a
field; a name that does not exist is an error.
"""

from __future__ import annotations

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The defaults; see the comments for what a field means."""
  c = config_dict.ConfigDict
  config = c()
  config.seed = 0

  config.model = c()
  # A Hugging Face folder, a .gguf file, a hub name (owner/name or
  # owner/name@revision), or asset:<name> (third_party/README.md).
  config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
  # Jinja text or a file; empty is the tokenizer's own.
  config.model.chat_template = ""

  config.quant = c()
  # nf4 fp4 int4 int4_affine int8 llm_int8 none. A checkpoint that comes
  # quantised (bitsandbytes, GPTQ, AWQ) keeps its own codes, whatever is said
  # here, but for none, which dequantises them.
  config.quant.format = "nf4"
  config.quant.block_size = 64
  config.quant.double = True
  config.quant.skip = "lm_head,embed_tokens"

  config.adapter = c()
  config.adapter.method = "lora"  # lora rslora dora full none
  config.adapter.rank = 16
  config.adapter.alpha = 32.0
  config.adapter.dropout = 0.0
  # all-linear, attention, mlp, names ("q_proj,v_proj"), or a regex.
  config.adapter.targets = "all-linear"
  config.adapter.layers = ""  # "0-7,20"; empty is all
  # Ranks and alphas of some modules: "v_proj=32,layers.0.mlp.up_proj=4", a
  # module's name, the end of its path, or a regex without a comma.
  config.adapter.rank_pattern = ""
  config.adapter.alpha_pattern = ""
  config.adapter.init_from = ""  # a PEFT folder to go on from

  config.data = c()
  # A file, a folder, a hub name (owner/name or owner/name:subset), or
  # asset:<name>.
  config.data.path = "asset:alpaca_en_demo"
  # auto (by the first row), mixed (by every row), alpaca, messages,
  # prompt_completion, gsm8k, text.
  config.data.format = "auto"
  config.data.split = "train"
  config.data.rows = 0  # use the first so many rows; 0 is all
  config.data.system = ""  # system message for rows without one
  config.data.max_length = 512  # tokens of a row
  config.data.packing = True
  config.data.overlong = "truncate"  # truncate drop error
  # Held-out rows: of eval_path, or taken out of path.
  config.data.eval_path = ""
  config.data.eval_rows = 100
  config.data.eval_max_length = 512

  config.train = c()
  config.train.steps = 100
  config.train.batch_size = 4
  config.train.accumulation = 1
  config.train.log_every = 1
  config.train.eval_every = 0  # 0: at the start and the end
  config.train.checkpoint_every = 0  # 0: at the end
  config.train.patience = 0  # evaluations without a best; 0 is off
  config.train.keep = 2  # newest checkpoints kept, beside the best
  config.train.samples = 3  # prompts of held-out rows to answer
  config.train.sample_tokens = 64

  config.optim = c()
  config.optim.learning_rate = 2e-4
  config.optim.schedule = "cosine"  # linear constant wsd inverse_sqrt
  config.optim.warmup = 0.03  # steps, or a share of them below 1
  config.optim.weight_decay = 0.0
  config.optim.clip_norm = 1.0  # 0 is off
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  config.optim.decay = 0.2  # wsd: share of steps that decay
  config.optim.final = 0.0  # last learning rate / peak

  # Devices along each axis; -1 is all that are left.
  config.mesh = c()
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.compute = c()
  config.compute.dtype = "float32"  # float32 bfloat16
  config.compute.remat = "named"  # none dots named full
  return config


def parse(arg: str, **choices: tuple[str, ...]) -> dict[str, str]:
  """`"method=dora,quant=int4"` as a dict, checked.

  Args:
    arg: what follows the colon in `--config=file.py:arg`.
    **choices: the values each name may take; empty means any.

  Returns:
    The pairs.

  Raises:
    ValueError: names the part, and the nearest right one.
  """
  import difflib

  found = {}
  for part in filter(None, (arg or "").split(",")):
    name, _, value = part.partition("=")
    allowed = choices.get(name)
    if allowed is None or (allowed and value not in allowed):
      what, known = (name, choices) if allowed is None else (value, allowed)
      close = difflib.get_close_matches(what, known, 1)
      hint = f'; did you mean "{close[0]}"?' if close else (
          f"; known: {', '.join(sorted(known))}")
      raise ValueError(f'"{what}" in ":{arg}" is unknown{hint}')
    found[name] = value
  return found
