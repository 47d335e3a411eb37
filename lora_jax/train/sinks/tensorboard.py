"""TensorBoard event files in `<workdir>/tensorboard`.

  pip install lora_jax[tensorboard]
  tensorboard --logdir runs

Written by tensorboardX, which needs neither TensorFlow nor TensorBoard. When
a run goes on it opens a new file that begins with a mark: readers drop the
steps after it from the files before.
"""

from __future__ import annotations

from typing import Any

from lora_jax.train.sinks import base


class TensorBoard:
  """A `base.Sink`."""

  def __init__(self, log: base.LogConfig):
    del log

  def start(self, config, folder, resumed_step):
    import tensorboardX

    self._writer: Any = tensorboardX.SummaryWriter(
        str(folder / "tensorboard"), purge_step=resumed_step + 1,
        flush_secs=5)
    if resumed_step < 0:
      self._writer.add_text("config", base.markdown(config), 0)

  def scalars(self, step, values):
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def text(self, step, samples):
    for i, sample in enumerate(samples):
      self._writer.add_text(f"samples/{i + 1}", sample, step)

  def finish(self, summary):
    if summary is not None:
      # Behind the last step: a finished run that is started again drops it.
      self._writer.add_text(
          "summary", base.markdown(summary), summary.get("steps", 0) + 1)
    self._writer.close()
