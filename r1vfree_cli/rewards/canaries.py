"""Canaries: questions whose right order of scores is known. A judge that gets them wrong must not train anything.

Asked before step 1 and every `every_steps`, past the cache:

- empty: what a reply without an answer gets (the floor) is not above `max_empty_score`, nor above right answers;
- template: answers that fit every question ("Yes" where it answers nothing, ":", "Thought process:", the instruction
  itself) score at most `max_empty_score` in the mean, each;
- right over wrong: right answers score above wrong ones in the mean, by more than `min_margin`;
- own image over another: right answers score above the same answers about another image, likewise.

Asked but not answered is a failure too. Right answers are the rows' `solution`, used for this alone. Rows without any
(label-free data), or with one answer to all, are replaced by drawn ones for the last two checks: discs of one colour,
asked for the colour.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ..config.rewards import Canaries
from ..core.errors import GuardStop, R1VError, UsageError
from ..core.prompts import DEFAULT, Prompt
from .feedback import Asked, Feedback
from .text import reference_answer
from .verify import normalised

TEMPLATES = ("Yes", ":", "Thought process:")  # and the instruction
FEWEST = 4  # right answers from the rows; with fewer, or one to all, discs are drawn
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 210), "yellow": (240, 210, 40)}


# To these, "yes" or "no" is an answer: "Yes" is no template there.
_YES_NO = re.compile(
    r"\s*(is|are|was|were|do|does|did|can|could|has|have|had|will|would|should)\b|.*\b(yes or no|yes/no|true or false)\b",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Check:
    """One line of the evidence: the mean of `n` answers to `of` questions. `ok` is None where no question fits."""

    name: str
    asked: str
    score: float | None
    wanted: str
    ok: bool | None
    n: int
    of: int

    @property
    def shown(self) -> dict[str, str]:
        """As people and canaries.jsonl have it."""
        return {
            "check": self.name,
            "asked": self.asked,
            "n": str(self.n) if self.n == self.of else f"{self.n} of {self.of}",
            "mean score": "" if self.score is None else f"{self.score:.3f}",
            "wanted": self.wanted,
            "verdict": {True: "ok", False: "FAILED", None: "not asked"}[self.ok],
        }


@dataclass
class CanaryReport:
    """What was asked and scored. `ok`: no check failed. `examples`: single scores behind the failed checks."""

    judge: str
    checks: list[Check] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def add(
        self, name: str, asked: str, scores: Sequence[float | None], wanted: str, passes: Callable[[float], bool]
    ) -> bool:
        """Judge the mean of the known `scores`; more unanswered than answered questions are a failure. Is it one?"""
        known = [s for s in scores if s is not None]
        mean = fmean(known) if known else None
        ok = None if not scores else mean is not None and 2 * len(known) >= len(scores) and passes(mean)
        self.checks.append(Check(name, asked, mean, wanted, ok, len(known), len(scores)))
        return ok is False

    def error(self, step: int | None = None) -> R1VError:
        """The refusal, with the evidence: before training a `UsageError`, at a step a `GuardStop`."""
        hint = f"take another judge; or set rewards.{self.judge}.canaries.max_empty_score and min_margin to its scale"
        lines = [
            "{verdict:9} {check}: {asked} (n={n}): {mean}, wanted {wanted}".format(
                **c.shown, mean=c.shown["mean score"] or "-"
            )
            for c in self.checks
        ]
        kind, when = (UsageError, "") if step is None else (GuardStop, f" at step {step}")
        return kind(f"the judge fails its canaries{when}", details=lines + self.examples, hint=hint)


def check(
    judge: Feedback, rows: Sequence[dict[str, Any]], cfg: Canaries, seed: int = 0, prompt: Prompt = DEFAULT
) -> CanaryReport:
    """Ask the judge the canaries about at most `cfg.samples` of `rows` that are trained on, the same for the same seed.

    Rows have `images` (PIL), `problem`, and `solution` where there is one; the instruction of `prompt` is one of the
    templates. Raises UsageError: the judge's configuration is wrong, or it gave no verdict on half of the questions.
    """
    rng = random.Random(seed)
    sample = [rows[i] for i in sorted(rng.sample(range(len(rows)), min(len(rows), cfg.samples)))]
    labelled: list[Asked] = [
        (row["images"], row["problem"], a) for row in sample if (a := reference_answer(row.get("solution")))
    ]
    where = "solutions"
    if len(labelled) < FEWEST or len({normalised(answer or "") for _, _, answer in labelled}) < 2:
        labelled, where = _discs(max(FEWEST, min(cfg.samples, 8))), "drawn discs"
    worse = {
        "right over wrong": _with_wrong_answers(labelled, rng),
        "own image over another": _about_other_images(labelled),
    }
    templates = {
        t: [(r["images"], r["problem"], t) for r in sample if fits(t, r["problem"])] for t in (*TEMPLATES, prompt.ask())
    }
    right, *others = _ask(judge, [labelled, *worse.values(), *templates.values()])
    scores_of = dict(zip((*worse, *templates), others, strict=True))

    report, low = CanaryReport(judge.__name__), (f"<= {cfg.max_empty_score:g}", lambda s: s <= cfg.max_empty_score)
    report.add("empty", "no answer", [judge.floor], *low)
    if known := [s for s in right if s is not None]:
        best = fmean(known)
        report.add("empty", "no answer", [judge.floor], f"<= {best:.3f}, right answers", lambda s: s <= best)
    for text, items in templates.items():
        if report.add("template", repr(text[:40]), scores_of[text], *low):
            report.examples += _highest(items, scores_of[text])
    for name, changed in worse.items():
        pairs = [(a, b) for a, b, i in zip(right, scores_of[name], changed, strict=True) if i is not None]
        gaps = [None if a is None or b is None else a - b for a, b in pairs]
        if report.add(name, f"difference, {where}", gaps, f"> {cfg.min_margin:g}", lambda s: s > cfg.min_margin):
            report.examples += _highest(changed, scores_of[name])
    return report


def _highest(items: Sequence[Asked | None], scores: Sequence[float | None]) -> list[str]:
    """The two that the judge liked best, as lines."""
    scored = [(s, i) for s, i in zip(scores, items, strict=True) if s is not None and i is not None]
    scored.sort(key=lambda pair: -pair[0])
    return [f"scored {s:.3f}: {str(i[2])[:80]!r} for {i[1][:100]!r}" for s, i in scored[:2]]


def _ask(judge: Feedback, parts: Sequence[Sequence[Asked | None]]) -> list[list[float | None]]:
    """The scores of each part; an item that is None is not asked."""
    items = [item for part in parts for item in part if item is not None]
    scores = judge.ask(items, use_cache=False)
    missing = sum(s is None for s in scores)
    if items and missing * 2 >= len(items):
        some = list(judge.failures)[-3:]
        raise UsageError(f"the judge gave no verdict on {missing} of {len(items)} canaries", details=some)
    found = iter(scores)
    return [[None if item is None else next(found) for item in part] for part in parts]


def fits(template: str, problem: str) -> bool:
    """Whether it answers nothing there."""
    return template != "Yes" or not _YES_NO.match(problem)


def _with_wrong_answers(labelled: Sequence[Asked], rng: random.Random) -> list[Asked | None]:
    """Each question with an answer that is right for another one: for the same question where there is one."""
    found: list[Asked | None] = []
    for images, problem, answer in labelled:
        others = [(p, a) for _, p, a in labelled if _differ(a, answer)]
        alike = [a for p, a in others if p == problem] or [a for p, a in others if p.split()[:2] == problem.split()[:2]]
        candidates = alike or [a for _, a in others]
        found.append((images, problem, rng.choice(candidates)) if candidates else None)
    return found


def _about_other_images(labelled: Sequence[Asked]) -> list[Asked | None]:
    """Each question and answer about the images of the next row that has another answer."""
    n = len(labelled)
    found: list[Asked | None] = []
    for i, (_, problem, answer) in enumerate(labelled):
        others = (labelled[(i + k) % n] for k in range(1, n))
        found.append(next(((images, problem, answer) for images, _, a in others if _differ(a, answer)), None))
    return found


def _differ(a: str | None, b: str | None) -> bool:
    return normalised(a or "") != normalised(b or "")


def _discs(n: int) -> list[Asked]:
    """Drawn questions that any judge with eyes can answer."""
    from PIL import Image, ImageDraw

    found: list[Asked] = []
    for i, (name, rgb) in enumerate(list(COLOURS.items()) * (n // len(COLOURS) + 1)):
        image = Image.new("RGB", (224, 224), (245, 245, 245))
        ImageDraw.Draw(image).ellipse((40 + 4 * i, 50, 150 + 4 * i, 160), fill=rgb)
        found.append(([image], "What colour is the disc?", name))
    return found[:n]
