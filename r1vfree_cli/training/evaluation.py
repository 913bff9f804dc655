"""Greedy answers of the current weights while training: scores with intervals, the best checkpoint, two judges compared.

What is asked and how it is scored is an `Exam`: held-out rows here, a benchmark from the room `eval`, which is above.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from ..config.schema import Evaluation
from ..core import console
from ..core.errors import GuardStop, R1VError, UsageError, counted
from ..core.prompts import Prompt, build_messages, parse
from .exam import Exam, Interval, Scored, replies
from .trainer import R1VGRPOTrainer
from .worker import is_main, on_main

HOLDOUT = "judge_holdout"
SUSPICIONS = 2  # evaluations in a row before a run is stopped for reward hacking
Z = 1.96  # of a 95% interval


def heldout_exam(rows, prompt: Prompt, judges: dict[str, Any]) -> Exam:
    """Held-out rows: share of the asked form, share equal to the solution where there is one, mean of each judge."""
    labelled = any(rows["solution"])

    def get(i: int) -> tuple[list[dict], list[Any]]:
        images = rows[i]["images"] or []
        return build_messages(rows[i]["problem"], len(images), prompt), images

    def score(texts: list[str]) -> Scored:
        parsed = [parse(text) for text in texts]
        metrics = {"format": share([p.problem is None for p in parsed])}
        if labelled:
            # Equal without regard to case and surrounding space.
            wanted = [str(s).strip().casefold() for s in rows["solution"]]
            said = [None if p.answer is None else p.answer.strip().casefold() for p in parsed]
            metrics["accuracy"] = share([a == b for a, b in zip(said, wanted, strict=True)])
        judged = {}
        for name, judge in judges.items():
            items = [(row["images"] or [], row["problem"], p.answer) for row, p in zip(rows, parsed, strict=True)]
            judged[name] = judge.ask(items)
            if known := [v for v in judged[name] if v is not None]:
                metrics[name] = mean(known)
        return Scored(metrics, judged)

    return Exam("heldout", len(rows), get, score, lambda i: rows[i]["problem"])


def share(flags: Sequence[bool]) -> Interval:
    """A share of 1 with Wilson's interval."""
    n, p = len(flags), sum(flags) / len(flags)
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return p, (centre - half) / (1 + Z * Z / n), (centre + half) / (1 + Z * Z / n)


def mean(values: Sequence[float]) -> Interval:
    """A mean with its normal interval."""
    middle = statistics.fmean(values)
    half = Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return middle, middle - half, middle + half


