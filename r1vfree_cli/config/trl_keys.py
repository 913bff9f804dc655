"""The keys that TRL's configs accept, read from the installed source with `ast`: no torch import."""

import ast
import importlib.util
import re
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ..core.errors import UsageError, brief, nearest

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
    "eval_strategy": "TRL gets no evaluation data: data.heldout is measured before and after, eval: {every_steps: N} while it trains",
    "load_best_model_at_end": "eval: {every_steps: N} keeps the best checkpoint",
}
OWNED_GRPO = OWNED | {
    "per_device_train_batch_size": "use train.prompts_per_device: TRL counts completions there, "
    "r1v sets it to prompts_per_device x num_generations",
    "max_prompt_length": "use data.max_prompt_tokens: longer prompts are dropped and counted, never cut",
}
# What TRL, transformers or torch would refuse only after the launch, or take and train on nonsense with.
_POSITIVE = "temperature repetition_penalty num_train_epochs delta logging_steps save_steps"
_NOT_NEGATIVE = "top_k learning_rate weight_decay max_grad_norm beta epsilon epsilon_high adam_epsilon warmup_steps"
_NOT_NEGATIVE += " dataloader_num_workers"
_COUNT = "max_completion_length num_iterations steps_per_generation gradient_accumulation_steps save_total_limit"
_COUNT += " ref_model_sync_steps max_length per_device_train_batch_size ddp_timeout torch_empty_cache_steps"
RANGES: dict[str, dict[str, int]] = {
    key: bounds
    for keys, bounds in (
        (_POSITIVE, {"gt": 0}),
        (_NOT_NEGATIVE, {"ge": 0}),
        (_COUNT, {"ge": 1}),
        ("min_p top_entropy_quantile ref_model_mixup_alpha warmup_ratio", {"ge": 0, "le": 1}),
        ("top_p vllm_gpu_memory_utilization", {"gt": 0, "le": 1}),
        ("adam_beta1 adam_beta2 label_smoothing_factor", {"ge": 0, "lt": 1}),
        ("seed data_seed", {"ge": 0, "lt": 2**32}),
        ("max_steps", {"ge": -1}),
    )
    for key in keys.split()
}
# Texts of which TRL knows a few; it looks at most of them in the middle of the first step.
_CHOICES = {
    "both": {
        "log_level": Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
        "ddp_backend": Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", None],
    },
    "grpo": {
        "loss_type": Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"],
        "importance_sampling_level": Literal["token", "sequence"],
        "scale_rewards": Literal["group", "batch", "none", True, False],
        "vllm_mode": Literal["server", "colocate"],
    },
    "sft": {"loss_type": Literal["nll", "dft"]},
}
_TELLING = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "literal_error")
# Where the fields stand: package, file, class; later ones override.
_BASES = (("transformers", "training_args.py", "TrainingArguments"), ("trl", "trainer/base_config.py", "_BaseConfig"))
_OWN = {"grpo": ("trl", "trainer/grpo_config.py", "GRPOConfig"), "sft": ("trl", "trainer/sft_config.py", "SFTConfig")}


@cache
def trl_keys(stage: str) -> dict[str, Any]:
    """Name -> type of every field of the TRL config of `stage`, inherited ones included; `Any` where only TRL could
    tell.

    Raises UsageError: TRL or transformers is not installed.
    """
    keys: dict[str, Any] = {}
    for package, file, name in (*_BASES, _OWN[stage]):
        node = _classes(package, file).get(name)
        if node is None:
            raise UsageError(f"{package} has no {name}: this version is not supported", hint="pip install -e .")
        for n in node.body:
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_"):
                keys[n.target.id] = _type(ast.unparse(n.annotation))
    return keys | {name: choices for name, choices in (_CHOICES["both"] | _CHOICES[stage]).items() if name in keys}


@cache
def _classes(package: str, file: str) -> dict[str, ast.ClassDef]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise UsageError(f"{package} is not installed", hint="pip install -e .")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    return {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}


@cache
def _enumerations() -> dict[str, Any]:
    """Name -> `Literal` of the texts that transformers' arguments take, as of optimizers and schedules."""
    found = {}
    for file in ("training_args.py", "trainer_utils.py"):
        for name, node in _classes("transformers", file).items():
            set_to = [n.value for n in node.body if isinstance(n, ast.Assign)]
            values = tuple(value.value for value in set_to if isinstance(value, ast.Constant))
            if values and any(getattr(base, "id", None) == "ExplicitEnum" for base in node.bases):
                found[name] = Literal[values]
    return found


def _type(annotation: str) -> Any:
    known = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
    # `Name | str`, which would be any text
    named = re.fullmatch(r"(?:Union\[)?(\w+)(?: \| |, )str\]?", annotation)
    if named and named[1] in _enumerations():
        return _enumerations()[named[1]]
    scope = {"__builtins__": {}, "Any": typing.Any, "Optional": typing.Optional, "Union": typing.Union}
    try:
        return eval(annotation, scope | known)  # noqa: S307 - the annotation is TRL's own source
    except Exception:
        return typing.Any


def trl_key_errors(stage: str, found: dict) -> list[str]:
    """One line per key of `found` (the `train` part, r1v's own keys left out) that TRL's config would not take."""
    owned = OWNED_GRPO if stage == "grpo" else OWNED
    known, config = trl_keys(stage), f"trl.{_OWN[stage][2]}"
    errors: list[str] = []
    for key, value in found.items():
        if key in owned:
            errors.append(f"train.{key}: is set by r1v: {owned[key]}; found {brief(value)}")
        elif key not in known:
            near = nearest(key, [k for k in known if k not in owned])
            tail = f"; nearest is train.{near}" if near else ""
            errors.append(f"train.{key}: unknown key, neither of r1v nor of {config}, found {brief(value)}{tail}")
        elif value == "reduce_lr_on_plateau":
            errors.append(f"train.{key}: {value} follows an evaluation loss, which r1v does not give TRL")
        elif key == "generation_kwargs" and (twice := sorted((value or {}).keys() & {*RANGES, "max_new_tokens"})):
            keys = ", ".join(twice).replace("max_new_tokens", "max_completion_length")
            errors.append(f"train.{key}: {', '.join(twice)}: write train.{keys}, which is checked and recorded")
        else:
            kind = known[key].__name__ if isinstance(known[key], type) else str(known[key])
            try:
                TypeAdapter(known[key]).validate_python(value, strict=True)
                if key in RANGES and value is not None:
                    TypeAdapter(Annotated[Any, Field(**RANGES[key])]).validate_python(value)
            except ValidationError as e:
                (error, *_) = e.errors()
                wrong = error["msg"].removeprefix("Input should ") if error["type"] in _TELLING else f"be {kind}"
                errors.append(f"train.{key}: must {wrong}; found {brief(value)}")
    return errors
