"""What a benchmark is: an object `BENCHMARK` in a room `eval/NAME/benchmark.py`, or in a user's file.

It knows what is asked, when a reply is right, what is counted, and which questions are not independent. Generation,
resuming, endpoints, statistics, gates, comparisons and the report are the same for all and stand outside the rooms.
"""

import hashlib
import importlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError, did_you_mean
from ..core.prompts import DEFAULT, Prompt, build_messages
from ..core.user_code import load_named
from .questions import Question, QuestionSet, figure_file, unique
from .records import found_in, named, read_records

WRONG, RIGHT, UNCLEAR = 0, 1, 2
Counts = dict[str, list[int]]  # metric -> [numerator, denominator]


@dataclass(frozen=True)
class Judged:
    """A question with its verdict: 1 right, 0 wrong, 2 no answer can be read, None unjudged."""

    question: Any
    code: int | None
    cluster: tuple

    @property
    def id(self) -> str:
        return self.question.id

    @property
    def key(self) -> tuple:
        """What must be equal for two results to be about the same question."""
        return self.id, self.question.answer

    @property
    def ok(self) -> bool:
        return self.code == RIGHT


class Benchmark:
    """Base of a benchmark: `question` or `questions`, and `judge`, have to be given; the rest has defaults."""

    name = title = ""
    metrics: tuple[str, ...] = ("accuracy",)
    protocols: tuple[str, ...] = ()  # ways to score that are never compared with each other; the first is the default
    chat = False  # whether `--judge chat` can be asked for
    unanswered_code = UNCLEAR  # of a question without an answer that is counted as not right
    readers: tuple[str, ...] = ()  # rules that `--reader` may ask for, of reading.READERS; the first is the default
    reader = "r1v"  # the one that was asked for

    def questions(self, source: str | None, images: Path | None, asked: Callable[[Any], bool]) -> QuestionSet:
        """The question set of a file of records, or of all .json and .jsonl files of a folder.

        images: the folder that `filename` is relative to; without it the folder of the question file.
        asked: their figures must be there. Raises UsageError: nothing there. DataError: damaged, or figures are missing.
        """
        name = self.title or self.name
        if source is None:
            raise UsageError(f"{name} needs its questions", hint="--questions FILE.jsonl --images FOLDER")
        path = Path(source)
        files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            hint = "--questions takes a JSON Lines file or a folder of them"
            raise UsageError(f"no questions at {source}", hint=hint)
        made = QuestionSet([], {}, source)
        root = (images or files[0].parent).resolve()
        for file in files:
            for where, record in read_records(file):
                try:
                    q = self.question(record, where, file)
                except (KeyError, TypeError, ValueError) as e:
                    raise DataError(f"{where}: no question of {name}: {e}", details=[found_in(record)]) from None
                made.questions.append(q)
                if figure := figure_file(root, q.filename):
                    made.readers[q.id] = figure.read_bytes
        first = unique(made.questions, source)[0].filename
        made.need_figures(asked, f"give the folder that {first} lies in with --images")
        return made

    def question(self, record: dict, where: str, file: Path) -> Any:
        """The question of a record in a question file. Raises KeyError, TypeError, ValueError: it is none."""
        raise NotImplementedError

    def wanted(self, question: Any, protocol: str) -> bool:
        """Whether the protocol asks this question."""
        return True

    def messages(self, question: Any, prompt: Prompt = DEFAULT) -> list[dict]:
        """The conversation, an `{"type": "image"}` where the figure goes. `prompt` is the one trained with."""
        return build_messages(question.text, int(question.figure is not None), prompt)

    def judge(self, question: Any, reply: str) -> bool | None:
        """Whether the reply is right; None when no answer can be read in it."""
        raise NotImplementedError

    def score(self, judged: Sequence[Any]) -> Counts:
        """Metric -> [numerator, denominator], a sum over clusters. An unreadable or unjudged reply is not right."""
        return {"accuracy": [sum(j.ok for j in judged), len(judged)]}

    def cluster(self, question: Any) -> tuple:
        """The unit of the statistics: questions of one cluster are not independent. All but the last is the stratum."""
        return (str(question.figure if question.figure is not None else question.id),)

    def constants(self, questions: Sequence[Any]) -> dict[str, str]:
        """Constant replies whose score stands beside every result, as {"always_yes": "yes"}."""
        answer, n = Counter(q.answer for q in questions).most_common(1)[0]
        return {f"always_{answer}": answer} if n > 1 else {}

    # --- what the framework reads and writes ---

    def code(self, question: Any, reply: str) -> int:
        """`judge` as a number."""
        right = self.judge(question, reply)
        return UNCLEAR if right is None else RIGHT if right else WRONG

    def judged(self, question: Any, code: int | None, same: int | None = None) -> Any:
        """The question with its verdict, as `score` takes it."""
        return Judged(question, code, self.cluster(question))

    def relate(self, questions: list[Any], replies: dict[str, str | None], found: dict[str, Any]) -> None:
        """After the rule: what the judgements `found` take from other questions."""

    def unjudged(self, judged: list[Any]) -> list[str]:
        """Ids of questions that lack a verdict, or a part of it."""
        return [j.id for j in judged if j.code is None]

    def verdict(self, judged: Any) -> dict:
        """How a verdict is stored in judged.json."""
        return {"code": judged.code}

    def from_record(self, record: dict, where: str) -> Any:
        """The question of a stored record. Raises DataError: a field is missing."""
        try:
            asked, text, answer = (str(record[k]) for k in ("question_id", "question", "answer"))
            return Question(asked, text, answer, record.get("filename"), record.get("part"))
        except (KeyError, TypeError):
            accepted = "accepted: question_id, question, answer, and filename where it has a figure"
            raise DataError(f"{where}: no question", details=[found_in(record), accepted]) from None

    def records(self, files: list[Path]) -> list[tuple[str, dict]]:
        """(where, record) of files of predictions or verdicts, in the form that `from_record` takes.
        Raises DataError: damaged, or in no form that is known."""
        return list(read_records(*files))

    def has_key(self, records: list[tuple[str, dict]]) -> bool:
        """Whether the records bring the right answers with them."""
        return True

    def filled(self, record: dict, known: dict[str, Any]) -> dict:
        """The record with what its question, where it is known, has and the record lacks."""
        return record

    def load_predictions(self, records: list[tuple[str, dict]], known: list[Any], source: str) -> dict[str, dict]:
        """Question id -> record with `model_prediction`.
        Raises DataError: a question twice, unknown, or with another text or answer; or no `model_prediction`."""
        by_id = {q.id: q for q in known}
        found: dict[str, dict] = {}
        wrong: dict[str, list[str]] = defaultdict(list)
        for where, raw in records:
            record = self.filled(raw, by_id)
            q = self.from_record(record, where)
            if not isinstance(record.get("model_prediction"), str):
                wanted = "accepted: model_prediction (or prediction), a text: the reply"
                raise DataError(f"{where}: no model_prediction", details=[found_in(raw), wanted])
            if q.id not in by_id:
                wrong["are not in the question set"].append(q.id)
            elif q.id in found:
                wrong["come twice"].append(q.id)
            elif q.asked != by_id[q.id].asked:
                wrong["have another text or answer key than the question set"].append(q.id)
            found[q.id] = record
        for problem, ids in wrong.items():
            hint = "were the predictions made for another question set?"
            raise DataError(f"{source}: {len(ids)} questions {problem}", details=ids[:5], hint=hint)
        return found

    def load_judged(self, files: list[Path], known: Iterable[Any] = ()) -> tuple[list[Any], list[dict]]:
        """judged.json -> judged questions and their records, in file order; what they lack is the known questions'.
        Raises DataError: not that, or a question twice."""
        by_id = {q.id: q for q in known}
        records = [(where, self.filled(record, by_id)) for where, record in self.records(files)]
        judged = [self.judged_record(record, where) for where, record in records]
        return unique(judged, named(files)), [record for _, record in records]

    def judged_record(self, record: dict, where: str) -> Any:
        """The judged question of a stored record. Raises DataError: no question, or no verdict that there is."""
        code = record.get("code")
        if code not in (None, WRONG, RIGHT, UNCLEAR) or isinstance(code, bool):
            raise DataError(f"{where}: code is {code!r}, allowed: 0, 1, 2, null")
        return self.judged(self.from_record(record, where), code)

    def describe(self, judged: Any) -> tuple[str, str, bool]:
        """For the report: where the question stands, its right answer, whether it has a figure."""
        q = judged.question
        return (f"{q.part}, " if q.part else "") + f"question {q.id}", q.answer, q.figure is not None

    def document(self, judged: list[Any], protocol: str) -> dict:
        """All scores: `protocol, n_questions, metrics` (percent), `counts`, `by_part`, `baselines`, `unjudged`."""

        parts: dict[str, list[Any]] = {}
        for j in judged:
            if j.question.part:
                parts.setdefault(j.question.part, []).append(j)
        always = {
            name: [replace(j, code=self.code(j.question, reply)) for j in judged]
            for name, reply in self.constants([j.question for j in judged]).items()
        }
        return {
            "protocol": protocol,
            "n_questions": len(judged),
            **scored(self.score(judged)),
            "by_part": {name: scored(self.score(some)) for name, some in parts.items()},
            "baselines": {name: scored(self.score(some)) for name, some in always.items()},
            "unjudged": sum(j.code is None for j in judged),
        }

    def warnings(self, doc: dict) -> list[str]:
        """What a reader of the scores must know."""
        return []