class Evaluate(TrainerCallback):
    """Asks the exam before step 1, every so many steps and after the last; all ranks generate, rank 0 scores.

    The figures go out as the trainer's `on_evaluate`. With `keep_best` the best step's checkpoint is saved and stays.
    """

    def __init__(self, trainer: R1VGRPOTrainer, exam: Exam, settings: Evaluation, *, guard: bool):
        self.trainer, self.exam, self.settings, self.guard = trainer, exam, settings, guard
        self.stopped: R1VError | None = None
        self._state: dict[str, Any] = {"last": None, "best": None, "suspicions": 0}
        self._state |= {"first": {}, "now": {}, "judged": {}}
        trainer.carried["evaluation"] = self

    def on_step_begin(self, args, state, control, **kwargs):
        """Step 0, and a step whose evaluation a signal left out."""
        if self._due(state) and self._state["last"] != state.global_step:
            self._examine(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        stops = control.should_training_stop and state.global_step < state.max_steps
        if self._due(state) and not stops:
            before = self._state["best"]
            self._examine(args, state, control)
            control.should_save = control.should_save or self._state["best"] != before

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)
        self._keep()

    def summary(self) -> dict[str, Any]:
        """First and last value of each metric, and the best step."""
        found = {m: {"first": v, "last": self._state["now"].get(m)} for m, v in self._state["first"].items()}
        best = self._state["best"] and {"step": self._state["best"][0], self.settings.keep_best: self._state["best"][1]}
        return {"benchmark": self.exam.name, "metrics": found, "best": best}

    def _due(self, state) -> bool:
        return state.global_step % self.settings.every_steps == 0 or state.global_step >= state.max_steps

    def _examine(self, args, state, control) -> None:
        step, name = state.global_step, self.exam.name
        if is_main() and step == 0:
            every = counted(self.settings.every_steps, "step")
            console.log(f"{name}: answering {counted(self.exam.n, 'question')}, every {every}")
        texts = replies(self.trainer, self.exam, greedy=True)
        found: Scored = on_main(lambda: self.exam.score(texts))
        values = {metric: value for metric, (value, *_) in found.metrics.items()}
        self._state |= {"last": step, "now": values, "first": self._state["first"] or values}
        figures: dict[str, float] = {}
        for metric, (value, low, high) in found.metrics.items():
            key = f"eval/{name}/{metric}"
            figures |= {key: value, f"{key}/low": low, f"{key}/high": high}
        self.trainer.callback_handler.on_evaluate(args, state, control, figures)
        if is_main():
            shown = ", ".join(f"{m} {v:.3g} ({low:.3g} to {high:.3g})" for m, (v, low, high) in found.metrics.items())
            console.log(f"step {step}, {name}: {shown}")
        if ranks := self.settings.keep_best:
            if ranks not in values:
                raise UsageError(f"eval.keep_best {ranks}: {name} has {', '.join(values)}")
            best = self._state["best"]
            if step and (best is None or values[ranks] > best[1]):  # step 0 has no checkpoint
                self._state["best"] = [step, values[ranks]]
                self._keep()
        if step and self.guard and (error := self._hacked(step, found, texts)):
            self.stopped = error
            control.should_save = control.should_training_stop = True
        self._state["judged"] = self._state["judged"] or found.judged

    def _keep(self) -> None:
        best = self._state["best"]
        self.trainer.kept = f"checkpoint-{best[0]}" if best else None

    def _hacked(self, step: int, found: Scored, texts: list[str]) -> GuardStop | None:
        """An error once a rewarding judge's scores have risen since the first evaluation, and the other judge's have not.

        Gains are paired by question. The first has risen when its interval is above 0; the second has not when its
        interval holds 0 and lies below the first's.
        """
        first = self._state["judged"]
        if HOLDOUT not in found.judged or not first:
            return None
        gains = {name: [_minus(b, a) for a, b in zip(first[name], now)] for name, now in found.judged.items()}
        intervals = {name: mean(known) for name, gain in gains.items() if (known := [g for g in gain if g is not None])}
        other = intervals.pop(HOLDOUT, None)
        risen = [n for n, (_, low, _) in intervals.items() if other and low > 0 and other[1] <= 0 and other[2] < low]
        self._state["suspicions"] = self._state["suspicions"] + 1 if risen else 0
        if self._state["suspicions"] < SUSPICIONS or other is None:
            return None
        self._state["suspicions"] = 0  # who resumes the stopped run gets as many again
        name = risen[0]
        odds = [(_minus(a, b) or 0.0, i) for i, (a, b) in enumerate(zip(gains[name], gains[HOLDOUT]))]
        rise, still = ("{:.3f} ({:.3f} to {:.3f})".format(*interval) for interval in (intervals[name], other))
        return GuardStop(
            f"reward hacking: at step {step} the score of {name} on {len(texts)} held-out questions has risen by "
            f"{rise}, that of {HOLDOUT}, which training does not see, by {still}",
            details=[
                f"{self.exam.question(i)} -> {' '.join(texts[i].split())[:160]!r} "
                f"({name} {found.judged[name][i]}, {HOLDOUT} {found.judged[HOLDOUT][i]})"
                for _, i in sorted(odds, reverse=True)[:4]
            ],
            hint="another judge or a second one as reward, a larger train.beta, an earlier checkpoint; "
            "`train.guard: null` turns the guard off",
        )


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
