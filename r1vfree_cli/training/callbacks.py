"""Trainer callbacks: metrics.jsonl, status.json, rollouts, the collapse guard, and stops that all ranks agree on.

A callback that ends training leaves the reason in `stopped`, on every rank, for the worker to raise after `train()`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..core import console
from ..core.errors import GuardStop, Interrupted, R1VError
from ..core.files import append_jsonl
from ..run.run_dir import RUNNING, RunDir
from ..shared_prefix.decode import any_rank
from .guard import CollapseGuard, Verdict, figures, offenders
from .recorder import Recorder, Rollout, spread_over_groups, truncate_lines
from .worker import stop_requested

STATUS_EVERY_S = 1.0  # status.json is for people who watch; metrics.jsonl has every step


class RunCallback(TrainerCallback):
    """A line of metrics.jsonl for each logged step, the status, and SIGTERM as checkpoint and stop."""

    def __init__(self, run: RunDir):
        self.run = run
        self.stopped: R1VError | None = None
        self._mark = time.perf_counter()
        self._elapsed = 0.0
        self._steps = 0
        self._status_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            truncate_lines(self.run.metrics, state.global_step)  # what an earlier attempt logged beyond its checkpoint
            self.run.set_status(RUNNING, step=state.global_step, max_steps=state.max_steps)
        self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Count the step's time (data and generation included) and let all ranks stop when one was told to."""
        now = time.perf_counter()
        self._elapsed += now - self._mark
        self._mark = now
        self._steps += 1
        if any_rank(stop_requested(), args.device):
            self.stopped = Interrupted(
                f"interrupted after step {state.global_step}", hint="--resume goes on from there"
            )
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
        if self._steps:
            values["step_time"] = self._elapsed / self._steps
        self._elapsed, self._steps = 0.0, 0
        append_jsonl(self.run.metrics, {"step": state.global_step} | {k: finite(v) for k, v in values.items()})
        if time.monotonic() - self._status_at > STATUS_EVERY_S:
            self._status_at = time.monotonic()
            self.run.set_status(RUNNING, step=state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """A line of its own with the step's number; no part of a step's time either."""
        self._mark = time.perf_counter()
        if state.is_world_process_zero and metrics:
            append_jsonl(self.run.metrics, {"step": state.global_step} | {k: finite(v) for k, v in metrics.items()})

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.run.set_status(RUNNING, step=state.global_step)


class RolloutCallback(TrainerCallback):
    """Rollouts of each step into the run dir, some of each logged step for the launcher to show, and the guard.

    `guard` None: nothing ends a collapsed run. Every rank sees the same figures and decides alike.
    """

    def __init__(
        self,
        recorder: Recorder,
        run: RunDir,
        *,
        show: int = 0,
        guard: CollapseGuard | None = None,
        table: Callable[[int, list[Rollout]], None] = lambda *_: None,
    ):
        self.recorder, self.run, self.show, self.guard, self.table = recorder, run, show, guard, table
        self.stopped: R1VError | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.recorder.write(self.run)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        rollouts = self.recorder.take()
        if state.is_world_process_zero:
            self._show(state.global_step, rollouts)
            self.table(state.global_step, rollouts)
        verdict = Verdict()
        if self.guard is not None:
            logged = {name: logs.get(name) for name in ("loss", "grad_norm")}
            logged["sampler_difference"] = logs.get("sampling/sampling_logp_difference/mean")
            verdict = self.guard.observe(figures(state.global_step, rollouts, **logged))
        if state.is_world_process_zero:
            for warning in verdict.warnings:
                console.warn(warning)
        if any_rank(verdict.stop is not None, args.device) and self.stopped is None:
            self.stopped = GuardStop(
                f"stopped by the guard: {verdict.stop or 'on another rank'}",
                details=offenders(rollouts, verdict.figure),
                hint=f"the rollouts are in {self.run.rollouts}; thresholds are train.guard, "
                "`train.guard: null` turns it off",
            )
            control.should_training_stop = True
            # NaN that shows only here is in the weights already: keep the last good checkpoint as the newest.
            control.should_save = verdict.figure != "nan"

    def _show(self, step: int, rollouts: list[Rollout]) -> None:
        for r in spread_over_groups(rollouts, self.show):
            sample = {"id": r.id, "prompt": r.prompt, "completion": r.completion, "rewards": r.rewards}
            append_jsonl(self.run.logs / "samples.jsonl", {"step": step, **sample, "advantage": r.advantage})


class PeriodicCheck(TrainerCallback):
    """Runs `check(step)` after every `every` steps but the last; an R1VError of it, on all ranks, ends training."""

    def __init__(self, check: Callable[[int], None], every: int):
        self.check, self.every = check, every
        self.stopped: R1VError | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        try:
            self.check(state.global_step)
        except R1VError as e:
            self.stopped = GuardStop(e.message, details=e.details, hint=e.hint)
            control.should_save = control.should_training_stop = True


class BeforeTraining(TrainerCallback):
    """Runs `measure` once the model is wrapped for training and before the first step of a new run."""

    def __init__(self, measure: Callable[[], None]):
        self.measure = measure

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.measure()


def finite(value: float) -> float | None:
    """The number rounded to 8 digits, or None for NaN and infinity, which JSON has not."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None
