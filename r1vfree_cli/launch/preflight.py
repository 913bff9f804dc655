"""What can be known before a GPU-hour is spent, without torch and without the network.

Findings are errors (the run would fail), warnings, and what could not be checked from here.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec

from ..config.embedded import is_embedded, stages
from ..config.schema import GrpoRecipe, SftRecipe
from ..core.errors import R1VError, UsageError
from ..core.process import gpu_count
from ..run.checkpoint import merge_command, resolve
from .plan import training_devices

_TRACKERS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard"}


@dataclass
class Findings:
    """Lines to show: `errors` stop a run, `warnings` do not, `unchecked` needs the real machine or the network."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def raise_errors(self, what: str) -> None:
        """Raise all errors as one `UsageError`."""
        if self.errors:
            raise UsageError(f"{what} cannot run here", details=self.errors, hint="--dry-run shows the resolved run")


def check(recipe: GrpoRecipe | SftRecipe, *, dry_run: bool = False) -> Findings:
    """Check a valid recipe against this machine. With `dry_run`, missing GPUs are only a warning."""
    found = Findings()
    _devices(recipe, found, dry_run)
    _packages(recipe, found, dry_run)
    _model(recipe.model.name, "model.name", found, not dry_run)
    _data(recipe, found)
    if recipe.model.trust_remote_code:
        found.warnings.append("model.trust_remote_code is on: the checkpoint's own code will run")
    if isinstance(recipe, GrpoRecipe) and recipe.feedback:
        feedback = recipe.feedback
        if feedback.backend == "local":
            _model(str(feedback.model), "rewards.feedback.model", found, not dry_run)
        if feedback.serve:
            _model(feedback.serve.model, "rewards.feedback.serve.model", found, not dry_run)
        if feedback.base_url:
            found.unchecked.append(f"judge at {feedback.base_url}: r1v doctor asks it")
        if feedback.backend == "chat" and not os.environ.get(feedback.api_key_env):
            found.warnings.append(f"{feedback.api_key_env} is not set; the judge is asked without a key")
    return found


def _devices(recipe: GrpoRecipe | SftRecipe, found: Findings, dry_run: bool) -> None:
    launch = recipe.launch
    serve = recipe.served
    if launch.on_cpu:
        return
    local = launch.processes // launch.nodes
    training = training_devices(recipe)
    judge = serve.devices if serve else []
    if launch.devices is not None and len(launch.devices) != local:
        found.errors.append(f"launch.devices names {len(launch.devices)} GPUs for {local} processes on this node")
    if training is not None and set(training) & set(judge):
        both = sorted(set(training) & set(judge))
        found.errors.append(f"GPUs {both} are used by both launch.devices and rewards.feedback.serve.devices")
    have = gpu_count()
    need = max([local + len(judge), *(i + 1 for i in [*(training or []), *judge])])
    if have < need:
        where = f"launch.preset {launch.preset} with {local} processes" + (
            f" and a judge on GPUs {judge}" if judge else ""
        )
        message = f"{where} needs {need} GPUs on this node, found {have}; launch.device: cpu runs any preset on the CPU"
        (found.unchecked if dry_run else found.errors).append(message)


def _packages(recipe: GrpoRecipe | SftRecipe, found: Findings, dry_run: bool) -> None:
    train = recipe.train.model_extra or {}
    needed = {"accelerate": "launching"}
    if recipe.launch.preset.startswith("zero"):
        needed["deepspeed"] = f"launch.preset {recipe.launch.preset}"
    if train.get("use_vllm"):
        needed["vllm"] = "train.use_vllm"
    if train.get("use_liger_kernel"):
        needed["liger_kernel"] = "train.use_liger_kernel"
    if recipe.model.lora and recipe.model.lora.quantize:
        needed["bitsandbytes"] = "model.lora.quantize"
    if recipe.model.attention == "flash_attention_2":
        needed["flash_attn"] = "model.attention flash_attention_2"
    report = train.get("report_to", "none")
    for name in [report] if isinstance(report, str) else report or []:
        if name in _TRACKERS:
            needed[_TRACKERS[name]] = f"train.report_to {name}"
    extras = {"vllm": "[vllm]", "flash_attn": "[flash]", "wandb": "[wandb]", "bitsandbytes": "[qlora]"}
    if recipe.launch.preset == "zero3-offload":
        needed["ninja"] = "compiling DeepSpeed's CPU Adam for launch.preset zero3-offload"
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            message = f"{needed['ninja']} needs a C++ compiler, found no {compiler}; zero3 does without"
            (found.warnings if dry_run else found.errors).append(message)
    for package, why in needed.items():
        if find_spec(package) is None:
            extra = extras.get(package)
            message = f"{why} needs the package {package}: pip install " + (f"-e '.{extra}'" if extra else package)
            (found.warnings if dry_run else found.errors).append(message)


def _model(name: str, key: str, found: Findings, verify: bool) -> None:
    if is_embedded(name):
        try:
            stages([name], 0)
        except R1VError as e:
            found.errors.append(f"{key}: {e.message}")
        return
    try:
        checkpoint = resolve(name, verify=verify)
    except R1VError as e:
        found.errors.append(f"{key}: {e.message}" + (f" ({e.hint})" if e.hint else ""))
        return
    if checkpoint.kind == "hub":
        found.unchecked.append(f"{key}: {name} on the hub")
    elif checkpoint.kind == "adapter":
        merge = merge_command(checkpoint.path)
        found.errors.append(f"{key}: {name} is a LoRA adapter; merge it first: {merge}, and name the merged model")


def _data(recipe: GrpoRecipe | SftRecipe, found: Findings) -> None:
    from ..data.load import columns
    from ..data.sources import BY_HUB

    places = [("data.path", recipe.data.path, recipe.data.split)]
    if recipe.data.heldout:
        places.append(("data.heldout.path", recipe.data.heldout.path, recipe.data.heldout.split))
    needs_solution = isinstance(recipe, SftRecipe) or any(r.name == "accuracy" for r in recipe.rewards)
    for key, path, split in places:
        if path in BY_HUB:
            found.unchecked.append(f"{key}: {path} on the hub")
        try:
            names = columns(path, split)
        except R1VError as e:
            found.errors.append(f"{key}: {e.message}" + (f" ({e.hint})" if e.hint else ""))
            continue
        wanted = ["id", "images", "problem"]
        if needs_solution or key == "data.heldout.path":
            wanted.append("solution")
        missing = [c for c in wanted if c not in names]
        if missing:
            found.errors.append(f"{key}: {path} has no column {', '.join(missing)}; it has {', '.join(names)}")
