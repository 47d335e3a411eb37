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
  # owner/name@revision), a folder of experiments.quantize, or asset:<name>
  # (third_party/README.md).
  config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
  # Jinja text or a file; empty is the tokenizer's own.
  config.model.chat_template = ""
  # Use, and keep, the converted base in the cache folder
  # (experiments.quantize).
  config.model.cache = True
  # Special tokens to add to the vocabulary: "<|im_start|>,<|im_end|>".
  config.model.add_tokens = ""
  config.model.pad_vocab_multiple = 1  # of the vocabulary's size, e.g. 64
  # Pretraining: random weights, drawn of `seed`, instead of the checkpoint's;
  # of its architecture with these fields of ModelConfig
  # (lora_jax/models/config.py) changed, and its tokenizer:
  # "n_layers=6,d_model=256,n_heads=4". Empty: the checkpoint's weights.
  config.model.scratch = ""

  config.quant = c()
  # nf4 fp4 int4 int4_affine int8 llm_int8 none. A checkpoint that comes
  # quantised (bitsandbytes, GPTQ, AWQ) keeps its own codes, whatever is said
  # here, but for none, which dequantises them.
  config.quant.format = "nf4"
  config.quant.block_size = 64
  config.quant.double = True
  config.quant.skip = "lm_head,embed_tokens"

  config.adapter = adapter()
  # Further methods in the same model, each a block like `adapter`:
  #   config.hybrid.houlsby = common.adapter(method="houlsby", rank=8)
  # They adapt what the adapter block leaves, in the order of their names
  # (lora_jax/adapters/several.py).
  config.hybrid = c()

  config.data = c()
  # A file, a folder, a hub name (owner/name or owner/name:subset), or
  # asset:<name>.
  config.data.path = "asset:alpaca_en_demo"
  # auto (by the first row), mixed (by every row), alpaca, messages,
  # prompt_completion, gsm8k, text.
  config.data.format = "auto"
  config.data.split = "train"
  config.data.rows = 0  # use the first so many rows; 0 is all
  config.data.train_rows = 0  # train on so many that are not held out; 0: all
  # Leave out rows whose tokens are those of an earlier row, before rows are
  # held out.
  config.data.unique = False
  config.data.system = ""  # system message for rows without one
  config.data.max_length = 512  # tokens of a row
  config.data.packing = True
  config.data.overlong = "truncate"  # truncate drop error
  # Held-out rows: of eval_path, or taken out of path.
  config.data.eval_path = ""
  config.data.eval_rows = 100
  config.data.eval_seed = -1  # of which rows are taken out of path; -1: seed
  config.data.eval_max_length = 512
  # Rows of something else, whose loss is told before and after training: what
  # was forgotten.
  config.data.watch_path = ""
  config.data.watch_format = "auto"
  config.data.watch_rows = 100

  config.train = c()
  config.train.steps = 100
  config.train.batch_size = 4
  config.train.accumulation = 1
  config.train.log_every = 1
  config.train.eval_every = 0  # 0: at the start and the end
  config.train.checkpoint_every = 0  # 0: at the end
  config.train.patience = 0  # evaluations without a best; 0 is off
  config.train.keep = 2  # newest checkpoints kept, beside the best
  # Noise on the embeddings while training (NEFTune), 5 to 15; 0 is off.
  config.train.neftune_noise_alpha = 0.0
  config.train.samples = 3  # prompts of held-out rows to answer
  config.train.sample_tokens = 64

  config.optim = c()
  # adamw, or adamw8bit: its moments in 2 bytes a parameter instead of 8.
  config.optim.name = "adamw"
  config.optim.learning_rate = 2e-4
  # cosine linear constant wsd inverse_sqrt, or range: a range test, from
  # final x the learning rate up to it (experiments/finder.py).
  config.optim.schedule = "cosine"
  config.optim.warmup = 0.03  # steps, or a share of them below 1
  config.optim.weight_decay = 0.0
  config.optim.clip_norm = 1.0  # 0 is off
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  config.optim.decay = 0.2  # wsd: share of steps that decay
  config.optim.final = 0.0  # last learning rate / peak
  # LoRA+: B's learning rate / A's (16 in the paper); 1 is off.
  config.optim.lora_plus_ratio = 1.0
  # Peak learning rate of LoRA on embed_tokens under LoRA+; 0: as A's.
  config.optim.lora_plus_embedding = 1e-6

  # Devices along each axis; -1 is all that are left.
  config.mesh = c()
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  # Several processes, each started with the same command: "auto" on pods and
  # under Slurm, else "host:port" of process 0, how many, and which this is:
  #   --config.distributed.coordinator=host0:1234 \
  #   --config.distributed.processes=2 --config.distributed.process=0
  # --workdir must be a folder that all of them see.
  config.distributed = c()
  config.distributed.coordinator = ""
  config.distributed.processes = 0
  config.distributed.process = -1
  # Where metrics go beside the work directory: tensorboard, wandb, mlflow,
  # several with commas. None of them can stop or slow a run.
  config.log = c()
  config.log.sinks = ""
  config.log.project = "lora_jax"  # W&B's project, MLflow's experiment
  config.log.name = ""  # of the run; empty is the work directory's
  config.log.wandb_mode = "online"  # online offline
  # Empty is MLFLOW_TRACKING_URI, else mlflow.db beside the work directory.
  config.log.mlflow_uri = ""
  config.log.timeout = 30.0  # seconds the end of a run waits for sinks

  config.compute = c()
  # Number formats; the whole table is in lora_jax/train/precision.py.
  config.compute.dtype = "float32"  # activations: float32 bfloat16 float16
  # Unquantised base parts: norms, embeddings, head; auto is compute.dtype.
  config.compute.base_dtype = "auto"  # auto float32 bfloat16 float16
  # Trained parameters as stored; a step computes on float32.
  config.compute.adapter_dtype = "float32"  # float32 bfloat16
  config.compute.optim_dtype = "float32"  # Adam's mu: float32 bfloat16
  # float16 only: first scale of the loss, finite steps until it doubles.
  config.compute.loss_scale = 32768.0
  config.compute.loss_scale_interval = 2000
  # In what frozen weights are multiplied while training: auto (compute.dtype),
  # fp8 or fp8_tensor (8-bit floats, scaled by token or by tensor; NVIDIA Ada
  # or later, compute.dtype=bfloat16). lora_jax/quant/fp8.py says how.
  config.compute.frozen_matmul = "auto"
  # none dots named full; auto is named, unless the memory block needs others.
  config.compute.remat = "auto"
  # Tiles of tokens in which each MLP is computed; 0: 1, or what memory needs.
  config.compute.mlp_tiles = 0
  # What is kept in host memory, several with commas: base (the frozen layers,
  # copied in one ahead of the computation), activations (what remat keeps),
  # optimiser (its states between steps). Empty: nothing, or what memory needs.
  config.compute.offload = ""
  # Whether a GPU has to give the same bits every time; slower. A CPU does.
  config.compute.deterministic = False
  # auto plain cudnn tokamax splash; auto takes the fastest that can.
  config.compute.attention = "auto"

  # What makes a step fit: compute.remat, compute.mlp_tiles, compute.offload and
  # micro-batches are chosen, fastest first, as far as they are left at auto, 0
  # or empty. Loss and gradients stay the same to rounding.
  config.memory = c()
  # GiB of each device that training may take, e.g. 24.0; 0 is what it has.
  config.memory.budget_gib = 0.0
  config.memory.auto = False  # choose; a budget implies it
  config.memory.micro_batch = 0  # rows of batch_size at a time; 0: chosen, all
  return config


