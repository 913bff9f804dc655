"""What a checkpoint argument stands for: its folder, its run contract, and a fingerprint that notices retraining."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..config.embedded import is_embedded, resolve_model
from ..config.recipes import read_yaml
from ..config.schema import Model
from ..core.errors import DataError, UsageError
from ..run import contract

_MARKS = ("config.json", "adapter_config.json")
_DEFAULT = Model.model_fields
MIN_PIXELS: int = _DEFAULT["min_pixels"].default
MAX_PIXELS: int = _DEFAULT["max_pixels"].default


@dataclass(frozen=True)
class Checkpoint:
    """A model to load. `contract` is {} when nothing says how it was trained."""

    name: str
    path: str
    contract: dict = field(default_factory=dict)
    fingerprint: str | None = None


def find(name: str, seed: int = 0) -> Checkpoint:
    """Resolve a model folder, run dir (its `final/`), hub name, LoRA folder or embedded name.

    Raises:
        DataError: a folder that holds no model, a run that has none yet, or no such place.
    """
    path = Path(resolve_model(name, seed)) if is_embedded(name) else Path(name)
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return Checkpoint(name, name)
        raise DataError(f"no checkpoint at {name}", hint="give a model folder, a run dir, or a hub name like org/model")
    if path.is_dir() and not _is_model(path) and any((path / f).is_file() for f in ("recipe.yaml", "status.json")):
        saved = sorted((path / "checkpoints").glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))
        if not _is_model(path / "final"):
            raise DataError(
                f"the run {name} has no final/ model",
                hint=f"it is not finished; its last checkpoint is {saved[-1]}" if saved else "it is not finished",
            )
        path = path / "final"
    if not _is_model(path):
        raise DataError(f"{name} is no model: neither {' nor '.join(_MARKS)} in it")
    return Checkpoint(name, str(path), _contract(path), fingerprint(path))


def is_adapter(path: str) -> bool:
    """Whether the folder holds a LoRA adapter instead of a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def _is_model(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS)


def _contract(path: Path) -> dict:
    """The folder's own contract, else what the recipe of the run says for one of its `checkpoints/`."""
    found = contract.read(path)
    if found is not None:
        return found if isinstance(found, dict) else {}
    recipe = path.resolve().parent.parent / "recipe.yaml"
    if path.resolve().parent.name != "checkpoints" or not recipe.is_file():
        return {}
    try:
        model = read_yaml(recipe.read_text(encoding="utf-8"), str(recipe))["model"]
        return {key: int(model[key]) for key in ("min_pixels", "max_pixels") if key in model}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, UsageError) as e:
        raise DataError(f"cannot read {recipe}: {e}") from None


def fingerprint(path: Path) -> str:
    """Changes when a weight or configuration file does: names, sizes and modification times."""
    files = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json", ".bin", ".jinja"))
    lines = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
