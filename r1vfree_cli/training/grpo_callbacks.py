"""Trainer callbacks of GRPO alone: rollouts into the run dir, the collapse guard, checks between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback

from ..core import console
from ..core.errors import GuardStop, R1VError
from ..core.files import append_jsonl
from ..run.run_dir import RunDir
from .callbacks import any_rank
from .guard import CollapseGuard, Verdict, figures, offenders
from .recorder import Rollout, write_rollouts
from .trainer import R1VGRPOTrainer


class RolloutCallback(TrainerCallback):
    """Writes the rollouts of each step before the step is logged, and a few of them for the launcher to show."""

    def __init__(self, trainer: R1VGRPOTrainer, run_dir: RunDir, show: int = 0):
        self.trainer, self.run_dir, self.show = trainer, run_dir, show
        self.logged: list[Rollout] = []  # of all ranks, between the last two logged steps
        self._since: list[Rollout] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.flush(main=state.is_world_process_zero)

    def flush(self, main: bool) -> None:
        """Move the trainer's rollouts into files; also called when a step was stopped half-way."""
        taken = self.trainer.take_rollouts()
        self._since += taken
        if main:
            for step in sorted({r.step for r in taken}):
                write_rollouts(self.run_dir, step, [r for r in taken if r.step == step])

    def state_dict(self) -> dict[str, Any]:
        """The rollouts that no logged step has counted yet."""
        return {"since": [asdict(r) for r in self._since]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._since = [Rollout(**r) for r in state["since"]]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        self.logged, self._since = self._since, []
        if not state.is_world_process_zero or not self.show:
            return
        # One of each group in turn, so that a few samples show different questions.
        groups: dict[tuple[int, int], list[Rollout]] = {}
        for rollout in self.logged:
            groups.setdefault((rollout.step, rollout.group), []).append(rollout)
        order = [g[i] for i in range(max(map(len, groups.values()), default=0)) for g in groups.values() if i < len(g)]
        for rollout in order[: self.show]:
            sample = {
                "step": state.global_step,
                "id": rollout.id,
                "prompt": rollout.prompt,
                "completion": rollout.completion,
                "rewards": rollout.rewards,
                "advantage": rollout.advantage,
            }
            append_jsonl(self.run_dir.logs / "samples.jsonl", sample)


class GuardCallback(TrainerCallback):
    """Feeds the collapse guard with each logged step and ends training, with a checkpoint, when it says so.

    It stands after the `RolloutCallback` in the list of callbacks.

    To judge differently, subclass and override `judge`. Every rank sees the same figures and decides alike.
    """

    def __init__(self, guard: CollapseGuard, rollouts: RolloutCallback):
        self.guard, self.rollouts = guard, rollouts
        self.stopped: GuardStop | None = None

    def judge(self, step: int, logs: dict[str, Any], rollouts: list[Rollout]) -> Verdict:
        """The verdict on one logged step: `logs` as in metrics.jsonl, and the rollouts since the last one."""
        return self.guard.observe(figures(step, rollouts, loss=logs.get("loss"), grad_norm=logs.get("grad_norm")))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        seen = self.rollouts.logged
        verdict = self.judge(state.global_step, logs, seen)
        if state.is_world_process_zero:
            for warning in verdict.warnings:
                console.warn(warning)
        if any_rank(verdict.stop is not None, args.device) and self.stopped is None:
            self.stopped = GuardStop(
                f"stopped by the guard: {verdict.stop or 'on another rank'}",
                details=offenders(seen, verdict.figure),
                hint=f"the rollouts are in {self.rollouts.run_dir.rollouts}; thresholds are train.guard, `train.guard: null` turns it off",
            )
            control.should_training_stop = True
            # NaN that shows only here is in the weights already: keep the last good checkpoint as the newest.
            control.should_save = verdict.figure != "nan"


class PeriodicCheck(TrainerCallback):
    """Runs `check(step)` after every `every` steps but the last; an R1VError of it, on all ranks, ends training."""

    def __init__(self, check: Callable[[int], None], every: int):
        self.check, self.every = check, every
        self.stopped: GuardStop | None = None

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
