"""The questions of an eval dir one by one: what the model replied, how it was judged, which figure it saw."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import DataError, R1VError, first_line
from ..eval.benchmark import Benchmark, find
from .load import Eval, clean


@dataclass
class Replies:
    """By question id: the judged question, its record in judged.json, and what reads its figure."""

    items: dict[str, Any] = field(default_factory=dict)
    records: dict[str, dict] = field(default_factory=dict)
    figures: dict[str, Callable[[], bytes]] = field(default_factory=dict)

    def reply(self, key: str) -> str:
        return clean(self.records.get(key, {}).get("model_prediction") or "")

    def figure(self, key: str) -> bytes | None:
        """The encoded figure, None where it cannot be read (any more)."""
        try:
            return self.figures[key]() if key in self.figures else None
        except (R1VError, OSError):
            return None

    @property
    def unjudged(self) -> int:
        return sum(item.code is None for item in self.items.values())


def benchmark_of(e: Eval) -> Benchmark:
    """The benchmark that an eval is of; evals of old releases are HallusionBench's.

    Raises:
        UsageError: it is a user's, and its file is not here.
    """
    return find(str(e.scores.get("benchmark") or "hallusion"))


def read_replies(e: Eval) -> Replies:
    """Read `judged.json`; when it is not there or damaged, that is noted in `e.notes`."""
    found = Replies()
    file = e.path / "judged.json"
    if not file.is_file():
        e.notes.append("judged.json is not there: no questions one by one")
        return found
    try:
        items, records = benchmark_of(e).load_judged([file])
    except R1VError as error:
        what = "is damaged" if isinstance(error, DataError) else "cannot be read"
        e.notes.append(f"judged.json {what}: {clean(error.message)}")
        return found
    found.items = {item.id: item for item in items}
    found.records = {item.id: record for item, record in zip(items, records)}
    return found


def find_figures(e: Eval, found: Replies) -> None:
    """Look for the figures where the evaluation read them: nothing is downloaded. What is missing is noted."""
    asked = e.settings.get("asked") or {}
    options = e.settings.get("options") or {}  # of --predictions, which asked nothing
    source = asked.get("source") or options.get("questions")
    images = asked.get("images") or options.get("images")
    if not source or not Path(source).exists():
        e.notes.append("the questions and figures are not on this machine, so changed answers have no images")
        return
    beside = Path(source).parent / "hallusion_bench"
    place = Path(images) if images else beside if beside.is_dir() else None
    try:
        found.figures = dict(benchmark_of(e).questions(source, place, lambda q: False).readers)
    except R1VError as error:
        e.notes.append(f"the figures cannot be read: {clean(first_line(error))}")
        return
    if not found.figures:
        e.notes.append("the figures are not on this machine, so changed answers have no images")
