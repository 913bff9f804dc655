"""GRPO with TRL's trainer: one rank of a run.

`python -m r1vfree_cli.training.grpo RUN_DIR` is started by the launcher on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from trl import GRPOConfig

from ..config.embedded import with_seed
from ..config.schema import GrpoRecipe
from ..core import console
from ..core.errors import DataError, UsageError, counted
from ..core.files import append_jsonl
from ..data.load import load_rows
from ..models.lengths import drop_long_prompts
from ..rewards import canaries
from ..rewards.registry import build_feedback, build_rewards
from ..run import contract
from ..run.attempt import Attempt
from ..run.run_dir import RunDir
from .callbacks import BeforeTraining, PeriodicCheck, RolloutCallback
from .evaluation import HOLDOUT, Evaluate, Exam, heldout_exam, measure
from .guard import CollapseGuard
from .recorder import Rollout, summarise_metrics, truncate_lines, truncate_rollouts, update_summary
from .run import Training
from .trainer import R1VGRPOTrainer
from .worker import is_main, on_main, refusals, stop_requested, to_prompts, worker


def grpo_config(recipe: GrpoRecipe, run: RunDir) -> GRPOConfig:
    """TRL's config: the recipe's `train` by name, and what r1v decides. Build it before the model (ZeRO-3).

    Raises:
        UsageError: TRL or transformers refuses a combination.
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
    with refusals(recipe):
        args = GRPOConfig(
            **(defaults | given),
            num_generations=recipe.train.num_generations,
            per_device_train_batch_size=recipe.train.prompts_per_device * recipe.train.num_generations,
            reward_weights=[r.weight for r in recipe.rewards],
            output_dir=str(run.checkpoints),
            bf16=recipe.model.dtype == "bfloat16",
            fp16=recipe.model.dtype == "float16",
            use_cpu=recipe.launch.on_cpu and not zero,  # told so, accelerate would leave DeepSpeed out
            remove_unused_columns=False,  # rewards read the row's columns
            trust_remote_code=recipe.model.trust_remote_code,
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

        Raises:
            DataError: there are none.
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
        self.canaries = self._canary_checks(done)
        for _, ask in self.canaries:
            ask(None)

    def _canary_checks(self, done: int) -> list[tuple[int, Callable[[int | None], None]]]:
        """For each judge: every how many steps, and what asks it its canaries, on rank 0; raises on every rank if it fails.

        Each report is a line of canaries.jsonl. `done`: steps of earlier attempts.
        """

        recipe = self.recipe

        def ask(judge, settings, step: int | None) -> None:
            def check() -> None:
                report = canaries.check(judge, self.rows, settings, recipe.seed, recipe.policy_prompt)
                lines = [dict(zip(canaries.HEADER, row, strict=True)) for row in report.table]
                line = {"step": step or done, "judge": report.judge, "ok": report.ok, "checks": lines}
                append_jsonl(self.run.path / "canaries.jsonl", line)
                if not report.ok:
                    raise report.error(step)

            on_main(check)

        found: list[tuple[int, Callable[[int | None], None]]] = []
        for reward in recipe.judges:
            if reward.canaries is None:
                console.log(
                    f"rewards.{reward.key}.canaries are off: nothing checks that this judge tells right from wrong"
                )
                continue
            judge = next(r for r in self.rewards if r.__name__ == reward.key)
            found.append((reward.canaries.every_steps, functools.partial(ask, judge, reward.canaries)))
        return found

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
        recipe, recorder = self.recipe, self.trainer.recorder
        guard = CollapseGuard(recipe.train.guard) if recipe.train.guard else None
        if guard is not None:
            self.trainer.carried["guard"] = guard
        return [
            BeforeTraining(lambda: self._measure("before")),
            RolloutCallback(recorder, self.run, show=recipe.train.show_rollouts, guard=guard, table=self._table),
            *(PeriodicCheck(ask, every) for every, ask in self.canaries),
            *super().callbacks(),
            *self._evaluation(),
        ]

    def _evaluation(self) -> list[Evaluate]:
        settings, exam = self.recipe.eval, self.exam
        if settings is None:
            return []
        if exam is None:
            assert self.heldout is not None
            rows = self.heldout.select(range(min(settings.limit or len(self.heldout), len(self.heldout))))
            exam = heldout_exam(rows, self.recipe.policy_prompt, self.judges)
        self.evaluate = Evaluate(self.trainer, exam, settings, guard=self.recipe.train.guard is not None)
        return [self.evaluate]

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
        shares = measure(self.trainer, self.heldout, self.recipe.policy_prompt)
        if is_main():
            figures = {f"heldout_{name}": {how: {when: v} for how, v in shares[name].items()} for name in shares}
            update_summary(self.run, figures | {"heldout_rows": len(self.heldout)})
            self.trackers.log({f"heldout_{name}_{how}": v for name in shares for how, v in shares[name].items()})
        self.clock.lap(f"held-out {when}")

    def _table(self, step: int, rollouts: list[Rollout]) -> None:
        places = {row_id: i for i, row_id in enumerate(self.rows["id"])} if self.trackers.samples else {}
        self.trackers.table(step, rollouts, lambda row_id: next(iter(self.rows[places[row_id]]["images"] or []), None))


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