def adapter(**fields) -> config_dict.ConfigDict:
  """An adapter block: the defaults, but for the fields that are given."""
  block = config_dict.ConfigDict()
  block.method = "lora"  # docs/METHODS.md lists them all
  # What only this method is told: "d_initial=0.1,projection_key=3".
  block.options = ""
  block.rank = 16
  block.alpha = 32.0
  block.dropout = 0.0
  # auto (the method's own), all-linear, attention, mlp, names
  # ("q_proj,v_proj"), or a regex.
  block.targets = "auto"
  block.layers = ""  # "0-7,20"; empty is all
  # A deeper model out of the same weights: "0-4,2-5" runs layers 0 1 2 3 2 3 4,
  # each with adapters of its own (LoRA's kind).
  block.layer_replication = ""
  # Ranks and alphas of some modules: "v_proj=32,layers.0.mlp.up_proj=4", a
  # module's name, the end of its path, or a regex without a comma.
  block.rank_pattern = ""
  block.alpha_pattern = ""
  # Where A and B start: default, gaussian, orthogonal, or taken out of the
  # weights, which are replaced by what is left: pissa, pissa_niter_<n> (fast),
  # loftq, olora; or made of the first training rows as well: eva, corda,
  # lora_ga.
  block.init = "default"
  block.loftq_iterations = 1
  # Batches of rows that eva, corda and lora_ga look at, and what only they are
  # told: "rho=2.0" (eva), "corda_method=kpm", "direction=ArBr" (lora_ga).
  block.init_batches = 8
  block.init_options = ""
  # Modules trained whole beside the adapters: "lm_head,norm,input_layernorm".
  block.modules_to_save = ""
  # Tokens whose embeddings are trained: "49152,49153", or new: add_tokens.
  block.trainable_token_indices = ""
  block.init_from = ""  # a PEFT folder to go on from
  block.lock()  # A field that does not exist is an error.
  block.update(fields)
  return block.unlock()


