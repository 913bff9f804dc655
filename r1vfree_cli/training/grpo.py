"""GRPO with TRL's trainer: one rank of a run.

`python -m r1vfree_cli.training.grpo RUN_DIR` is started by the launcher on every rank.
"""

from __future__ import annotations

import functools
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from trl import GRPOConfig

from ..config.embedded import with_seed
from ..config.rewards import FeedbackReward
from ..config.schema import GrpoRecipe
from ..core import console
from ..core.errors import DataError, GuardStop, R1VError, UsageError, counted
from ..core.files import append_jsonl
from ..data.load import load_rows
from ..models.lengths import drop_long_prompts
from ..rewards import canaries
from ..rewards.registry import build_feedback, build_rewards
from ..run import contract
from ..run.attempt import Attempt
from ..run.run_dir import RunDir
from ..shared_prefix.decode import any_rank
from .evaluation import HOLDOUT, Evaluate, heldout_exam
from .exam import Exam, replies
from .guard import CollapseGuard, Verdict, figures, offenders
from .recorder import (
    Rollout,
    spread_over_groups,
    summarise_metrics,
    truncate_lines,
    truncate_rollouts,
    update_summary,
)
from .run import Training
from .trainer import R1VGRPOTrainer
from .worker import is_main, on_main, stop_requested, to_prompts, trl_config, worker


def grpo_config(recipe: GrpoRecipe, run: RunDir) -> GRPOConfig:
    """TRL's config: the recipe's `train` by name, and what r1v decides. Build it before the model (ZeRO-3).

    Raises UsageError: TRL or transformers refuses a combination.
    """
    zero = recipe.launch.preset.startswith("zero")
    given = dict(recipe.train.model_extra or {})
    if zero and recipe.launch.on_cpu:
        given["ddp_backend"] = "gloo"  # else accelerate, which sees no GPU, counts one process
    # The loss is reported as it is: a NaN replaced by an average would hide from the guard.
    defaults: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False}
    if recipe.data.max_prompt_tokens:  # else vLLM plans for the model's longest context
        longest = given.get("max_completion_length") or GRPOConfig.max_completion_length or 0
        defaults["vllm_max_model_length"] = recipe.data.max_prompt_tokens + longest
    if recipe.model.revision is not None:  # TRL loads the reference policy itself
        given["model_init_kwargs"] = {"revision": recipe.model.revision}
    args = trl_config(
        GRPOConfig,
        recipe,
        run,
        **(defaults | given),
        num_generations=recipe.train.num_generations,
        per_device_train_batch_size=recipe.train.prompts_per_device * recipe.train.num_generations,
        reward_weights=[r.weight for r in recipe.rewards],
        use_cpu=recipe.launch.on_cpu and not zero,  # told so, accelerate would leave DeepSpeed out
    )
    if zero and PartialState().distributed_type != DistributedType.DEEPSPEED:
        raise UsageError(f"launch.preset is {recipe.launch.preset}, but this process was started without DeepSpeed")
    return args


