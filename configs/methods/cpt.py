"""Context-aware prompt tuning: a context's embeddings (arXiv 2410.17222).

  python -m experiments.run --config=configs/methods/cpt.py

The context is one example in SmolLM2's tokens; a task has examples of its own.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common

# Tokens of each part, and its type: 1 and 3 formats, 2 the input, 4 the label.
CONTEXT = (
    ((1, 4093, 198), 1),  # <|im_start|>user\n
    ((5820, 253, 4354, 30), 2),  # Name a fruit.
    ((2, 198, 1, 520, 9531, 198), 3),  # <|im_end|>\n<|im_start|>assistant\n
    ((39080, 30, 2), 4),  # Apple.<|im_end|>
)


def get_config() -> config_dict.ConfigDict:
  """The run."""
  ids = [str(i) for part, _ in CONTEXT for i in part]
  types = [str(kind) for part, kind in CONTEXT for _ in part]
  return common.method(
      "cpt", learning_rate=0.001, options=(
          f"ids={'+'.join(ids)},types={'+'.join(types)},"
          "epsilon=0.2,format_epsilon=0.1,decay=0.95"))
