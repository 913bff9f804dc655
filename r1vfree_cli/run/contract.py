"""The run contract, `r1v.json` beside every model that r1v writes: what the model was trained with and must be run with."""

import json
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..config.schema import Recipe
from ..core import console, prompts
from ..core.files import read_object, write_json

FILE = "r1v.json"
# TRL's sampling keys; what a recipe leaves out is TRL's default and is filled in by the worker.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length")


def installed(distribution: str) -> str | None:
    """Its version, None where it is not installed."""
    with suppress(PackageNotFoundError):
        return version(distribution)
    return None


def versions() -> dict[str, str]:
    """Installed versions of what shapes a run."""
    names = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets", "vllm", "flash-attn")
    return {"r1v": __version__} | {name: found for name in names if (found := installed(name))}


def build(
    stage: str,
    recipe: Recipe,
    *,
    data_sha256: str | None,
    rewards: list[dict] | None = None,
    sampling: dict[str, Any] | None = None,
    git_commit: str | None = None,
) -> dict:
    """The contract of a run. `rewards` are the rewards' identities, `sampling` the resolved sampling fields."""
    return {
        "schema": 1,
        "stage": stage,
        "prompt": recipe.prompt.model_dump(),
        "template_hash": prompts.template_hash(recipe.policy_prompt),
        "min_pixels": recipe.model.min_pixels,
        "max_pixels": recipe.model.max_pixels,
        "base_model": recipe.model.name,
        "revision": recipe.model.revision,
        "family": recipe.model.family,
        "sampling": sampling or {},
        "rewards": rewards or [],
        "data": {"path": recipe.data.path, "split": recipe.data.split, "sha256": data_sha256},
        "versions": versions(),
        "git_commit": git_commit,
    }


def warn_of_changes(checkpoint: Path, now: dict) -> None:
    """Say in what a run that goes on from `checkpoint` is another one since, beside its recipe's own changes."""
    before = read(checkpoint) or {}
    for key in ("template_hash", "data", "rewards", "versions", "git_commit"):
        old, new = (json.dumps(c.get(key), sort_keys=True, ensure_ascii=False) for c in (before, now))
        if before and old != new:
            console.warn(f"since {checkpoint.name} was written, {key} has changed: {old[:300]} -> {new[:300]}")


def git_commit(folder: Path) -> str | None:
    """The commit of the repository that holds `folder`, `-dirty` when it has changes, None outside one."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        commit = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None


def write(folder: Path, contract: dict) -> None:
    """Put the contract into a model folder."""
    write_json(Path(folder) / FILE, contract)


def read(folder: Path) -> dict | None:
    """The contract of a model folder, None when it has none. Raises DataError: the file holds no JSON object."""
    path = Path(folder) / FILE
    return read_object(path) if path.is_file() else None
