"""The keys that TRL's configs accept, read from the installed source with `ast`: no torch import."""

from __future__ import annotations

import ast
import importlib.util
import typing
from functools import cache
from pathlib import Path
from typing import Any

from ..core.errors import UsageError, nearest

# Keys that r1v sets itself, and what to write instead.
OWNED = {
    "output_dir": "use --run-dir",
    "deepspeed": "use launch.preset",
    "fsdp": "use launch.preset",
    "use_cpu": "use launch.device: cpu",
    "bf16": "use model.dtype",
    "fp16": "use model.dtype",
    "model_init_kwargs": "use model.dtype, model.attention, model.revision",
    "trust_remote_code": "use model.trust_remote_code",
    "reward_weights": "use rewards[].weight",
    "remove_unused_columns": "r1v builds the prompt from the row",
    "resume_from_checkpoint": "use --resume",
    "eval_strategy": "TRL gets no evaluation data: data.heldout is measured before and after, r1v eval-hallusion later",
}
OWNED_GRPO = OWNED | {
    "per_device_train_batch_size": "use train.prompts_per_device: TRL counts completions there, "
    "r1v sets it to prompts_per_device x num_generations",
    "max_prompt_length": "use data.max_prompt_tokens: longer prompts are dropped and counted, never cut",
}
_FILES = {
    "grpo": [("trl", "trainer/grpo_config.py", "GRPOConfig")],
    "sft": [("trl", "trainer/sft_config.py", "SFTConfig")],
}
_BASES = [("trl", "trainer/base_config.py", "_BaseConfig"), ("transformers", "training_args.py", "TrainingArguments")]


@cache
def trl_keys(stage: str) -> dict[str, Any]:
    """Name -> type of every field of the TRL config of `stage` (`grpo` or `sft`), inherited ones included.

    A type that cannot be read without importing TRL is `typing.Any`.

    Raises:
        UsageError: TRL or transformers is not installed.
    """
    keys: dict[str, Any] = {}
    for package, file, name in reversed(_FILES[stage] + _BASES):
        keys |= _fields(package, file, name)
    return keys


def _fields(package: str, file: str, name: str) -> dict[str, Any]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise UsageError(f"{package} is not installed", hint="pip install -e .")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    body = next((n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if body is None:
        raise UsageError(f"{package} has no {name}: this version is not supported", hint="pip install -e .")
    return {
        n.target.id: _type(ast.unparse(n.annotation))
        for n in body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_")
    }


def _type(annotation: str) -> Any:
    known = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
    scope = {"__builtins__": {}, "Any": typing.Any, "Optional": typing.Optional, "Union": typing.Union}
    try:
        return eval(annotation, scope | known)  # noqa: S307 - the annotation is TRL's own source
    except Exception:
        return typing.Any


def trl_key_errors(stage: str, found: dict) -> list[str]:
    """One line per key of `found` (the `train` part, r1v's own keys left out) that TRL's config would not take."""
    from pydantic import TypeAdapter, ValidationError

    owned = OWNED_GRPO if stage == "grpo" else OWNED
    config = "trl.GRPOConfig" if stage == "grpo" else "trl.SFTConfig"
    known = trl_keys(stage)
    errors: list[str] = []
    for key, value in found.items():
        if key in owned:
            errors.append(f"train.{key}: is set by r1v: {owned[key]}; found {_short(value)}")
        elif key not in known:
            near = nearest(key, [k for k in known if k not in owned])
            tail = f"; nearest is train.{near}" if near else ""
            errors.append(f"train.{key}: unknown key, neither of r1v nor of {config}, found {_short(value)}{tail}")
        else:
            try:
                TypeAdapter(known[key]).validate_python(value, strict=True)
            except ValidationError:
                kind = known[key].__name__ if isinstance(known[key], type) else str(known[key])
                errors.append(f"train.{key}: must be {kind}; found {_short(value)}")
    return errors


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
