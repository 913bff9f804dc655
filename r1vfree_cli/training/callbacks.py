"""What SFT and GRPO both report while they train: metrics.jsonl, status.json, and a stop that all ranks agree on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..core.files import append_jsonl, read_jsonl, write_text
from ..run.run_dir import RUNNING, RunDir
from .worker import stop_requested

STATUS_EVERY_S = 1.0  # status.json is for people who watch; metrics.jsonl has every step


class RunCallback(TrainerCallback):
    """A line of metrics.jsonl for each logged step, the status, and SIGTERM as checkpoint and stop.

    `extra` is asked for more numbers (name -> value) for each line, on the main process only. After `train()`,
    `interrupted` says on every rank whether a signal ended it; the worker then raises `Interrupted`.
    """

    def __init__(self, run: RunDir, extra: Callable[[], dict[str, float]] | None = None):
        self.run = run
        self.extra = extra
        self.interrupted = False
        self._mark = time.perf_counter()
        self._elapsed = 0.0
        self._steps = 0
        self._status_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run forgets what an earlier attempt logged beyond its checkpoint."""
        if state.is_world_process_zero:
            trim_metrics(self.run.metrics, state.global_step)
            self.run.set_status(RUNNING, step=state.global_step, max_steps=state.max_steps)
        self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Count the step's time (data and generation included) and let all ranks stop when one was told to."""
        now = time.perf_counter()
        self._elapsed += now - self._mark
        self._mark = now
        self._steps += 1
        if any_rank(stop_requested(), args.device):
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Writing a checkpoint is not part of a step's time."""
        self._mark = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append the step's line. Trainer's closing summary and evaluations have no `loss` and are left out."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        values: dict[str, Any] = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and k != "step"}
        if self.extra is not None:
            values |= self.extra()
        if self._steps:
            values["step_time"] = self._elapsed / self._steps
        self._elapsed, self._steps = 0.0, 0
        append_jsonl(self.run.metrics, {"step": state.global_step} | {k: finite(v) for k, v in values.items()})
        if time.monotonic() - self._status_at > STATUS_EVERY_S:
            self._status_at = time.monotonic()
            self.run.set_status(RUNNING, step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.run.set_status(RUNNING, step=state.global_step)


def finite(value: float) -> float | None:
    """The number rounded to 8 digits, or None for NaN and infinity, which JSON has not."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    told = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return bool(told.item())


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps above `step`, and half a line that a killed run left."""
    if not path.is_file():
        return
    kept = [document for _, document in read_jsonl(path) if document["step"] <= step]
    write_text(path, "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in kept))
