"""What a benchmark is: an object `BENCHMARK` in a room `eval/NAME/benchmark.py`, or in a user's file.

It knows what is asked, when a reply is right, what is counted, and which questions are not independent. Generation,
resuming, endpoints, statistics, gates, comparisons and the report are the same for all and stand outside the rooms.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError, nearest
from ..core.files import parse_json, read_json, read_jsonl
from ..core.prompts import DEFAULT, Prompt, build_messages

WRONG, RIGHT, UNCLEAR = 0, 1, 2
Reader = Callable[[], bytes]
Counts = dict[str, list[int]]  # metric -> [numerator, denominator]
_SHOWN = 5  # examples in an error


@dataclass(frozen=True)
class Question:
    """One question. `answer` is the right answer as text; `part` is a part of the benchmark that is scored alone too.

    A benchmark may use a class of its own with `id, text, filename, figure, content` and `record()`.
    """

    id: str
    text: str
    answer: str
    filename: str | None = None
    part: str | None = None

    @property
    def figure(self) -> Hashable | None:
        """What tells its figure from others; None for a question without one."""
        return self.filename

    @property
    def content(self) -> str:
        """All that decides what a reply is worth."""
        return f"{self.id}\0{self.text}\0{self.answer}\0{self.filename}"

    def record(self) -> dict:
        """How it is stored beside its reply."""
        found = {"question_id": self.id, "question": self.text, "answer": self.answer, "filename": self.filename}
        return found | ({"part": self.part} if self.part else {})


@dataclass
class QuestionSet:
    """Questions in file order, and where the image of each that has one is read from."""

    questions: list[Any]
    readers: dict[str, Reader] = field(default_factory=dict)
    source: str = ""
    _figures: dict[Hashable, bytes] = field(
        default_factory=dict, repr=False
    )  # checked once, asked for by each question

    def image(self, question: Any) -> bytes | None:
        """The figure as PNG or JPEG, RGB; None for a text-only question.

        Raises:
            DataError: the figure is missing or no usable image.
        """
        from ..data.rows import RowProblem, normalise_image

        key = question.figure
        if key is None:
            return None
        if key not in self._figures:
            try:
                self._figures[key] = normalise_image(self.readers[question.id]())
            except RowProblem as e:
                raise DataError(f"figure of {question.id} ({question.filename}): {e.reason}") from None
            except OSError as e:
                raise DataError(f"figure of {question.id}: {e}") from None
        return self._figures[key]

    @property
    def sha256(self) -> str:
        """Content key of the question set, in any order."""
        return hashlib.sha256("\n".join(sorted(q.content for q in self.questions)).encode()).hexdigest()

    def only(self, chosen: Callable[[Any], bool], limit: int | None = None) -> QuestionSet:
        """The same set with some questions, at most `limit`."""
        some = [q for q in self.questions if chosen(q)][:limit]
        return QuestionSet(some, self.readers, self.source, self._figures)

    def need_figures(self, chosen: Callable[[Any], bool], hint: str) -> None:
        """Raises DataError, naming them, when figures of chosen questions are missing."""
        wanted = [q for q in self.questions if q.figure is not None and chosen(q)]
        missing = [f"{q.id}: {q.filename}" for q in wanted if q.id not in self.readers]
        if missing:
            raise DataError(
                f"the figures of {len(missing)} of {len(wanted)} image questions are missing",
                details=[*missing[:_SHOWN], *(["..."] if len(missing) > _SHOWN else [])],
                hint=hint,
            )


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
    """Base of a benchmark: `questions` and `judge` have to be given, the rest has defaults.

    protocols: ways to score that are never compared with each other; the first is the default.
    """

    name = ""
    title = ""
    metrics: tuple[str, ...] = ("accuracy",)
    protocols: tuple[str, ...] = ()
    chat = False  # whether `--judge chat` can be asked for
    unanswered_code = UNCLEAR  # of a question without an answer that is counted as not right

    def questions(self, source: str | None, images: Path | None, asked: Callable[[Any], bool]) -> QuestionSet:
        """Read the questions; the figures of those that are `asked` must be there."""
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

    def relate(self, questions: list[Any], replies: dict[str, str | None], outcome: Any) -> None:
        """After the rule: what a verdict takes from other questions."""

    def unjudged(self, judged: list[Any]) -> list[str]:
        """Ids of questions that lack a verdict, or a part of it."""
        return [j.id for j in judged if j.code is None]

    def verdict(self, judged: Any) -> dict:
        """How a verdict is stored in judged.json."""
        return {"code": judged.code}

    def from_record(self, record: dict, where: str) -> Any:
        """The question of a stored record.

        Raises:
            DataError: a field is missing.
        """
        try:
            asked, text, answer = (str(record[k]) for k in ("question_id", "question", "answer"))
            return Question(asked, text, answer, record.get("filename"), record.get("part"))
        except (KeyError, TypeError):
            raise DataError(f"{where}: no question: question_id, question and answer are needed") from None

    def carried(self, path: Path) -> QuestionSet:
        """The question set that a file of predictions carries itself, without figures."""
        asked = [self.from_record(record, where) for where, record in read_records(path)]
        return QuestionSet(unique(asked, str(path)), {}, str(path))

    def load_predictions(self, path: Path, known: list[Any], needed: list[Any]) -> dict[str, dict]:
        """Question id -> record with `model_prediction`, for the needed questions.

        Raises:
            DataError: a question twice, unknown, missing or with another text; or no `model_prediction`.
        """
        by_id = {q.id: q for q in known}
        found: dict[str, dict] = {}
        wrong = []
        for where, record in read_records(path):
            q = self.from_record(record, where)
            if not isinstance(record.get("model_prediction"), str):
                raise DataError(f"{where}: no model_prediction")
            if q.id not in by_id or q.content != by_id[q.id].content:
                wrong.append(q.id)
            found[q.id] = record
        wrong += [q.id for q in needed if q.id not in found]
        if wrong:
            raise DataError(f"{path}: {len(wrong)} questions are unknown, different or missing", details=wrong[:_SHOWN])
        return {q.id: found[q.id] for q in needed}

    def check_chat(self, questions: list[Any]) -> None:
        """Raises UsageError when a chat judge cannot judge these."""

    def load_judged(self, path: Path) -> tuple[list[Any], list[dict]]:
        """judged.json -> judged questions and their records, in file order.

        Raises:
            DataError: not that, or a question twice.
        """
        records = list(read_records(path))
        questions = unique([self.from_record(r, where) for where, r in records], str(path))
        for where, r in records:
            if r.get("code") not in (None, WRONG, RIGHT, UNCLEAR) or isinstance(r.get("code"), bool):
                raise DataError(f"{where}: code is {r.get('code')!r}, allowed: 0, 1, 2, null")
        return [self.judged(q, r.get("code")) for q, (_, r) in zip(questions, records)], [r for _, r in records]

    def describe(self, judged: Any) -> tuple[str, str, bool]:
        """For the report: where the question stands, its right answer, whether it has a figure."""
        q = judged.question
        return (f"{q.part}, " if q.part else "") + f"question {q.id}", q.answer, q.figure is not None

    def document(self, judged: list[Any], protocol: str) -> dict:
        """All scores: `protocol, n_questions, metrics` (percent), `counts`, `by_part`, `baselines`, `unjudged`."""

        def part(some: list[Any]) -> dict:
            counts = self.score(some)
            return {"metrics": percent(counts), "counts": counts}

        names = dict.fromkeys(j.question.part for j in judged if j.question.part)
        constants = self.constants([j.question for j in judged])
        return {
            "protocol": protocol,
            "n_questions": len(judged),
            **part(judged),
            "by_part": {n: part([j for j in judged if j.question.part == n]) for n in names},
            "baselines": {
                name: part([replace(j, code=self.code(j.question, reply)) for j in judged])
                for name, reply in constants.items()
            },
            "unjudged": sum(j.code is None for j in judged),
        }

    def warnings(self, doc: dict) -> list[str]:
        """What a reader of the scores must know."""
        return []


def percent(counts: Counts) -> dict[str, float | None]:
    """Metric -> percent, not rounded; None where there is nothing to count."""
    return {metric: 100 * right / total if total else None for metric, (right, total) in counts.items()}


# --- reading files ---------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of a JSON list, or of JSON lines under any name.

    Raises:
        DataError: no file, not JSON, or no list of objects.
    """
    if path.suffix not in (".jsonl", ".ndjson") and not _is_lines(path):
        records = read_json(path)
        if not isinstance(records, list):
            raise DataError(f"{path}: expected a list of questions, found {type(records).__name__}")
        numbered: Iterable[tuple[int, Any]] = enumerate(records, 1)
        kind = "record"
    else:
        numbered, kind = read_jsonl(path), "line"
    for number, record in numbered:
        if not isinstance(record, dict):
            raise DataError(f"{path}, {kind} {number}: expected an object, found {type(record).__name__}")
        yield f"{path}, {kind} {number}", record


