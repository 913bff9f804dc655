"""`judgements.jsonl`: what is known about each reply, by the rule or by a chat model; resumable after a kill."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from ..core.files import read_records, write_text
from .benchmark import Benchmark, content_key

Form = TypeVar("Form", bound=BaseModel)

UNANSWERED = "unanswered"  # stands for a judge where there is no reply to judge


class Judgement(BaseModel, strict=True):
    """What is known about one question's reply."""

    id: str
    key: str  # content of the call behind `code`; a judgement with another key is not reused
    code: int | None = Field(None, ge=0, le=2)
    same: int | None = Field(None, ge=0, le=1)
    same_key: str | None = None  # as `key`, of `same`
    reading: str | None = None
    judge: str = "rule"
    raw: str | None = None
    raw_same: str | None = None
    calls: int = 0  # these: what it has cost, so that a resumed evaluation knows what was spent before
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Outcome:
    """All judgements by question id. `failures`: kind -> {n, example} of the calls that failed for good now."""

    judgements: dict[str, Judgement] = field(default_factory=dict)
    failures: dict[str, dict] = field(default_factory=dict)
    unjudged: list[str] = field(default_factory=list)

    def judged(self, benchmark: Benchmark, questions: list[Any]) -> list[Any]:
        """The questions with their verdicts, as the benchmark scores them."""
        found = ((q, self.judgements.get(q.id)) for q in questions)
        return [benchmark.judged(q, j.code if j else None, j.same if j else None) for q, j in found]

    def cost(self) -> dict:
        """What `--json` and eval.json say about the judge's calls, those of earlier attempts included."""
        names = ("calls", "cache_hits", "prompt_tokens", "completion_tokens")
        failed = {"failed": {kind: f["n"] for kind, f in self.failures.items()}}
        return {n: sum(getattr(j, n) for j in self.judgements.values()) for n in names} | failed


def by_id(path: Path, form: type[Form], what: str) -> dict[str, Form]:
    """Question id -> its last record in a file that is appended to; {} when there is no file. A record that is not of
    the `form` is named and left out with those of its id before it: it is made again."""
    found: dict[str, Form] = {}
    for document, record in read_records(path, form.model_validate, what):
        id_ = document.get("id") if isinstance(document, dict) else None
        if record is not None:
            found[id_] = record  # type: ignore[index] # the form has one
        elif isinstance(id_, str):
            found.pop(id_, None)
    return found


def write_lines(path: Path, documents: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))


def read(path: Path) -> dict[str, Judgement]:
    return by_id(path, Judgement, "judgement")


def write(path: Path, outcome: Outcome, benchmark: Benchmark, questions: list[Any]) -> None:
    """Replace the file: a line a question, with whether it counts as right."""
    found = [
        (outcome.judgements.get(q.id), judged.ok) for q, judged in zip(questions, outcome.judged(benchmark, questions))
    ]
    write_lines(path, [vars(j) | {"ok": ok if j.code is not None else None} for j, ok in found if j])


def by_rule(
    benchmark: Benchmark, questions: list[Any], replies: dict[str, str | None], path: Path | None = None
) -> Outcome:
    """Judge by the benchmark's rule. Nothing to resume: it takes milliseconds. replies: question id -> the text to be
    judged, None where there is no answer. path: `judgements.jsonl`, rewritten."""
    outcome = Outcome({q.id: no_reply(benchmark, q) for q in questions})
    for q in questions:
        if (reply := replies[q.id]) is not None:
            key = content_key("rule", reply, q.content)
            outcome.judgements[q.id] = Judgement(id=q.id, key=key, code=benchmark.code(q, reply))
    benchmark.relate(questions, replies, outcome)
    if path is not None:
        write(path, outcome, benchmark, questions)
    return outcome


def no_reply(benchmark: Benchmark, question: Any) -> Judgement:
    """The verdict on a question that was never answered: not right."""
    return Judgement(id=question.id, key=UNANSWERED, code=benchmark.unanswered_code, judge=UNANSWERED)


def as_judged(benchmark: Benchmark, questions: list[Any], judgements: dict[str, Judgement]) -> Outcome:
    """The outcome of judgements that are there already; what lacks a part of its verdict is unjudged."""
    outcome = Outcome({q.id: judgements[q.id] for q in questions if q.id in judgements})
    open_ids = benchmark.unjudged(outcome.judged(benchmark, questions))
    unanswered = {j.id for j in outcome.judgements.values() if j.judge == UNANSWERED}
    outcome.unjudged = [id_ for id_ in open_ids if id_ not in unanswered]
    return outcome
