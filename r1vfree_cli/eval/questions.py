"""The questions of a benchmark, and where their figures are read from."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..core.errors import DataError

Reader = Callable[[], bytes]
_SHOWN = 5  # examples in an error


@dataclass(frozen=True)
class Question:
    """One question. `answer` is the right answer as text; `part` is a part of the benchmark that is scored alone too. A
    benchmark may use a class of its own with `id, text, filename, figure, content, asked` and `record()`."""

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

    @property
    def asked(self) -> tuple:
        """What a record of a reply to it must have too."""
        return " ".join(self.text.split()), self.answer, self.filename

    def record(self) -> dict:
        """How it is stored beside its reply."""
        found = {"question_id": self.id, "question": self.text, "answer": self.answer, "filename": self.filename}
        return found | ({"part": self.part} if self.part else {})


@dataclass(frozen=True)
class Job:
    """One question as it is asked: its conversation, its figure (PNG or JPEG bytes; None without one), the content key
    of the reply, and how the question is stored beside it."""

    id: str
    messages: list[dict]
    image: bytes | None
    key: str = ""
    record: dict = field(default_factory=dict)


@dataclass
class QuestionSet:
    """Questions in file order, and where the image of each that has one is read from."""

    questions: list[Any]
    readers: dict[str, Reader] = field(default_factory=dict)
    source: str = ""
    _figures: dict[Hashable, bytes] = field(default_factory=dict, repr=False)  # checked once, whoever asks

    def image(self, question: Any) -> bytes | None:
        """The figure as PNG or JPEG, RGB; None for a text-only question. Raises DataError: no usable image."""
        from ..data.drops import RowProblem
        from ..data.images import normalise_image  # PIL: scoring needs none

        key = question.figure
        if key is None:
            return None
        if key not in self._figures:
            try:
                self._figures[key] = normalise_image(self.readers[question.id]())
            except (RowProblem, OSError) as e:
                raise DataError(f"figure of {question.id} ({question.filename}): {e}") from None
        return self._figures[key]

    @property
    def sha256(self) -> str:
        """Content key of the question set, in any order."""
        return hashlib.sha256("\n".join(sorted(q.content for q in self.questions)).encode()).hexdigest()

    def only(self, chosen: Callable[[Any], bool], limit: int | None = None) -> Self:
        """The same set with some questions, at most `limit`."""
        some = [q for q in self.questions if chosen(q)][:limit]
        return type(self)(some, self.readers, self.source, self._figures)

    def need_figures(self, chosen: Callable[[Any], bool], hint: str) -> None:
        """Raises DataError, naming them, when figures of chosen questions are missing."""
        wanted = [q for q in self.questions if q.figure is not None and chosen(q)]
        missing = [f"{q.id}: {q.filename}" for q in wanted if q.id not in self.readers]
        if missing:
            what = f"the figures of {len(missing)} of {len(wanted)} image questions are missing"
            raise DataError(what, details=missing[:_SHOWN] + ["..."] * (len(missing) > _SHOWN), hint=hint)


def unique(questions: list[Any], where: str) -> list[Any]:
    """Raises DataError: no questions at all, or one twice."""
    twice = [id_ for id_, n in Counter(q.id for q in questions).items() if n > 1]
    if twice:
        raise DataError(f"{where}: {len(twice)} duplicate questions", details=twice[:_SHOWN])
    if not questions:
        raise DataError(f"{where}: no questions in it")
    return questions


def figure_file(root: Path, name: str | None) -> Path | None:
    """A figure, by its path below `root` or its bare name there: a question file does not choose what else is read."""
    for part in (name or "", Path(name or "").name):
        file = (root / part.lstrip("/")).resolve()
        if part and file.is_relative_to(root) and file.is_file():
            return file
    return None