def _is_lines(path: Path) -> bool:
    """Whether the first of several lines is an object of its own."""
    try:
        with open(path, "rb") as f:
            return isinstance(parse_json(f.readline()), dict) and bool(f.readline().strip())
    except (OSError, ValueError, RecursionError):
        return False


def unique(questions: list[Any], where: str) -> list[Any]:
    """Raises DataError: no questions at all, or one twice."""
    twice = [id_ for id_, n in Counter(q.id for q in questions).items() if n > 1]
    if twice:
        raise DataError(f"{where}: {len(twice)} duplicate questions", details=twice[:_SHOWN])
    if not questions:
        raise DataError(f"{where}: no questions in it")
    return questions


def read_questions(
    name: str,
    source: str | None,
    images: Path | None,
    make: Callable[[dict, str, Path], Question],
    asked: Callable[[Question], bool] = lambda q: True,
) -> QuestionSet:
    """The question set of a file of records, or of all .json and .jsonl files of a folder.

    Args:
        images: the folder that `filename` is relative to; without it the folder of the question file.
        make: (record, where, its file) -> question; KeyError and TypeError mean that fields are missing.

    Raises:
        UsageError: nothing there. DataError: damaged content, or figures are missing.
    """
    if source is None:
        raise UsageError(f"{name} needs its questions", hint="--questions FILE.jsonl --images FOLDER")
    path = Path(source)
    files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UsageError(f"no questions at {source}", hint="--questions takes a JSON Lines file or a folder of them")
    questions: list[Question] = []
    for file in files:
        for where, record in read_records(file):
            try:
                questions.append(make(record, where, file))
            except (KeyError, TypeError, ValueError) as e:
                found = ", ".join(map(str, record)) or "nothing"
                raise DataError(f"{where}: no question of {name}: {e}", details=[f"found: {found}"]) from None
    root = (images or files[0].parent).resolve()
    readers: dict[str, Reader] = {}
    for q in unique(questions, source):
        figure = _inside(root, q.filename)
        if figure:
            readers[q.id] = figure.read_bytes
    found_set = QuestionSet(questions, readers, source)
    found_set.need_figures(asked, f"give the folder that {questions[0].filename} lies in with --images")
    return found_set


