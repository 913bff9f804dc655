"""What a run of SFT and one of GRPO have in common, from the recipe to `final/`. A stage adds what is its own."""

from __future__ import annotations

import time
from typing import Any

from accelerate import PartialState

from ..config.embedded import with_seed
from ..core import console
from ..core.errors import Interrupted, R1VError, counted
from ..data.load import data_sha256, load_rows
from ..models.load import load_policy, load_processor, peft_config, round_weights
from ..run import contract
from ..run.attempt import Attempt
from ..run.run_dir import FINISHED, INTERRUPTED, STOPPED
from .callbacks import RunCallback
from .checkpoints import resume_point, save_final, try_final_save
from .recorder import update_summary
from .trackers import Trackers
from .worker import is_main, on_main, refusals, without_throughput_timer


class Training:
    """One rank of a run. `main` calls the methods below it in their order.

    Attributes that they find set: `args` (TRL's config), `processor`, `rows` (a `datasets.Dataset`), `trainer`.
    """

    stage: str
    args: Any
    processor: Any
    rows: Any
    trainer: Any

    def __init__(self, recipe: Any, attempt: Attempt):
        self.recipe, self.attempt, self.run = recipe, attempt, attempt.run
        self.clock = Clock()

    def main(self) -> None:
        """Train, and leave `final/`, `summary.json` and the status.

        Raises:
            GuardStop: the run stopped itself; a checkpoint is there.
            Interrupted: a signal; a checkpoint is there.
            UsageError, DataError: nothing to train on, or something that cannot work.
        """
        self.args = self.config()
        self.trackers = Trackers(self.args, self.run, self.recipe)
        code = 1
        try:
            self._main()
            code = 0
        finally:
            self.trackers.close(code)

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
        self.clock.lap("load")
        self._train(str(resume) if resume else None)
        self.after_training()
        if recipe.weights_dtype != recipe.model.dtype:
            round_weights(self.trainer.model, recipe.model.dtype)
        console.log(f"saving {run.final}")
        save_final(self.trainer, run.final)
        self.clock.lap("save")
        if is_main():
            seconds = self.attempt.seconds_until_now(self.stage) | self.clock.laps
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
        """In their order; what comes after `RunCallback` is no part of a step's time. `stopped` of one is raised once
        training has ended."""
        return [RunCallback(self.run)]

    def when_stopped(self) -> None:
        """On every rank, after an error that all of them raised in the same step."""

    def close(self) -> None:
        """After training, however it ended."""

    def after_training(self) -> None:
        """Once every step was taken, before the model is saved."""

    def figures(self) -> dict[str, Any]:
        """What only this stage writes into summary.json."""
        return {}

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
        self.clock.lap("train")
        for callback in callbacks:  # a signal's, which is the last one's, yields to a reason to stop
            error = getattr(callback, "stopped", None)
            if isinstance(error, Interrupted):
                self._set_status(INTERRUPTED, "interrupted")
                raise error
            if error is not None:
                self._set_status(STOPPED, error.message)
                raise error

    def _set_status(self, state: str, reason: str | None) -> None:
        if is_main():
            self.run.set_status(state, step=self.trainer.state.global_step, reason=reason)


class Clock:
    """Seconds of named stretches of the run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        """Name the time since the last call."""
        now = time.perf_counter()
        self.laps[name] = round(self.laps.get(name, 0) + now - self._mark, 2)
        self._mark = now
