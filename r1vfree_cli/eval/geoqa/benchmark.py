"""GeoQA as in R1-V's evaluation: JSON Lines of {image_path, question, ground_truth}; math-verify compares answers.

The answer is what stands in `<answer>`, else in the last `\\boxed{}`; a reply with neither is unreadable. Units that a
reference leaves out (degrees, cm) are left out of the reply too.
"""

import re
from pathlib import Path

from ...core.prompts import parse
from ...rewards.verify import equivalent
from ..benchmark import Benchmark
from ..questions import Question

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_UNIT = re.compile(r"\s*(?:°|\^\s*\{?\\circ\}?|\\degree|degrees?|cm|mm|m|units?)\s*\.?$", re.IGNORECASE)


class GeoQA(Benchmark):
    name = "geoqa"
    title = "GeoQA"

    def question(self, record: dict, where: str, file: Path) -> Question:
        answer = str(record["ground_truth"]).strip()
        if not answer:
            raise ValueError("ground_truth is empty")
        id_ = str(record.get("question_id", where.rpartition(" ")[2]))
        return Question(id_, str(record["question"]), read_answer(answer) or answer, str(record["image_path"]))

    def judge(self, question: Question, reply: str) -> bool | None:
        answer = read_answer(reply)
        if answer is None:
            return None
        pairs = [(question.answer, answer), (_plain(question.answer), _plain(answer))]
        return any(equivalent(pairs))


def read_answer(reply: str) -> str | None:
    """The final answer: inside the last `<answer>`, of which a `\\boxed{}` counts alone; None when there is neither."""
    answer = parse(reply).answer
    boxed = _BOXED.findall(reply if answer is None else answer)
    return boxed[-1].strip() if boxed else answer


def _plain(text: str) -> str:
    return _UNIT.sub("", text.strip().strip("$").strip())


BENCHMARK = GeoQA()
