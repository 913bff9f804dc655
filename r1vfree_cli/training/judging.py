"""Rows for a judge that `r1v sft` trains (`role: judge`): answers, and whether they are right."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from ..core.prompts import DEFAULT, Prompt
from ..judges.local import LocalJudge
from ..rewards.canaries import TEMPLATES, fits
from ..rewards.verify import normalised

# Of the drawn wrong answers, what a policy finds that is paid by a judge which saw plausible answers alone:
TEMPLATE_SHARE = 0.15  # what fits every question and says nothing
STRAY_SHARE = 0.25  # answers to other questions: "red", asked for a shape
SPLICED_SHARE = 0.1  # two words in one: "blangle"


def wrong_answers(
    problems: Sequence[str], solutions: Sequence[str], seed: int, prompt: Prompt = DEFAULT, *, hacks: bool = False
) -> list[str | None]:
    """For each row another answer: of the same question where there is one, else of one that begins alike, else any.

    With `hacks`, half of them are what a reward hacker would find instead. None where all answers are the same.
    """
    rng = random.Random(f"wrong/{seed}")
    pools: list[dict[str, dict[str, str]]] = [defaultdict(dict) for _ in range(3)]
    keys = [(p, " ".join(p.split()[:2]), "") for p in problems]
    for key, solution in zip(keys, solutions, strict=True):
        for pool, k in zip(pools, key, strict=True):
            pool[k][normalised(solution)] = solution
    lists = [{k: list(found.items()) for k, found in pool.items()} for pool in pools]
    empty = (*TEMPLATES, prompt.ask())
    found: list[str | None] = []
    for problem, key, solution in zip(problems, keys, solutions, strict=True):
        said = [t for t in empty if fits(t, problem)]
        kind = rng.random() if hacks else 1.0
        if kind < TEMPLATE_SHARE:
            found.append(rng.choice(said))
            continue
        own = normalised(solution)
        usable = [pool[k] for pool, k in zip(lists, key, strict=True) if len(pool[k]) > 1]
        likely = _draw(rng, usable[0], own) if usable else None
        if likely and kind < TEMPLATE_SHARE + STRAY_SHARE:
            likely = _draw(rng, usable[-1], own)
        elif likely and kind < TEMPLATE_SHARE + STRAY_SHARE + SPLICED_SHARE:
            likely = _spliced(likely, solution, pools[2][""])
        found.append(likely)
    return found


def _spliced(one: str, other: str, known: dict[str, str]) -> str:
    """A word that begins as one and ends as the other; `one` where that is no new word."""
    word = one[: (len(one) + 1) // 2] + other[len(other) // 2 :]
    return one if " " in one + other or normalised(word) in known else word


def _draw(rng: random.Random, pool: list[tuple[str, str]], own: str) -> str:
    """Any answer of a pool of at least two but `own`."""
    while True:
        name, text = rng.choice(pool)
        if name != own:
            return text


def with_verdicts(rows, wrong, seed: int, prompt: Prompt):
    """`rows` with the columns `right` and `wrong`, either of which may be None; followed by those of `wrong`."""
    import datasets

    def columns(part, right: list, wrong: list):
        text = datasets.Value("string")
        return part.add_column("right", right, feature=text).add_column("wrong", wrong, feature=text)

    solutions = list(rows["solution"])
    if wrong is None:
        drawn = wrong_answers(list(rows["problem"]), solutions, seed, prompt, hacks=True)
        return columns(rows, solutions, drawn)
    parts = columns(rows, solutions, [None] * len(rows)), columns(wrong, [None] * len(wrong), list(wrong["solution"]))
    return datasets.concatenate_datasets(parts)


def area_under_roc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """How often a right answer scores above a wrong one; ties count half."""
    gap = torch.tensor(right)[:, None] - torch.tensor(wrong)[None]
    return ((gap > 0).double() + (gap == 0).double() / 2).mean().item()


def measure(judge: LocalJudge, rows, seed: int) -> dict[str, Any]:
    """The area under the ROC curve over held-out rows and a drawn wrong answer each; 0.5 is chance."""
    wrong = wrong_answers(list(rows["problem"]), list(rows["solution"]), seed)
    items: list[tuple[Any, str, str]] = []
    for row, answer in zip(rows, wrong, strict=True):
        if answer is not None:
            items += [(row["images"], row["problem"], a) for a in (row["solution"], answer)]
    scores = judge.score(items)
    pairs = [p for p in zip(scores[::2], scores[1::2], strict=True) if all(isinstance(s, float) for s in p)]
    return {"heldout_area": area_under_roc(*zip(*pairs)), "heldout_rows": len(pairs)} if pairs else {}