def method(
    name: str, learning_rate: float, **fields) -> config_dict.ConfigDict:
  """A short run of a PEFT method on a laptop, on the quickstart's model and
  data; `configs/methods/` has one for each.

  Args:
    name: of the method.
    learning_rate: its peak.
    **fields: further fields of the adapter block.
  """
  config = get_config()
  config.model.path = "asset:smollm2-135m-instruct"
  config.adapter.update({"method": name} | fields)
  config.data.max_length = 128
  config.data.eval_max_length = 256
  config.train.steps = 40
  config.train.checkpoint_every = 20
  config.train.sample_tokens = 48
  config.optim.learning_rate = learning_rate
  config.optim.warmup = 0.1
  return config


def study(local: bool = False) -> config_dict.ConfigDict:
  """The run of a study: SmolLM2, a few minutes for all cells on a GPU.

  Args:
    local: in its place one of seconds, on a laptop's CPU.
  """
  config = method("lora", 1e-3)
  config.train.samples = 0
  config.train.log_every = 10
  if local:
    config.data.rows = 200
    config.data.eval_rows = 24
    config.train.steps = 12
    config.train.checkpoint_every = 0
    return config
  config.data.max_length = 256
  config.data.eval_rows = 200
  config.train.steps = 150
  config.train.checkpoint_every = 0
  config.train.eval_every = 50
  config.compute.dtype = "bfloat16"
  return config


def study_of_formats(local: bool = False) -> config_dict.ConfigDict:
  """`study`, of a base in full precision: that of configs/pretrain_tiny.py.

  What is held out is what was held out there.

  Args:
    local: in its place SmolLM2, for a test of the study.
  """
  config = study(local)
  if local:
    return config
  config.model.path = "runs/pretrain_tiny/model"
  config.data.path = "asset:boolq"
  config.data.format = "text"
  config.data.unique = True
  config.data.eval_rows = 300
  config.data.eval_seed = 0
  config.compute.dtype = "float32"  # A small model; formats differ by little.
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
