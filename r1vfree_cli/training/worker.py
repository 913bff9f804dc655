"""What every worker shares: its start and end, model and processor loading, the prompt dataset."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

from ..config import recipes
from ..config import schema as config
from ..config.embedded import resolve_model
from ..core import console
from ..core.errors import DataError, Interrupted, R1VError, UsageError, from_dict
from ..core.process import grace_s, hold_pid_file, orphaned
from ..core.prompts import build_messages
from ..run.run_dir import SAID, RunDir, append_jsonl, disk_full, no_space, write_json

_stop = threading.Event()


# --- start and end ---------------------------------------------------------------------------------------------


def stop_requested() -> bool:
    """True once this rank got SIGTERM or SIGINT. Ranks agree on it in `callbacks`; never act on it alone."""
    return _stop.is_set()


def is_main() -> bool:
    """Rank 0 over all nodes."""
    return int(os.environ.get("RANK", "0")) == 0


def on_main(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 and return its result on every rank; what it raises there is raised on all, as an R1VError.

    Call it once TRL's config was built: that joins the ranks.
    """
    error: Exception | None = None
    told: list[Any] = [None, None]  # result, error as a document
    if is_main():
        try:
            told[0] = work()
        except Exception as e:
            error = e
            told[1] = (e if isinstance(e, R1VError) else R1VError(f"rank 0 failed: {e!r}")).to_dict()
    if PartialState().num_processes > 1:
        broadcast_object_list(told)
    if error is not None:
        raise error
    if told[1] is not None:
        raise from_dict(told[1])
    return told[0]


def seconds_until_now(stage: str) -> dict[str, float]:
    """Seconds of what came before the ranks, and of `stage` since r1v launched it; {} where r1v did not start this.

    The rank writes them down: r1v may be killed between the end of its ranks and its own.
    """
    told = json.loads(os.environ.get("R1V_SECONDS", "null"))
    if told is None:
        return {}
    return {**told["before"], stage: round(time.monotonic() - told["launched"], 1)}


def worker(stage: str, main: Callable[[Any, RunDir], None]) -> None:
    """Run `main(recipe, run_dir)` as one rank: own log file, errors as files, signals as a flag.

    The recipe is `RUN_DIR/recipe.yaml` (argv[1]), or `$R1V_RECIPE` on nodes above 0. Exit code: that of the
    `R1VError`, else 1. The cause is left in `logs/attempt-N/rank-K.error.json` for the launcher to show.
    """
    run_dir = RunDir(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    logs = Path(os.environ.get("R1V_LOGS") or run_dir.logs)
    logs.mkdir(parents=True, exist_ok=True)
    _redirect(logs / f"rank-{rank}.log")
    if rank == 0:
        console.repeat = functools.partial(_say, logs / SAID)
    _signals()
    if orphaned():
        os._exit(130)
    pid_file = hold_pid_file(logs / f"rank-{rank}.pid")
    code = 0
    try:
        recipe_file = Path(os.environ.get("R1V_RECIPE") or run_dir.recipe)
        recipe = recipes.validate(stage, recipes.load_document(recipe_file), str(recipe_file))
        _init_distributed(recipe.launch)
        main(recipe, run_dir)
    except R1VError as e:
        traceback.print_exc()
        write_json(logs / f"rank-{rank}.error.json", e.to_dict())
        code = e.exit_code
    except BaseException as e:
        traceback.print_exc()
        text = "".join(traceback.format_exception_only(type(e), e)).strip()
        error: R1VError = Interrupted("interrupted") if _stop.is_set() else R1VError(text)
        if no_space(e):
            error = disk_full(run_dir.path)
        write_json(logs / f"rank-{rank}.error.json", error.to_dict())
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    pid_file.close()
    # Not sys.exit: after a failure on one rank, interpreter shutdown can wait for collectives of the others.
    os._exit(code)


def _say(file: Path, text: str, warning: bool) -> None:
    with contextlib.suppress(UsageError):  # a full disk is told by what needs it
        append_jsonl(file, {"text": text, "warning": warning})


def _redirect(path: Path) -> None:
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _signals() -> None:
    def on_signal(number, frame):
        if not _stop.is_set():
            _stop.set()
            # A rank that hangs in a collective never reads the flag.
            timer = threading.Timer(grace_s(), os._exit, (130,))
            timer.daemon = True
            timer.start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    die_with_parent(signal.SIGTERM)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send `number` to this process when its parent dies; does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, number)  # PR_SET_PDEATHSIG


def _init_distributed(launch: config.Launch) -> None:
    if launch.on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # DeepSpeed would compile collectives through shared memory, which takes a compiler; gloo has all that is used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed's own discovery looks for MPI, and its CPU default backend is not built everywhere.
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


@contextmanager
def refusals(recipe: config.GrpoRecipe | config.SftRecipe) -> Iterator[None]:
    """Around TRL's configs and trainers: what they refuse is the recipe's fault, not a bug.

    Raises:
        UsageError: with TRL's or transformers' words.
    """
    on_cpu = recipe.launch.on_cpu
    # transformers lets the CPU compute in bfloat16 only where it is told `use_cpu`, which would leave DeepSpeed out.
    allowed = patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    try:
        with allowed if on_cpu else nullcontext():
            yield
    except (ValueError, ImportError, NotImplementedError) as e:
        raise UsageError(f"TRL refuses the recipe's settings: {' '.join(str(e).split())[:500]}") from e


# --- model and processor ---------------------------------------------------------------------------------------


