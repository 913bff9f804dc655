"""All categories of bad input: hand-made cases, and how many of the made-up ones each gets."""

from __future__ import annotations

from pathlib import Path

from hypothesis.strategies import SearchStrategy

from . import data, evals, machine, recipes, runs, services
from .harness import Case, Tally

Category = tuple[list[Case], SearchStrategy[Case] | None, float]


def categories(pieces: Path, every: bool = False) -> dict[str, Category]:
    """Name -> (hand-made cases, strategy, share of the made-up cases); `pieces`: a folder for what cases are copies of.

    `every`: all machines, not a choice of them.
    """
    made = runs.make(pieces)
    return {
        "recipes": (recipes.HAND, recipes.cases, 0.2),
        "overrides": ([], recipes.overrides, 0.1),
        "data, images": (data.HAND, data.cases, 0.25),
        "predictions, judged files": (evals.HAND, evals.cases, 0.2),
        "judge replies": (runs.REPLIES, runs.replies, 0.1),
        "run dirs": (made.run_dirs, made.some_run_dirs, 0.08),
        "checkpoints": (made.checkpoints, made.some_checkpoints, 0.07),
        "replies on the wire": (services.WIRE, services.wire, 0.05),
        "requests to the server": (services.REQUESTS, services.requests, 0.05),
        "numbers in weights": (services.NUMBERS, services.numbers, 0.03),
        "records read back": (services.RECORDS, services.records, 0.06),
        "canaries": (services.CANARIES, services.canaries, 0.04),
        "locks": (services.LOCKS, services.locks, 0.04),
        "archives, templates": (services.NAMES, services.names, 0.05),
        "machines": (machine.cases(made.run_and_model, slow=every)[:: 1 if every else 7], None, 0),
    }


def run(
    tally: Tally, cases: int, pieces: Path, *, seed: int | None = None, only: str | None = None, every: bool = False
) -> None:
    """Run every hand-made case, and made-up ones until there are `cases` in all."""
    found = {name: c for name, c in categories(pieces, every).items() if only in (None, name)}
    made_up = max(0, cases - sum(len(hand) for hand, _, _ in found.values()))
    shares = sum(share for _, _, share in found.values())
    for name, (hand, strategy, share) in found.items():
        for case in hand:
            tally.check(name, case)
        examples = -(-made_up * share // shares) if share else 0
        if examples:
            tally.search(name, strategy, int(examples), seed=seed)
