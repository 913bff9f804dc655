"""From a recipe to commands and environments. Starts nothing, writes nothing."""

import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.embedded import resolve_model
from ..config.recipes import recipes_root
from ..config.schema import GrpoRecipe, Recipe
from ..core.process import cpu_count, gpu_names
from . import vllm


@dataclass(frozen=True)
class Plan:
    """One command to run: its argv and what it adds to the environment. Never holds a secret."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    processes: int = 1


def plan(stage: str, recipe: Recipe, run_dir: Path) -> Plan:
    """The `accelerate launch` command of a recipe, for this node."""
    launch = recipe.launch
    several = launch.nodes > 1
    argv = [sys.executable, "-m", "accelerate.commands.launch"]
    argv += ["--config_file", str(recipes_root() / "launch" / f"{launch.preset}.yaml")]
    argv += ["--num_processes", str(launch.processes), "--num_machines", str(launch.nodes)]
    argv += ["--machine_rank", str(launch.node_rank)]
    argv += ["--mixed_precision", {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}[recipe.model.dtype]]
    argv += ["--main_process_ip", str(launch.main_address)] if several else []
    # Port 0: accelerate looks for a free one, so that two runs on a machine do not meet.
    argv += ["--main_process_port", str(launch.main_port or (29500 if several else 0))]
    worker = f"r1vfree_cli.training.{stage}"
    if isinstance(recipe, GrpoRecipe) and recipe.eval and recipe.eval.benchmark != "heldout":
        worker = "r1vfree_cli.eval.worker"
    argv += ["-m", worker, str(run_dir)]
    return Plan(argv, _env(recipe), launch.processes // launch.nodes)


def _env(recipe: Recipe) -> dict[str, str]:
    launch = recipe.launch
    # A scheduler may send SIGTERM to every process: torchrun would then kill the ranks after 30 s, in their checkpoint.
    env = _common() | {"PET_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT"}
    if launch.on_cpu:
        # DeepSpeed is not told by ACCELERATE_USE_CPU, with which accelerate would silently wrap the model in DDP.
        zero = launch.preset.startswith("zero")
        env |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "false" if zero else "true"}
        env |= {"DS_ACCELERATOR": "cpu"} if zero else {}
    elif (devices := training_devices(recipe)) is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu_names(devices)
    if launch.preset == "zero3-offload":
        # DeepSpeed compiles its CPU Adam by calling ninja, which lies beside this Python, activated or not.
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return env | _threads(max(1, cpu_count() * launch.nodes // launch.processes))  # accelerate and torchrun would set 1


def _common() -> dict[str, str]:
    return {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a folder vllm/ or wandb/ in the working directory is no module
        # cuDNN's attention builds a plan for every new shape, and lengths differ from step to step.
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") or "1",
        # TRL tells the hub about every trainer, vLLM its makers about every start: only for those who ask for it.
        "DO_NOT_TRACK": os.environ.get("DO_NOT_TRACK") or "1",
    }


def _threads(n: int) -> dict[str, str]:
    # Waiting threads sleep: spinning ones make a run twenty times slower where another process wants the core.
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(n), "OMP_WAIT_POLICY": "PASSIVE"}


def training_devices(recipe: Recipe) -> list[int] | None:
    """GPU indices of the training processes on this node, among those that r1v sees: as given, else those that no
    judge uses; None: all."""
    launch, serve = recipe.launch, recipe.served
    if launch.devices is not None or serve is None or not serve.devices:
        return launch.devices
    local = launch.processes // launch.nodes
    return [i for i in range(local + len(serve.devices)) if i not in serve.devices][:local]


def server_plan(recipe: Recipe, port: int) -> Plan:
    """The command of the recipe's reward server. Loopback only: with several nodes, each starts one for its ranks.

    Raises UsageError: `serve.engine` is vllm, and vLLM or a model that it can serve is not there.
    """
    serve, on_cpu, model = recipe.served, recipe.launch.on_cpu, recipe.model
    assert serve is not None
    if serve.engine == "vllm":
        judge, pixels = resolve_model(serve.model, recipe.seed), (model.min_pixels, model.max_pixels)
        argv = vllm.serve_command(judge, serve.revision, port, pixels=pixels, devices=serve.devices, on_cpu=on_cpu)
        argv += vllm.judge_arguments(judge, serve.revision)
        return Plan(argv, _common() | vllm.environment(serve.devices, on_cpu))
    options = {"model": serve.model, "host": "127.0.0.1", "port": port, "seed": recipe.seed, "revision": serve.revision}
    options |= {"min_pixels": model.min_pixels, "max_pixels": model.max_pixels}
    env = _common()
    if on_cpu or serve.devices:
        env["CUDA_VISIBLE_DEVICES"] = "" if on_cpu else gpu_names(serve.devices)
    return Plan([sys.executable, "-m", "r1vfree_cli.judges.server", *flags(**options)], env)


def vllm_policy_plan(
    model: str, revision: str | None, port: int, *, pixels: tuple[int, int], on_cpu: bool, dtype: str
) -> Plan:
    """The command of a vLLM server that answers as a checkpoint on all GPUs. Raises UsageError: there is no vLLM."""
    argv = vllm.serve_command(model, revision, port, pixels=pixels, devices=[], on_cpu=on_cpu, dtype=dtype)
    return Plan(argv + vllm.policy_arguments(), _common() | vllm.environment([], on_cpu))


def module_plan(module: str, *args: str) -> Plan:
    """A plain `python -m module args` in this environment, with all cores."""
    return Plan([sys.executable, "-m", module, *args], _common() | _threads(cpu_count()))


def flags(**options: Any) -> list[str]:
    """`--name value` of each that is given; of True `--name`."""
    given = {f"--{name.replace('_', '-')}": v for name, v in options.items() if v is not None and v is not False}
    return [part for flag, value in given.items() for part in ([flag] if value is True else [flag, str(value)])]


def free_port() -> int:
    """A TCP port on loopback that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this TCP port of loopback."""
    try:
        socket.create_server(("127.0.0.1", port)).close()  # reusing, as servers do: no rest of an earlier one counts
    except OSError:
        return False
    return True
