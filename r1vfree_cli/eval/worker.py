"""GRPO that answers a benchmark while it trains: above both rooms, their worker for recipes with `eval.benchmark`.

`python -m r1vfree_cli.eval.worker RUN_DIR` is one rank; the launcher starts it.
"""

import io
import random
from collections import defaultdict
from copy import copy
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.schema import GrpoRecipe
from ..core.errors import UsageError
from ..run.attempt import Attempt
from ..training import grpo
from ..training.exam import Exam, Scored
from ..training.worker import worker
from . import stats
from .benchmark import Benchmark, find, percent
from .judgements import Replies, by_rule, judged

DRAWS = 1000  # of the bootstrap


def benchmark_exam(recipe: GrpoRecipe) -> Exam:
    """The benchmark's image questions by its last protocol, which asks no judge model; at most `eval.limit` of them, in
    whole clusters, the same in every run.

    Raises UsageError, DataError: no such benchmark, or its questions or figures are not there.
    """
    settings = recipe.eval
    assert settings is not None
    benchmark = copy(find(settings.benchmark))
    protocol = (benchmark.protocols or ("",))[-1]

    def wanted(question: Any) -> bool:
        return question.figure is not None and benchmark.wanted(question, protocol)

    images = Path(settings.images) if settings.images else None
    found = benchmark.questions(settings.questions, images, wanted)
    questions = _some(benchmark, [q for q in found.questions if wanted(q)], settings.limit)
    if not questions:
        raise UsageError(f"eval.benchmark {settings.benchmark} has no question with an image")

    def get(i: int) -> tuple[list[dict], list[Any]]:
        figure = Image.open(io.BytesIO(found.image(questions[i]) or b"")).convert("RGB")
        return benchmark.messages(questions[i], recipe.policy_prompt), [figure]

    def score(texts: list[str]) -> Scored:
        replies: Replies = {q.id: text for q, text in zip(questions, texts, strict=True)}
        read = judged(benchmark, questions, by_rule(benchmark, questions, replies))
        values, intervals = percent(benchmark.score(read)), stats.intervals(read, benchmark.score, draws=DRAWS)
        return Scored({m: (v, *intervals[m]) for m, v in values.items() if v is not None and intervals[m]})

    return Exam(benchmark.name, len(questions), get, score, lambda i: questions[i].text)


def _some(benchmark: Benchmark, questions: list[Any], limit: int | None) -> list[Any]:
    """Whole clusters in an order of chance, as many as begin below the limit."""
    if limit is None or len(questions) <= limit:
        return questions
    clusters = defaultdict(list)
    for q in questions:
        clusters[benchmark.cluster(q)].append(q)
    order = sorted(clusters)
    random.Random(0).shuffle(order)
    chosen: list[Any] = []
    for key in order:
        if len(chosen) < limit:
            chosen += clusters[key]
    return chosen


def main(recipe: GrpoRecipe, attempt: Attempt) -> None:
    grpo.main(recipe, attempt, benchmark_exam(recipe))


if __name__ == "__main__":
    worker("grpo", main)
