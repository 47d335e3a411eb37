"""TensorBoard event files in `<workdir>/tensorboard`.

  pip install lora_jax[tensorboard]
  tensorboard --logdir runs

Written by tensorboardX, which needs neither TensorFlow nor TensorBoard. When
a run goes on it opens a new file that begins with a mark: readers drop the
scalars from there on of the files before. They keep texts; what was written
of those is noted in `<workdir>/sinks/tensorboard.json`.
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

    place = folder / "tensorboard"
    # Names hold the second only: a run killed and restarted within one would
    # write over its file.
    suffix = f".{len(list(place.glob('*')))}"
    self._writer: Any = tensorboardX.SummaryWriter(
        str(place), purge_step=resumed_step + 1, flush_secs=5,
        filename_suffix=suffix)
    self._folder = folder
    self._written = base.recall(folder, "tensorboard")
    self._text("config", base.markdown(config), 0)

  def scalars(self, step, values):
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def text(self, step, samples):
    for i, sample in enumerate(samples):
      self._text(f"samples/{i + 1}", sample, step)

  def finish(self, summary):
    if summary is not None:
      self._text("summary", base.markdown(summary), summary.get("steps", 0))
    self._writer.close()

  def _text(self, tag, text, step):
    if self._written.get(tag, -1) < step:
      self._writer.add_text(tag, text, step)
      self._writer.flush()
      self._written[tag] = step
      base.remember(self._folder, "tensorboard", self._written)