def percent(counts: Counts) -> dict[str, float | None]:
    """Metric -> percent, not rounded; None where there is nothing to count."""
    return {metric: 100 * right / total if total else None for metric, (right, total) in counts.items()}


def scored(counts: Counts) -> dict:
    return {"metrics": percent(counts), "counts": counts}


def shipped() -> list[str]:
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/benchmark.py"))


def find(name: str) -> Benchmark:
    """A room's benchmark, or a user's: `my_bench.py:BENCHMARK`, `package.module:BENCHMARK`.
    Raises UsageError: there is none, or it fails on import."""
    if ":" not in name:
        if name not in shipped():
            hint = did_you_mean(name, shipped(), "one of your own: my_bench.py:BENCHMARK")
            raise UsageError(f"no benchmark {name!r}; there are {', '.join(shipped())}", hint=hint)
        return importlib.import_module(f"{__package__}.{name}.benchmark").BENCHMARK
    benchmark = load_named(name, "the benchmark")
    if isinstance(benchmark, type):
        benchmark = benchmark()
    if not isinstance(benchmark, Benchmark):
        hint = "derive it from r1vfree_cli.eval.benchmark.Benchmark"
        raise UsageError(f"{name} is a {type(benchmark).__name__}", hint=hint)
    benchmark.name = benchmark.name or Path(name.rpartition(":")[0]).stem
    return benchmark


def content_key(*parts: Any) -> str:
    """sha256 (hex) of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
