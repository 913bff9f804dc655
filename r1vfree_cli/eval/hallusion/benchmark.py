"""HallusionBench as a benchmark: two protocols, a rule and a chat judge, counts of pairs and figures inside sets."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import reading
from ..benchmark import WRONG, Benchmark, Counts
from ..judgements import Found, Replies
from ..questions import QuestionSet
from ..records import read_records
from . import formats, questions, score
from .questions import Question
from .score import Item


class Hallusion(Benchmark):
    """Judged questions are `score.Item`s."""

    name = "hallusion"
    title = "HallusionBench"
    metrics = score.METRICS
    protocols = ("official", "vlmevalkit")
    chat = True
    readers = ("r1v", "vlmevalkit")
    unanswered_code = WRONG  # unclear would be right for a VS question without a figure

    def questions(self, source: str | None, images: Path | None, asked: Callable[[Any], bool]) -> QuestionSet:
        return questions.load(source, images, asked)

    def wanted(self, question: Question, protocol: str) -> bool:
        return protocol == "official" or question.needs_image

    def judge(self, question: Question, reply: str) -> bool | None:
        said = reading.READERS[self.reader](reply)
        return None if said is None else said == ("yes" if question.item.gt else "no")

    def relate(self, asked: list[Question], replies: Replies, found: Found) -> None:
        """`same` is equal readings."""
        readings = {q.id: reading.READERS[self.reader](replies[q.id] or "") for q in asked}
        first = {q.item.pair_key: readings[q.id] for q in asked if q.item.original}
        for q in asked:
            here, there = readings[q.id], first.get(q.item.pair_key)
            found[q.id].reading, found[q.id].same = here, int(here == there) if here and there else None

    def score(self, judged: Sequence[Item]) -> Counts:
        return score.counts(list(judged))

    def cluster(self, question: Question) -> tuple:
        return question.item.cluster

    def judged(self, question: Question, code: int | None, same: int | None = None) -> Item:
        return replace(question.item, code=code, same=same)

    def unjudged(self, judged: list[Item]) -> list[str]:
        codes = score.originals(judged)
        return [
            i.id
            for i in judged
            if i.code is None or (i.same is None and i.pair_key in codes and score.reads_same(i, codes[i.pair_key]))
        ]

    def verdict(self, judged: Item) -> dict:
        """In the official result format."""
        texts = (None if v is None else str(v) for v in (judged.code, judged.same))
        return dict(zip((score.CODE, score.SAME), texts))

    def from_record(self, record: dict, where: str) -> Question:
        return questions.from_record(record, where)

    def records(self, files: list[Path]) -> list[tuple[str, dict]]:
        return [(where, formats.official(record, where)) for where, record in read_records(*files)]

    def has_key(self, records: list[tuple[str, dict]]) -> bool:
        return any(record.get("gt_answer") not in (None, "") for _, record in records)

    def filled(self, record: dict, known: dict[str, Question]) -> dict:
        question = known.get(score.record_id(record))
        said = {k: v for k, v in record.items() if v is not None and (v != "" or k == "model_prediction")}
        return (question.record() if question else {}) | said

    def judged_record(self, record: dict, where: str) -> Item:
        return score.from_record(record, where)

    def describe(self, judged: Item) -> tuple[str, str, bool]:
        i = judged
        where = f"{i.category} {i.subcategory}, set {i.set_id}, figure {i.figure_id}, question {i.question_id}"
        return where, "yes" if i.gt else "no", i.visual_input != 0

    def document(self, judged: list[Item], protocol: str) -> dict:
        return score.score(judged, protocol)

    def warnings(self, doc: dict) -> list[str]:
        found = []
        official, n = doc["protocol"] == "official", doc["n_questions"]
        expected = score.OFFICIAL_COUNTS["aAcc"] if official else score.IMAGE_QUESTIONS
        totals = {metric: total for metric, (_, total) in doc["counts"].items()}
        if n != expected or (official and totals != score.OFFICIAL_COUNTS):
            known = f"the published benchmark has {expected}: not comparable with published figures"
            found.append(f"{n} questions, {known}")
        if official and (n := doc["diagnostics"]["unlabelled"]):
            missing = "`same`, or the verdict on figure 0 of the pair, is missing"
            found.append(f"{n} wrong questions cannot be labelled language, illusion or mixed: {missing}")
        return found


BENCHMARK = Hallusion()
