"""What a run of SFT and one of GRPO have in common, from the recipe to `final/`. A stage adds what is its own."""

from __future__ import annotations

import math
import time
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from ..config.embedded import with_seed
from ..core import console
from ..core.errors import Interrupted, R1VError, counted
from ..core.files import append_jsonl
from ..data.load import data_sha256, load_rows
from ..models.load import load_policy, load_processor, peft_config, round_weights
from ..run import contract
from ..run.attempt import Attempt
from ..run.run_dir import FINISHED, INTERRUPTED, RUNNING, STOPPED
from ..shared_prefix.decode import any_rank
from .checkpoints import resume_point, save_final, try_final_save
from .recorder import truncate_lines, update_summary
from .trackers import Trackers
from .worker import is_main, on_main, refusals, stop_requested, without_throughput_timer

STATUS_EVERY_S = 1.0  # status.json is for people who watch; metrics.jsonl has every step


class Training(TrainerCallback):
    """One rank of a run, and its trainer's callback: metrics.jsonl, the status, SIGTERM as checkpoint and stop.

    `main` calls the methods below it in their order; they find set: `args` (TRL's config), `processor`, `rows` (a
    `datasets.Dataset`), `trainer`. `stopped`: why a callback ended training, on every rank, raised after `train()`.
    """

    stage: str
    args: Any
    processor: Any
    rows: Any
    trainer: Any

    def __init__(self, recipe: Any, attempt: Attempt):
        self.recipe, self.attempt, self.run = recipe, attempt, attempt.run
        self.stopped: R1VError | None = None
        self._laps: dict[str, float] = {}
        self._lap = self._mark = time.perf_counter()
        self._elapsed, self._steps, self._status_at = 0.0, 0, 0.0

    def main(self) -> None:
        """Train, and leave `final/`, `summary.json` and the status.

        Raises GuardStop, Interrupted: the run stopped itself, or a signal did; a checkpoint is there. UsageError,
        DataError: nothing to train on, or something that cannot work.
        """
        self.args = self.config()
        with Trackers(self.args, self.run, self.recipe) as self.trackers:
            self._main()

    def _main(self) -> None:
        recipe, run = self.recipe, self.run
        resume = on_main(lambda: resume_point(self.attempt))  # other nodes have no run dir to see that it is a resume
        self.processor = load_processor(recipe.model, self.args.seed, judge=getattr(recipe, "role", None) == "judge")
        path = with_seed(recipe.data.path, self.args.seed)
        with PartialState().local_main_process_first():  # the others find the lengths in the cache
            self.rows, dropped = self.select(load_rows(path, recipe.data.split, recipe.data.limit))
        for reason, count in dropped.items():
            console.log(f"dropped {counted(count, 'row')}: {reason}; left: {len(self.rows)}")
        self.prepare(int(resume.name.rpartition("-")[2]) if resume else 0)
        policy = load_policy(recipe.model, self.args.seed, weights=recipe.weights_dtype)
        with refusals(recipe):
            self.trainer = self.make_trainer(
                model=policy,
                args=self.args,
                processing_class=self.processor,
                peft_config=peft_config(policy, recipe.model),
            )
        without_throughput_timer(self.trainer.accelerator.state.deepspeed_plugin)
        sha256 = data_sha256(path, recipe.data.split)
        self.trainer.contract = contract.build(
            self.stage, recipe, data_sha256=sha256, git_commit=self.attempt.git_commit, **self.contract_fields()
        )
        try_final_save(self.trainer)
        if resume and is_main():
            contract.warn_of_changes(resume, self.trainer.contract)
        self.lap("load")
        self._train(str(resume) if resume else None)
        self.after_training()
        if recipe.weights_dtype != recipe.model.dtype:
            round_weights(self.trainer.model, recipe.model.dtype)
        console.log(f"saving {run.final}")
        save_final(self.trainer, run.final)
        self.lap("save")
        if is_main():
            seconds = self.attempt.seconds_until_now(self.stage) | self._laps
            update_summary(run, self.figures() | {"rows": len(self.rows), "dropped": dropped, "seconds": seconds})
        self._set_status(FINISHED, None)

    def config(self) -> Any:
        """TRL's config. It joins the ranks, and under ZeRO-3 makes loading shard."""
        raise NotImplementedError

    def select(self, rows) -> tuple[Any, dict[str, int]]:
        """(the rows that can be trained on, {reason: how many were dropped}); once a node, the other ranks wait."""
        raise NotImplementedError

    def prepare(self, done: int) -> None:
        """What must be known before the model is loaded. `done`: steps of earlier attempts."""

    def make_trainer(self, **common: Any) -> Any:
        raise NotImplementedError

    def contract_fields(self) -> dict[str, Any]:
        """Arguments of `contract.build` that only this stage has."""
        return {}

    def callbacks(self) -> list[Any]:
        """After the trackers, in their order; what comes after this one is no part of a step's time."""
        return [self]

    def when_stopped(self) -> None:
        """On every rank, after an error that all of them raised in the same step."""

    def close(self) -> None:
        """After training, however it ended."""

    def after_training(self) -> None:
        """Once every step was taken, before the model is saved."""

    def figures(self) -> dict[str, Any]:
        """What only this stage writes into summary.json."""
        return {}

    def lap(self, name: str) -> None:
        """Count the seconds since the last call as `name`, for the summary."""
        now = time.perf_counter()
        self._laps[name] = round(self._laps.get(name, 0) + now - self._lap, 2)
        self._lap = now

    def _train(self, resume: str | None) -> None:
        callbacks = [self.trackers, *self.callbacks()]
        for callback in callbacks:
            self.trainer.add_callback(callback)
        try:
            self.trainer.train(resume_from_checkpoint=resume)
        except R1VError as e:
            if getattr(self.trainer, "stopping", False):
                self.when_stopped()
                self._set_status(STOPPED, e.message)
            raise
        finally:
            self.close()
        self.lap("train")
        error = next(filter(None, (getattr(callback, "stopped", None) for callback in callbacks)), None)
        if isinstance(error, Interrupted):
            self._set_status(INTERRUPTED, "interrupted")
        elif error is not None:
            self._set_status(STOPPED, error.message)
        if error is not None:
            raise error

    def _set_status(self, state: str, reason: str | None) -> None:
        if is_main():
            self.run.set_status(state, step=self.trainer.state.global_step, reason=reason)

    # --- as a callback -----------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        if is_main():
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
            interrupted = Interrupted(f"interrupted after step {state.global_step}", hint="--resume goes on from there")
            self.stopped = self.stopped or interrupted
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Writing a checkpoint is not part of a step's time."""
        self._mark = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append the step's line. Trainer's closing summary and evaluations have no `loss` and are left out."""
        if not is_main() or not logs or "loss" not in logs:
            return
        values = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and k != "step"}
        if self._steps:
            values["step_time"] = self._elapsed / self._steps
        self._elapsed, self._steps = 0.0, 0
        self._append(state.global_step, values)
        if time.monotonic() - self._status_at > STATUS_EVERY_S:
            self._status_at = time.monotonic()
            self.run.set_status(RUNNING, step=state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """A line of its own with the step's number; no part of a step's time either."""
        self._mark = time.perf_counter()
        if is_main() and metrics:
            self._append(state.global_step, metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self._set_status(RUNNING, None)

    def _append(self, step: int, values: dict[str, Any]) -> None:
        append_jsonl(self.run.metrics, {"step": step} | {k: finite(v) for k, v in values.items()})


def finite(value: float) -> float | None:
    """The number rounded to 8 digits, or None for NaN and infinity, which JSON has not."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None