def _inside(root: Path, name: str | None) -> Path | None:
    """The figure, by its path below `root` or by its bare name there; a question file does not choose what else is read."""
    for part in (name or "", Path(name or "").name):
        file = (root / part.lstrip("/")).resolve()
        if part and file.is_relative_to(root) and file.is_file():
            return file
    return None


# --- which benchmark -------------------------------------------------------------------------------------------


def shipped() -> list[str]:
    """Names of the rooms."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/benchmark.py"))


def find(name: str) -> Benchmark:
    """A room's benchmark, or a user's: `my_bench.py:BENCHMARK`, `package.module:BENCHMARK`.

    Raises:
        UsageError: there is none, or it fails on import.
    """
    place, sign, attribute = name.rpartition(":")
    if not sign:
        if name not in shipped():
            near = nearest(name, shipped())
            raise UsageError(
                f"no benchmark {name!r}; there are {', '.join(shipped())}",
                hint=f"did you mean {near}?" if near else "one of your own: my_bench.py:BENCHMARK",
            )
        return importlib.import_module(f"{__package__}.{name}.benchmark").BENCHMARK
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"r1v_benchmark_{Path(place).stem}", place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        benchmark = getattr(module, attribute)
    except Exception as e:  # a user's file fails as it likes
        raise UsageError(f"cannot load the benchmark {name}: {type(e).__name__}: {e}") from e
    if isinstance(benchmark, type):
        benchmark = benchmark()
    if not isinstance(benchmark, Benchmark):
        raise UsageError(
            f"{name} is a {type(benchmark).__name__}", hint="derive it from r1vfree_cli.eval.benchmark.Benchmark"
        )
    benchmark.name = benchmark.name or Path(place).stem
    return benchmark


def content_key(*parts: Any) -> str:
    """sha256 (hex) of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
