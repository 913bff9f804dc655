"""POPE (Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models"): is there a ... in the image?

Its files are JSON Lines of {question_id, image, text, label}, one file a part: random, popular, adversarial (how the
absent objects were chosen). The same images are asked about in every part, so the image is the unit of statistics.

Yes is the positive class. A reply without a readable yes or no is not right, and neither a yes nor a no: it is counted
as unreadable, and where the label is yes it is a miss. The authors' script takes every reply without "no" for a yes.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from .. import reading
from ..benchmark import RIGHT, WRONG, Benchmark, Counts, Judged
from ..questions import Question

PARTS = ("random", "popular", "adversarial")


class Pope(Benchmark):
    name = "pope"
    title = "POPE"
    metrics = ("accuracy", "precision", "recall", "f1", "yes_rate")
    readers = ("r1v", "vlmevalkit")

    def question(self, record: dict, where: str, file: Path) -> Question:
        label = str(record["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"label is {record['label']!r}, allowed: yes, no")
        part = record.get("category") or record.get("part") or _part_of(file)
        id_ = str(record["question_id"])
        return Question(f"{part}-{id_}" if part else id_, str(record["text"]), label, str(record["image"]), part)

    def judge(self, question: Question, reply: str) -> bool | None:
        said = reading.READERS[self.reader](reply)
        return None if said is None else said == question.answer

    def score(self, judged: Sequence[Judged]) -> Counts:
        positive = [j for j in judged if j.question.answer == "yes"]
        hits = sum(j.code == RIGHT for j in positive)
        false_alarms = sum(j.code == WRONG for j in judged if j.question.answer == "no")
        missed = len(positive) - hits
        return {
            "accuracy": [sum(j.ok for j in judged), len(judged)],
            "precision": [hits, hits + false_alarms],
            "recall": [hits, len(positive)],
            "f1": [2 * hits, 2 * hits + false_alarms + missed],
            "yes_rate": [hits + false_alarms, len(judged)],
        }

    def constants(self, questions: Sequence[Question]) -> dict[str, str]:
        return {"always_yes": "yes", "always_no": "no"}


def _part_of(file: Path) -> str | None:
    """The part that a file's name says: coco_pope_random.json."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((part for part in PARTS if part in words), None)


BENCHMARK = Pope()