class GrpoTraining(Training):
    """Adds rewards and their canaries, held-out accuracy, rollouts and the guard."""

    stage = "grpo"
    trainer: R1VGRPOTrainer

    def __init__(self, recipe: GrpoRecipe, attempt: Attempt, exam: Exam | None = None):
        super().__init__(recipe, attempt)
        self.exam = exam

    def config(self) -> GRPOConfig:
        args = grpo_config(self.recipe, self.run)
        if self.attempt.trial:  # the longest completions make the peak; those of an untrained policy may be short
            least = "min_tokens" if args.use_vllm else "min_new_tokens"
            args.generation_kwargs = (args.generation_kwargs or {}) | {least: args.max_completion_length}
            args.mask_truncated_completions = False  # a masked one is left out of the passes
        return args

    def select(self, rows) -> tuple[Any, dict[str, int]]:
        limit, prompt = self.recipe.data.max_prompt_tokens, self.recipe.policy_prompt
        rows, dropped = drop_long_prompts(rows, self.processor, limit, prompt, longest_first=self.attempt.trial)
        self.heldout = self._heldout_rows() if self.recipe.data.heldout else None
        return rows, {f"prompt longer than {limit} tokens": dropped} if dropped else {}

    def _heldout_rows(self):
        """Those with a reference answer that fit the prompt limit; where no row has one and judges score them, all.

        Raises DataError: there are none.
        """
        recipe, heldout = self.recipe, self.recipe.data.heldout
        rows = load_rows(with_seed(heldout.path, self.args.seed), heldout.split, heldout.limit)
        answered = [i for i, s in enumerate(rows["solution"]) if s is not None and str(s).strip()]
        if not answered and not (recipe.eval and recipe.judges):
            raise DataError(f"data.heldout {heldout.path}, split {heldout.split}, has no row with a solution")
        rows = rows.select(answered) if answered else rows
        return drop_long_prompts(rows, self.processor, recipe.data.max_prompt_tokens, recipe.policy_prompt)[0]

    def prepare(self, done: int) -> None:
        recipe, run = self.recipe, self.run
        _enough(self.rows, self.args)
        pixels = recipe.model.min_pixels, recipe.model.max_pixels
        common: dict[str, Any] = {"seed": self.args.seed, "stopping": stop_requested, "pixels": pixels}
        self.rewards = build_rewards(recipe.rewards, served_url=self.attempt.reward_url, **common)
        self.judges: dict[str, Any] = {r.__name__: r for r in self.rewards if hasattr(r, "ask")}
        self.opened: list[Any] = list(self.rewards)
        if recipe.eval and recipe.eval.judge_holdout:
            self.judges[HOLDOUT] = build_feedback(recipe.eval.judge_holdout, **common)
            self.opened.append(self.judges[HOLDOUT])
        on_main(lambda: [r.probe() for r in self.opened if hasattr(r, "probe")])
        if is_main():
            truncate_rollouts(run, done)
            truncate_lines(run.path / "canaries.jsonl", done)
        if recipe.judges:
            console.log("asking the judges questions whose answers are known")
        for reward in recipe.judges:
            if reward.canaries is None:
                off = "canaries are off: nothing checks that this judge tells right from wrong"
                console.log(f"rewards.{reward.key}.{off}")
        self.done = done
        self._ask_canaries(None)

    def _ask_canaries(self, step: int | None) -> None:
        """Ask the judges that are due after `step`, or before training all, on rank 0; raises on every rank when one
        fails. Each report is a line of canaries.jsonl."""
        failed = list[R1VError]()
        for reward in self.recipe.judges:
            if reward.canaries is not None and (step is None or step % reward.canaries.every_steps == 0):
                try:
                    on_main(functools.partial(self._check_judge, reward, step))
                except R1VError as e:
                    failed.append(e)  # the others' reports are wanted too
        if failed:
            raise failed[0]

    def _check_judge(self, reward: FeedbackReward, step: int | None) -> None:
        judge, recipe = self.judges[reward.key], self.recipe
        assert reward.canaries is not None
        report = canaries.check(judge, self.rows, reward.canaries, recipe.seed, recipe.policy_prompt)
        line = {"step": step or self.done, "judge": report.judge, "ok": report.ok}
        line["checks"] = [check.shown for check in report.checks]
        append_jsonl(self.run.path / "canaries.jsonl", line)
        if not report.ok:
            raise report.error(step)

    def make_trainer(self, **common: Any) -> R1VGRPOTrainer:
        trainer = R1VGRPOTrainer(
            reward_funcs=self.rewards,
            guard=self.recipe.train.guard,
            shared_prefix=self.recipe.train.shared_prefix,
            train_dataset=to_prompts(self.rows, self.recipe.policy_prompt),
            **common,
        )
        if self.attempt.trial:  # groups of equal rewards take memory in a backward pass too, once they differ
            trainer._may_skip_idle = False
        return trainer

    def contract_fields(self) -> dict[str, Any]:
        sampling = {k: getattr(self.args, k) for k in contract.SAMPLING}
        return {
            "rewards": [_identity(r, c.weight) for r, c in zip(self.rewards, self.recipe.rewards, strict=True)],
            "sampling": sampling | {"stop_token_ids": self.trainer.eos_token_ids},
        }

    def callbacks(self) -> list[Any]:
        recipe, settings, exam = self.recipe, self.recipe.eval, self.exam
        self.guard = CollapseGuard(recipe.train.guard) if recipe.train.guard else None
        if self.guard is not None:
            self.trainer.carried["guard"] = self.guard
        if settings is None:
            return [self]
        if exam is None:
            assert self.heldout is not None
            rows = self.heldout.select(range(min(settings.limit or len(self.heldout), len(self.heldout))))
            exam = heldout_exam(rows, recipe.policy_prompt, self.judges)
        self.evaluate = Evaluate(self.trainer, exam, settings, guard=self.guard is not None)
        return [self, self.evaluate]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._measure("before")
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if is_main():
            self.trainer.recorder.write(self.run)
        try:
            if state.global_step < state.max_steps:
                self._ask_canaries(state.global_step)
        except R1VError as e:
            self.stopped = GuardStop(e.message, details=e.details, hint=e.hint)
            control.should_save = control.should_training_stop = True
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Some rollouts of the step for people to see, and the guard, to which every rank shows the same figures."""
        if logs and "loss" in logs:
            rollouts = self.trainer.recorder.take()
            if is_main():
                self._show(state.global_step, rollouts)
            self._guard(state.global_step, rollouts, logs, control)
        super().on_log(args, state, control, logs, **kwargs)

    def _show(self, step: int, rollouts: list[Rollout]) -> None:
        for r in spread_over_groups(rollouts, self.recipe.train.show_rollouts):
            sample = {"id": r.id, "prompt": r.prompt, "completion": r.completion, "rewards": r.rewards}
            append_jsonl(self.run.logs / "samples.jsonl", {"step": step, **sample, "advantage": r.advantage})
        places = {row_id: i for i, row_id in enumerate(self.rows["id"])} if self.trackers.samples else {}
        self.trackers.table(step, rollouts, lambda row_id: next(iter(self.rows[places[row_id]]["images"] or []), None))

    def _guard(self, step: int, rollouts: list[Rollout], logs: dict[str, float], control) -> None:
        verdict = Verdict()
        if self.guard is not None:
            logged = {name: logs.get(name) for name in ("loss", "grad_norm")}
            logged["sampler_difference"] = logs.get("sampling/sampling_logp_difference/mean")
            verdict = self.guard.observe(figures(step, rollouts, **logged))
        for warning in verdict.warnings if is_main() else ():
            console.warn(warning)
        if any_rank(verdict.stop is not None, self.args.device):
            error = GuardStop(
                f"stopped by the guard: {verdict.stop or 'on another rank'}",
                details=offenders(rollouts, verdict.figure),
                hint=f"the rollouts are in {self.run.rollouts}; thresholds are train.guard, "
                "`train.guard: null` turns it off",
            )
            self.stopped = error  # its evidence is what training did, whatever else ends the run in this step
            control.should_training_stop = True
            # NaN that shows only here is in the weights already: keep the last good checkpoint as the newest.
            control.should_save = verdict.figure != "nan"

    def when_stopped(self) -> None:
        if is_main():
            self.trainer.recorder.write(self.run)
        self.trainer.save_now()

    def close(self) -> None:
        for reward in self.opened:
            if hasattr(reward, "close"):
                reward.close()

    def after_training(self) -> None:
        self._measure("after")

    def figures(self) -> dict[str, Any]:
        found = summarise_metrics(self.run)
        return found | {"evaluation": self.evaluate.summary()} if self.recipe.eval else found

    def _measure(self, when: str) -> None:
        if self.heldout is None or not any(self.heldout["solution"]):
            return
        console.log(f"answering {len(self.heldout)} held-out questions twice, greedy and sampled, {when} training")
        exam = heldout_exam(self.heldout, self.recipe.policy_prompt, {})
        told: dict[str, float] = {}
        for how in ("greedy", "sampled"):  # by plain TRL generation, with the same random numbers at every call
            shares = exam.score(replies(self.trainer, exam, greedy=how == "greedy")).metrics
            for name in ("accuracy", "format") if is_main() else ():
                told[f"heldout_{name}_{how}"] = shares[name][0]
        if is_main():
            shown = {f"heldout_{name}": {how: {when: told[f"heldout_{name}_{how}"]} for how in ("greedy", "sampled")}
                     for name in ("accuracy", "format")}  # fmt: skip
            update_summary(self.run, shown | {"heldout_rows": len(self.heldout)})
            self.trackers.log(told)
        self.lap(f"held-out {when}")


def main(recipe: GrpoRecipe, attempt: Attempt, exam: Exam | None = None) -> None:
    """`GrpoTraining.main` on every rank; `exam` is asked while it trains, by default held-out rows."""
    GrpoTraining(recipe, attempt, exam).main()


def _enough(rows, args: GRPOConfig) -> None:
    """TRL leaves out the rest of an epoch that does not fill a generation batch; with too few rows that is all."""
    prompts = (args.generation_batch_size or 0) // (args.num_generations or 1)
    if len(rows) < prompts:
        raise UsageError(
            f"{counted(len(rows), 'row is', 'rows are')} fewer than the {prompts} prompts of one generation batch",
            hint="more rows, or lower train.prompts_per_device, gradient_accumulation_steps or launch.processes",
        )


def _identity(reward: Any, weight: float) -> dict:
    known = reward.identity() if hasattr(reward, "identity") else {"name": reward.__name__}
    return {"weight": weight} | known


if __name__ == "__main__":
    worker("grpo", main)
