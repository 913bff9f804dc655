"""Counting as in R1-V's SuperCLEVR evaluation: JSON Lines of {image_path, question, ground_truth}, an exact number.

The number is the one in `<answer>`, else the only number in the reply (its reasoning left out), in digits or as a word
up to twenty. A reply that names several or none is unreadable.
"""

import re
from pathlib import Path

from ...core.prompts import parse
from ...core.thinking import without_thinking
from ..benchmark import Benchmark
from ..questions import Question

_WORDS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty",
)
_NUMBER = re.compile(rf"(?<![\w.,-])-?\d+(?:\.\d+)?(?!\.?\d|[\w%]|,\d)|\b(?:{'|'.join(_WORDS)})\b")


class Counting(Benchmark):
    name = "counting"
    title = "Counting"

    def question(self, record: dict, where: str, file: Path) -> Question:
        number = read_number(str(record["ground_truth"]))
        if number is None:
            raise ValueError(f"ground_truth is {record['ground_truth']!r}, wanted a number")
        id_ = str(record.get("question_id", where.rpartition(" ")[2]))
        return Question(id_, str(record["question"]), f"{number:g}", str(record["image_path"]))

    def judge(self, question: Question, reply: str) -> bool | None:
        number = read_number(reply)
        return None if number is None else number == float(question.answer)


def read_number(reply: str) -> float | None:
    """The one number that a reply names; None when there is none, or several different ones."""
    answer = parse(reply).answer
    text = without_thinking(reply) if answer is None else answer
    found = {float(_WORDS.index(w)) if w in _WORDS else float(w) for w in _NUMBER.findall(text.lower())}
    return found.pop() if len(found) == 1 else None


BENCHMARK = Counting()
