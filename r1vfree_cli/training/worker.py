"""What every worker shares: its start and end, and the dataset of prompts."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..config import recipes
from ..config import schema as config
from ..core import console
from ..core.errors import Interrupted, R1VError, UsageError, from_dict
from ..core.files import append_jsonl, write_json
from ..core.machine import refused
from ..core.process import die_with_parent, grace_s, hold_pid_file, orphaned
from ..core.prompts import DEFAULT, Prompt, build_messages
from ..run.attempt import Attempt
from ..run.run_dir import SAID, RunDir

_stop = threading.Event()


# --- start and end ---------------------------------------------------------------------------------------------


def stop_requested() -> bool:
    """True once this rank got SIGTERM or SIGINT. Ranks agree on it in `run`; never act on it alone."""
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
    if told[1] is not None:
        raise error or from_dict(told[1])
    return told[0]


def worker(stage: str, main: Callable[[Any, Attempt], None]) -> None:
    """Run `main(recipe, attempt)` as one rank: own log file, errors as `rank-K.error.json` beside it, signals as a flag.

    argv[1] is the folder that holds recipe.yaml and attempt.json. Exit code: that of the `R1VError`, else 1.
    """
    folder = Path(sys.argv[1])
    attempt = Attempt.read(folder)
    rank = int(os.environ.get("RANK", "0"))
    logs = Path(attempt.logs)
    logs.mkdir(parents=True, exist_ok=True)
    out = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if rank == 0:
        console.repeat = functools.partial(_say, logs / SAID)
    _signals()
    if orphaned(attempt.launcher_pid):
        os._exit(130)
    pid_file = hold_pid_file(logs / f"rank-{rank}.pid")
    code = 0
    try:
        recipe_file = folder / "recipe.yaml"
        recipe = recipes.validate(stage, recipes.load_document(recipe_file), str(recipe_file))
        _init_distributed(recipe.launch)
        main(recipe, attempt)
    except BaseException as e:
        traceback.print_exc()
        error = e if isinstance(e, R1VError) else refused(e, attempt.run_dir)
        if error is None:
            text = "".join(traceback.format_exception_only(type(e), e)).strip()
            error = Interrupted("interrupted") if _stop.is_set() else R1VError(text)
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


def _signals() -> None:
    def on_signal(number, frame):
        if not _stop.is_set():
            _stop.set()
            # A rank that hangs in a collective never reads the flag.
            timer = threading.Timer(grace_s(), os._exit, (130,))
            timer.daemon = True
            timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    die_with_parent(signal.SIGTERM)


def _init_distributed(launch: config.Launch) -> None:
    if launch.on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # DeepSpeed would compile collectives through shared memory, which takes a compiler; gloo has all that is used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed's own discovery looks for MPI, and its CPU default backend is not built everywhere.
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def without_throughput_timer(plugin: Any) -> None:
    """DeepSpeed's timer waits for the GPU before each forward pass from the third step on: it breaks the capture of a
    decoding step, and r1v measures its steps itself. `plugin`: accelerate's DeepSpeedPlugin, or None."""
    if plugin is not None:
        plugin.deepspeed_config["timers"] = {"throughput": {"enabled": False}}


@contextmanager
def refusals(recipe: config.GrpoRecipe | config.SftRecipe) -> Iterator[None]:
    """Around TRL's configs and trainers: what they refuse is the recipe's fault, a UsageError with their words."""
    # transformers lets the CPU compute in bfloat16 only where it is told `use_cpu`, which would leave DeepSpeed out.
    allowed = patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    try:
        with allowed if recipe.launch.on_cpu else nullcontext():
            yield
    except (ValueError, ImportError, NotImplementedError) as e:
        raise UsageError(f"TRL refuses the recipe's settings: {' '.join(str(e).split())[:500]}") from e


def trl_config(
    kind: Callable[..., Any], recipe: config.GrpoRecipe | config.SftRecipe, run: RunDir, **values: Any
) -> Any:
    """TRL's config of `values` and what is the same in both stages. Raises UsageError: it is refused."""
    with refusals(recipe):
        return kind(
            **values,
            output_dir=str(run.checkpoints),
            bf16=recipe.model.dtype == "bfloat16",
            fp16=recipe.model.dtype == "float16",
            remove_unused_columns=False,  # rewards and collators read the row's columns
            trust_remote_code=recipe.model.trust_remote_code,
        )


# --- data ------------------------------------------------------------------------------------------------------


def to_prompts(rows, prompt: Prompt = DEFAULT):
    """A `datasets.Dataset` of rows -> one that yields `prompt` (messages) beside the row's columns.

    Images stay in `images` and are decoded when a row is fetched; `prompt` has one placeholder an image.
    """

    def transform(batch):
        counts = [len(images or []) for images in batch["images"]]
        batch["prompt"] = [build_messages(p, n, prompt) for p, n in zip(batch["problem"], counts)]
        return batch

    return rows.with_transform(transform)
