"""GRPO with TRL's trainer: one rank of a run.

`python -m r1vfree_cli.training.grpo RUN_DIR` is started by the launcher on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from trl import GRPOConfig

from ..config.embedded import with_seed
from ..config.schema import GrpoRecipe
from ..core import console
from ..core.errors import R1VError, UsageError
from ..core.files import append_jsonl
from ..data.load import data_sha256, load_rows
from ..models.lengths import drop_long_prompts
from ..models.load import load_policy, load_processor, peft_config, round_weights
from ..rewards import canaries
from ..rewards.registry import build_rewards
from ..run import contract
from ..run.attempt import Attempt
from ..run.run_dir import FINISHED, INTERRUPTED, STOPPED, RunDir
from .callbacks import BeforeTraining, PeriodicCheck, RolloutCallback, RunCallback
from .checkpoints import resume_point, save_final, try_final_save
from .guard import CollapseGuard
from .heldout import heldout_rows, measure
from .recorder import summarise_metrics, truncate_lines, truncate_rollouts, update_summary
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


def main(recipe: GrpoRecipe, attempt: Attempt) -> None:
    """Train, and leave `final/`, `summary.json` and the status. Runs on every rank.

    Raises:
        GuardStop: the run stopped itself; a checkpoint is there.
        Interrupted: a signal; a checkpoint is there.
        UsageError, DataError: nothing to train on, or a reward that cannot work.
    """
    clock = _Clock()
    run = attempt.run
    args = grpo_config(recipe, run)
    resume = on_main(lambda: resume_point(attempt))  # other nodes have no run dir to see that it is a resume
    processor = load_processor(recipe.model, args.seed)
    path = with_seed(recipe.data.path, args.seed)
    split, limit = recipe.data.split, recipe.data.max_prompt_tokens
    with PartialState().local_main_process_first():  # the others find the lengths in the cache
        rows, dropped = drop_long_prompts(
            load_rows(path, split, recipe.data.limit), processor, limit, longest_first=attempt.longest_first
        )
        heldout = heldout_rows(recipe.data.heldout, processor, limit, args.seed) if recipe.data.heldout else None
    if dropped:
        console.log(f"dropped {dropped} rows: prompt longer than {limit} tokens; {len(rows)} are left")
    _enough(rows, args)

    rewards = build_rewards(recipe.rewards, seed=args.seed, served_url=attempt.reward_url, stopping=stop_requested)
    on_main(lambda: [r.probe() for r in rewards if hasattr(r, "probe")])
    done = int(resume.name.rpartition("-")[2]) if resume else 0
    if is_main():
        truncate_rollouts(run, done)
        truncate_lines(run.path / "canaries.jsonl", done)
    canary = _canaries(recipe, rewards, rows if heldout is None else heldout, args.seed, run, done)
    if canary is not None:
        canary(None)
    policy = load_policy(recipe.model, args.seed, weights=recipe.weights_dtype)
    with refusals(recipe):
        trainer = R1VGRPOTrainer(
            model=policy,
            reward_funcs=rewards,
            guard=recipe.train.guard,
            shared_prefix=recipe.train.shared_prefix,
            args=args,
            train_dataset=to_prompts(rows),
            processing_class=processor,
            peft_config=peft_config(recipe.model),
        )
    trainer.contract = contract.build(
        "grpo",
        recipe,
        data_sha256=data_sha256(path, split),
        git_commit=attempt.git_commit,
        rewards=[_identity(r, c.weight) for r, c in zip(rewards, recipe.rewards, strict=True)],
        sampling={k: getattr(args, k) for k in contract.SAMPLING} | {"stop_token_ids": trainer.eos_token_ids},
    )
    try_final_save(trainer)
    if resume and is_main():
        contract.warn_of_changes(resume, trainer.contract)
    clock.lap("load")

    def before() -> None:
        if heldout is not None:
            _record(run, measure(trainer, heldout), "before")
            clock.lap("held-out before")

    running = RunCallback(run)
    guard = CollapseGuard(recipe.train.guard) if recipe.train.guard else None
    rollouts = RolloutCallback(trainer.recorder, run, show=recipe.train.show_rollouts, guard=guard)
    every = recipe.feedback.canaries.every_steps if recipe.feedback and recipe.feedback.canaries else 1
    checking = PeriodicCheck(canary, every) if canary is not None else None
    if guard is not None:
        trainer.carried["guard"] = guard
    for callback in (BeforeTraining(before), running, rollouts, checking):
        if callback is not None:
            trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except R1VError as e:
        if trainer.stopping:
            if is_main():
                trainer.recorder.write(run)
            trainer.save_now()
            _state(run, STOPPED, trainer, e.message)
        raise
    finally:
        for reward in rewards:
            if hasattr(reward, "close"):
                reward.close()
    clock.lap("train")
    for watcher in (rollouts, checking):
        if watcher is not None and watcher.stopped is not None:
            _state(run, STOPPED, trainer, watcher.stopped.message)
            raise watcher.stopped
    if running.stopped is not None:
        _state(run, INTERRUPTED, trainer, "interrupted")
        raise running.stopped

    if heldout is not None:
        _record(run, measure(trainer, heldout), "after")
        clock.lap("held-out after")
    if recipe.weights_dtype != recipe.model.dtype:
        round_weights(trainer.model, recipe.model.dtype)
    save_final(trainer, run.final)
    clock.lap("save")
    if is_main():
        figures = summarise_metrics(run)
        dropped_rows = {"prompt too long": dropped} if dropped else {}
        seconds = attempt.seconds_until_now("grpo") | clock.laps
        update_summary(run, figures | {"rows": len(rows), "dropped": dropped_rows, "seconds": seconds})
        _state(run, FINISHED, trainer, None)


def _canaries(
    recipe: GrpoRecipe, rewards: list, rows, seed: int, run: RunDir, done: int
) -> Callable[[int | None], None] | None:
    """What asks the judge its canaries, on rank 0, and raises on every rank when it fails them; None: turned off.

    Each report is a line of canaries.jsonl. `done`: steps that earlier attempts have done.
    """
    feedback = recipe.feedback
    if feedback is None:
        return None
    settings = feedback.canaries
    if settings is None:
        console.log("canaries are turned off: nothing checks that the judge can tell right answers from wrong ones")
        return None
    judge = next(r for r in rewards if r.__name__ == feedback.name)

    def ask(step: int | None) -> None:
        report = canaries.check(judge, rows, settings, seed)
        lines = [dict(zip(canaries.HEADER, row, strict=True)) for row in report.table]
        append_jsonl(run.path / "canaries.jsonl", {"step": step or done, "ok": report.ok, "checks": lines})
        if not report.ok:
            raise report.error(step)

    return lambda step: on_main(lambda: ask(step))


def _enough(rows, args: GRPOConfig) -> None:
    """TRL leaves out the rest of an epoch that does not fill a generation batch; with too few rows that is all."""
    prompts = (args.generation_batch_size or 0) // (args.num_generations or 1)
    if len(rows) < prompts:
        raise UsageError(
            f"{len(rows)} rows are fewer than the {prompts} prompts of one generation batch",
            hint="more rows, or lower train.prompts_per_device, gradient_accumulation_steps or launch.processes",
        )


def _identity(reward: Any, weight: float) -> dict:
    known = reward.identity() if hasattr(reward, "identity") else {"name": reward.__name__}
    return {"weight": weight} | known


def _record(run: RunDir, found: dict[str, dict[str, float]], when: str) -> None:
    if is_main():
        accuracy = {how: {when: value} for how, value in found["accuracy"].items()}
        form = {how: {when: value} for how, value in found["format"].items()}
        update_summary(run, {"heldout_accuracy": accuracy, "heldout_format": form})


def _state(run: RunDir, state: str, trainer: R1VGRPOTrainer, reason: str | None) -> None:
    if is_main():
        run.set_status(state, step=trainer.state.global_step, reason=reason)


class _Clock:
    """Seconds of named stretches of the run."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        """Name the time since the last call."""
        now = time.perf_counter()
        self.laps[name] = round(self.laps.get(name, 0) + now - self._mark, 2)
        self._mark = now


if __name__ == "__main__":
    worker("grpo", main)
