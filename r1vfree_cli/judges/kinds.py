"""What kind of judge a checkpoint is, from its files and config, never from its name; without torch.

- `yes_no`: any vision-language model; the score is P(Yes) against P(No) as the first word of its reply, in [0, 1].
- `value_head`: a vision-language model with `value_head.safetensors` beside it (`v_head.summary.weight`, `.bias`;
  the layout of TRL's value head, which Skywork-VL-Reward is published in); a linear score of the last token, unbounded.
- `classification`: a `...ForSequenceClassification` architecture with an image processor; its logit when it has one
  label (unbounded), the probability of its last label when it has more.
"""

import json
from pathlib import Path
from typing import Literal

from ..core.errors import DataError
from ..core.prompts import PromptKind
from ..run.checkpoint import is_adapter, merge_command

Kind = Literal["yes_no", "value_head", "classification"]

VALUE_HEAD = "value_head.safetensors"


def detect_kind(model: str, revision: str | None = None) -> Kind:
    """The kind of the checkpoint in a folder or on the hub. Raises DataError: no such checkpoint."""
    if is_adapter(model):
        raise DataError(f"judge {model} is a LoRA adapter", hint=f"first: {merge_command(model)}")
    path = checkpoint_file(model, "config.json", revision)
    if path is None:
        raise unloadable(model, "there is no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architectures = [str(a) for a in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
        raise unloadable(model, f"config.json: {e}") from None
    if any(a.endswith("ForSequenceClassification") for a in architectures):
        return "classification"
    return "value_head" if checkpoint_file(model, VALUE_HEAD, revision) else "yes_no"


def prompt_of(kind: Kind) -> PromptKind:
    """Reward models with a head were trained on conversations; other models are asked."""
    return "judge" if kind == "yes_no" else "conversation"


def checkpoint_file(model: str, name: str, revision: str | None) -> Path | None:
    """A file of a checkpoint, fetched from the hub when `model` is no folder; None when there is no such file.

    Raises DataError: the hub does not have the repository, or cannot be reached.
    """
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError as e:
        # Offline: a file that the repository may or may not have. Its config is always there.
        if name != "config.json" and checkpoint_file(model, "config.json", revision):
            return None
        raise unloadable(model, str(e)) from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        raise unloadable(model, str(e)) from None


def unloadable(model: str, error: object) -> DataError:
    """The error for a judge that cannot be loaded, with the first line of why."""
    lines = str(error).strip().splitlines()
    hint = "a checkpoint with code of its own can be served from its own environment: backend classify, base_url"
    return DataError(f"cannot load judge {model}: {lines[0][:300] if lines else type(error).__name__}", hint=hint)