def load_processor(model: config.Model, seed: int = 0):
    """The checkpoint's processor with the recipe's pixel limits, which `save_pretrained` keeps.

    Raises:
        DataError: there is no processor at that place.
    """
    where = resolve_model(model.name, seed)
    try:
        processor = AutoProcessor.from_pretrained(
            where, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as e:  # damaged files raise anything, the tokenizers library bare Exceptions
        raise DataError(f"cannot load the processor of model {model.name}: {first_line(e)}") from None
    if not hasattr(processor, "image_processor"):
        raise DataError(f"model {model.name} has no image processor", hint="r1v trains vision-language models")
    check_template(processor, model.name)
    set_pixel_limits(processor, model.min_pixels, model.max_pixels)
    processor.tokenizer.padding_side = "left"
    return processor


def check_template(processor, name: str) -> None:
    """Render a question about an image, and tokenise it.

    Raises:
        DataError: there is no chat template, it or the tokenizer is broken, or it leaves out the image.
    """
    try:
        text = processor.apply_chat_template(build_messages("?"), tokenize=False, add_generation_prompt=True)
    except Exception as e:  # a template is a program
        raise DataError(f"the chat template of {name} does not work: {first_line(e)}") from None
    if processor.image_token not in text:
        raise DataError(f"the chat template of {name} leaves out the image")
    try:
        processor.tokenizer(text)
    except Exception as e:  # settings of another type
        raise DataError(f"the tokenizer of {name} does not work: {first_line(e)}") from None


def set_pixel_limits(processor, min_pixels: int, max_pixels: int) -> None:
    """Set the limits (pixels an image, after resizing) through `size`: attributes alone are lost on save."""
    size = processor.image_processor.size
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor.image_processor.size = limits if isinstance(size, dict) else type(size)(**limits)


def load_policy(model: config.Model, seed: int = 0, *, weights: str | None = None):
    """The model, of the class its config names (never its path), in the recipe's attention and dtype, or in `weights`.

    Call it after the TRL config was built: under ZeRO-3 that is what makes `from_pretrained` shard on loading.

    Raises:
        DataError: no loadable vision-language model there.
        UsageError: flash_attention_2 was asked for and is not installed.
    """
    where = resolve_model(model.name, seed)
    common = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    options = {"attn_implementation": attention(model), "quantization_config": _quantization(model)}
    try:
        check_size(where, AutoConfig.from_pretrained(where, **common))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            where,
            dtype=getattr(torch, weights or model.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **common,
        )
    except (R1VError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # damaged files raise anything
        raise DataError(
            f"cannot load model {model.name} as a vision-language model: {first_line(e)}",
            hint="give a hub name or a folder with config.json and *.safetensors",
        ) from None
    policy, info = loaded
    if info["missing_keys"]:
        raise DataError(
            f"model {model.name} lacks weights, which would be random", details=sorted(info["missing_keys"])[:5]
        )
    if model.freeze_vision:
        freeze_vision(policy)
    return policy


def check_size(where: str, config) -> None:
    """Stop before a folder whose config.json describes a model far larger than its weights is given memory.

    Raises:
        DataError: more than two parameters for a stored byte (four-bit weights have two).
    """
    if is_deepspeed_zero3_enabled():  # it shards while loading, and cannot build on the meta device
        return
    stored = sum(file.stat().st_size for file in Path(where).glob("*.safetensors"))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    if stored and count > 2 * stored:
        raise DataError(
            f"cannot load {where}: config.json describes {count} parameters, the weights are {stored} bytes"
        )


def round_weights(policy, dtype: str) -> None:
    """Weights held in float32 for the optimizer's sake, in the dtype that the finished model is stored in."""
    for parameter in policy.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def freeze_vision(policy) -> None:
    """No gradients for the vision tower (and its merger)."""
    for parameter in policy.model.visual.parameters():
        parameter.requires_grad_(False)


def attention(model: config.Model) -> str:
    """The attention implementation: `auto` is flash_attention_2 where it can run, else sdpa."""
    from transformers.utils import is_flash_attn_2_available

    can_flash = torch.cuda.is_available() and model.dtype != "float32" and is_flash_attn_2_available()
    if model.attention == "auto":
        return "flash_attention_2" if can_flash else "sdpa"
    if model.attention == "flash_attention_2" and not can_flash:
        raise UsageError(
            "model.attention is flash_attention_2, which cannot run here",
            hint="pip install -e '.[flash]' on a CUDA machine with bfloat16 or float16, or use attention: auto",
        )
    return model.attention


def peft_config(model: config.Model):
    """A `peft.LoraConfig` for `model.lora`, or None."""
    if model.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=model.lora.r,
        lora_alpha=model.lora.alpha,
        lora_dropout=model.lora.dropout,
        target_modules=model.lora.target_modules,
        exclude_modules=r".*visual.*" if model.freeze_vision else None,
        task_type="CAUSAL_LM",
    )


def _quantization(model: config.Model):
    if model.lora is None or model.lora.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    if model.lora.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
    )


def first_line(error: BaseException) -> str:
    """The first line of its message, its class's name where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- data ------------------------------------------------------------------------------------------------------


def to_prompts(rows):
    """A `datasets.Dataset` of rows -> one that yields `prompt` (messages) beside the row's columns.

    Images stay in `images` and are decoded when a row is fetched; `prompt` has one placeholder an image.
    """

    def transform(batch):
        counts = [len(images or []) for images in batch["images"]]
        batch["prompt"] = [build_messages(p, n) for p, n in zip(batch["problem"], counts)]
        return batch

    return rows.with_transform(transform)
