"""All categories of bad input: hand-made cases, and how many of the made-up ones each gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hypothesis.strategies import SearchStrategy

from . import data, evals, recipes
from .harness import Case, Tally

# name -> (hand-made cases, strategy, share of the made-up cases)
Category = tuple[list[Case], SearchStrategy[Case], float]


def categories(pieces: Path) -> dict[str, Callable[[], Category]]:
    """What there is, made when it is asked for; `pieces` is a folder for models and run dirs that cases are copies of."""
    return {
        "recipes": lambda: (recipes.HAND, recipes.cases, 0.2),
        "overrides": lambda: ([], recipes.overrides, 0.1),
        "data": lambda: (data.HAND, data.cases, 0.3),
        "evals": lambda: (evals.HAND, evals.cases, 0.2),
    }


def run(tally: Tally, cases: int, pieces: Path, *, seed: int | None = None, only: str | None = None) -> None:
    """Run every hand-made case, and made-up ones until there are `cases` in all."""
    found = {name: make() for name, make in categories(pieces).items() if only in (None, name)}
    made_up = max(0, cases - sum(len(hand) for hand, _, _ in found.values()))
    shares = sum(share for _, _, share in found.values())
    for name, (hand, strategy, share) in found.items():
        for case in hand:
            tally.check(name, case)
        examples = -(-made_up * share // shares)
        if examples:
            tally.search(name, strategy, int(examples), seed=seed)
