"""Models of the Hugging Face hub, by `owner/name` or `owner/name@revision`."""

from __future__ import annotations

import pathlib
import re

from lora_jax import errors

_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?")
# Config, weights and tokenizer; not the same weights in .bin or .pth files.
PATTERNS = ("*.json", "model*.safetensors", "*.jinja", "tokenizer*")


def split(name: str) -> tuple[str, str | None] | None:
  """`"org/m@v1.0" -> ("org/m", "v1.0")`; None if it is no hub name."""
  found = _NAME.fullmatch(name)
  return (found[1], found[2]) if found else None


def fetch(name: str) -> pathlib.Path:
  """The folder of a model, downloaded unless the hub's cache has it.

  With `HF_HUB_OFFLINE=1` nothing is asked of the network, and the cache must
  have it (`$HF_HUB_CACHE/models--owner--name/snapshots/...`).

  Args:
    name: `owner/name`, or `owner/name@revision` with a branch, tag or commit.

  Raises:
    errors.UserError: if it is no such name, or the hub does not give it.
  """
  parts = split(name)
  if parts is None:
    raise errors.UserError(
        f"model.path={name} does not exist; give a model folder, a .gguf "
        "file or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct")
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  repo, revision = parts
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        repo, revision=revision, allow_patterns=list(PATTERNS)))
  except hub_errors.GatedRepoError:
    reason = (f"is gated; accept its terms on https://huggingface.co/{repo} "
              "and log in with `hf auth login`")
  except hub_errors.RepositoryNotFoundError:
    reason = ("is no local folder and not on the hub, or private; check the "
              "name, or log in with `hf auth login`")
  except hub_errors.RevisionNotFoundError:
    reason = (f"has no revision {revision}; see "
              f"https://huggingface.co/{repo}/commits")
  # Beyond these it raises its own, the system's and its HTTP library's.
  except Exception as error:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    reason = (f"is no local folder, and the hub gave none ({first}); check "
              "the name and the network (HF_HUB_OFFLINE, if it is set, allows "
              "the cache only), or give a folder")
  raise errors.UserError(f"model.path={name} {reason}")
