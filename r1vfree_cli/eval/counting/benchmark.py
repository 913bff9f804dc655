"""Counting as in R1-V's SuperCLEVR evaluation: JSON Lines of {image_path, question, ground_truth}, an exact number.

The number is the one in `<answer>`, else the only number in the reply (its reasoning left out), in digits or as a word
up to twenty. A reply that names several, a bound or none is unreadable.
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
_ONE = rf"(?:(?<![\w.,-])-?\d+(?:\.\d+)?(?!\.?\d|[\w%]|,\d)|\b(?:{'|'.join(_WORDS)})\b)"
_NUMBER = re.compile(_ONE)
# A bound, what is denied, a label ("figure 1") and the pronoun name no number.
_NO_NUMBER = re.compile(
    r"\b(?:no|any|every|some|which|this|that|each|another|the\s+other)\s+one\b"
    r"|(?:\b(?:at\s+(?:least|most)|(?:more|fewer|less|greater|other|rather)\s+than|not|up\s+to|over|under|above|below|minimum\s+of|"
    rf"maximum\s+of|(?<!the )(?<!this )(?:figure|fig\.|image|picture|option|question|step|table|scene))|n't|[<>≥≤~]=?)\s*(?:exactly\s+|be\s+)?{_ONE}"
    rf"|{_ONE}\s*(?:\+|or\s+(?:more|fewer|less|so)\b)"
)


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
    said = _NO_NUMBER.sub(" ", text.lower())
    found = {float(_WORDS.index(w)) if w in _WORDS else float(w) for w in _NUMBER.findall(said)}
    return found.pop() if len(found) == 1 else None


BENCHMARK = Counting()
