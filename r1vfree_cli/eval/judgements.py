"""`judgements.jsonl`: what is known about each reply, by the rule or by a chat model; resumable after a kill."""

import json
from collections.abc import Iterable
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


Found = dict[str, Judgement]  # by question id
Replies = dict[str, str | None]  # question id -> the text to be judged, None where there is no answer


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


def read(path: Path) -> Found:
    return by_id(path, Judgement, "judgement")


def judged(benchmark: Benchmark, questions: list[Any], found: Found) -> list[Any]:
    """The questions with their verdicts, as the benchmark scores them."""
    known = ((q, found.get(q.id)) for q in questions)
    return [benchmark.judged(q, j.code if j else None, j.same if j else None) for q, j in known]


def unjudged(benchmark: Benchmark, questions: list[Any], found: Found) -> list[str]:
    """Ids of the questions that have a reply and lack a verdict, or a part of it."""
    known = zip(questions, judged(benchmark, questions, found), strict=True)
    # Without those never answered: nor can a reply be compared with what is not there.
    return benchmark.unjudged([j for q, j in known if q.id not in found or found[q.id].judge != UNANSWERED])


def write(path: Path, found: Found, benchmark: Benchmark, questions: list[Any]) -> None:
    """Replace the file: a line a question, with whether it counts as right."""
    lines = [(found.get(q.id), j.ok) for q, j in zip(questions, judged(benchmark, questions, found))]
    write_lines(path, [vars(j) | {"ok": ok if j.code is not None else None} for j, ok in lines if j])


def by_rule(benchmark: Benchmark, questions: list[Any], replies: Replies, path: Path | None = None) -> Found:
    """Judge by the benchmark's rule, into `path` where it is given. Nothing to resume: it takes milliseconds."""
    found = {q.id: no_reply(benchmark, q) for q in questions}
    for q in questions:
        if (reply := replies[q.id]) is not None:
            key = content_key("rule", reply, q.content)
            found[q.id] = Judgement(id=q.id, key=key, code=benchmark.code(q, reply))
    benchmark.relate(questions, replies, found)
    if path is not None:
        write(path, found, benchmark, questions)
    return found


def no_reply(benchmark: Benchmark, question: Any) -> Judgement:
    """The verdict on a question that was never answered: not right."""
    return Judgement(id=question.id, key=UNANSWERED, code=benchmark.unanswered_code, judge=UNANSWERED)
