"""Evals question by question: what each model replied, the paired comparison, and the questions gained and lost."""

from pathlib import Path
from typing import Any

from ..core.errors import DataError, R1VError, counted, first_line
from ..core.prompts import parse
from ..eval.benchmark import Benchmark, find
from ..eval.result import same_questions
from ..eval.stats import compare
from .gallery import Album, add_picture
from .load import Eval, clean

SHOWN = 8  # questions shown of those gained, and of those lost
MAX_CHARS = 3000  # of one reply
_VERDICTS = {0: ("wrong", "down"), 1: ("right", "up"), 2: ("unclear", ""), None: ("unjudged", "")}
_NO_FIGURES = "figures are not on this machine, so changed answers have no images"


def benchmark_of(e: Eval) -> Benchmark:
    """The benchmark that an eval is of; evals of old releases are HallusionBench's.
    Raises UsageError: it is a user's, and its file is not here."""
    return find(str(e.scores.get("benchmark") or "hallusion"))


def read_replies(e: Eval) -> None:
    """Read `judged.json` into the eval; when it is not there or damaged, that is noted."""
    file = e.path / "judged.json"
    if not file.is_file():
        e.notes.append("judged.json is not there: no questions one by one")
        return
    try:
        items, records = benchmark_of(e).load_judged([file])
    except R1VError as error:
        what = "is damaged" if isinstance(error, DataError) else "cannot be read"
        e.notes.append(f"judged.json {what}: {clean(error.message)}")
        return
    e.items = {item.id: item for item in items}
    e.records = dict(zip(e.items, records))


def find_figures(e: Eval) -> None:
    """Look for the figures where the evaluation read them: nothing is downloaded. What is missing is noted."""
    asked = e.settings.get("asked") or {}
    options = e.settings.get("options") or {}  # of --predictions, which asked nothing
    source = asked.get("source") or options.get("questions")
    images = asked.get("images") or options.get("images")
    if not source or not Path(source).exists():
        e.notes.append(f"the questions and {_NO_FIGURES}")
        return
    beside = Path(source).parent / "hallusion_bench"
    place = Path(images) if images else beside if beside.is_dir() else None
    try:
        e.figures = benchmark_of(e).questions(source, place, lambda q: False).readers
    except R1VError as error:
        e.notes.append(f"the figures cannot be read: {clean(first_line(error))}")
        return
    if not e.figures:
        e.notes.append(f"the {_NO_FIGURES}")


def pair(reference: Eval, other: Eval) -> dict | None:
    """`label`, `reference` and `stats.compare` of `other` minus `reference`; None, with a note, when they are not judged
    one by one. Raises DataError: they are about other questions."""
    for e in (other, reference):
        unjudged = sum(item.code is None for item in e.items.values())
        if not e.items or unjudged:
            why = f"{counted(unjudged, 'question')} of {e.label} unjudged"
            why = why if e.items else f"{e.label} has no judged.json"
            other.notes.append(f"no paired comparison with {reference.label}: {why}")
            return None
    theirs, ours = list(other.items.values()), list(reference.items.values())
    same_questions(ours, theirs, other.path)
    return {"label": other.label, "reference": reference.label, **compare(theirs, ours, benchmark_of(other).score)}


def changes(c: dict, reference: Eval, other: Eval, album: Album) -> dict[str, Any]:
    """What the templates print of the questions gained and lost; figures go into `album`."""
    parts = []
    for key in ("gained", "lost"):
        ids = c[key]
        # Evenly spaced over the benchmark, not its first pages only.
        n = min(SHOWN, len(ids))
        shown = [_changed(ids[i * len(ids) // n], reference, other, album) for i in range(n)]
        parts.append({"title": f"{key.title()}: {n} of {len(ids)} shown", "shown": shown})
    lead = f"{counted(len(c['gained']), 'question')} gained and {len(c['lost'])} lost against {reference.label}."
    return {"title": f"{other.label} against {reference.label}", "lead": lead, "parts": parts}


def _changed(key: str, reference: Eval, other: Eval, album: Album) -> dict[str, Any]:
    where, right, has_figure = benchmark_of(other).describe(other.items[key])
    question = clean(str(other.records[key].get("question") or key))
    try:
        figure = reference.figures[key]() if key in reference.figures else None
    except (R1VError, OSError):  # it cannot be read any more
        figure = None
    return {
        "where": clean(where),
        "question": question,
        "right": clean(right),
        "replies": [_said(e, key) for e in (reference, other)],
        "picture": add_picture(album, figure, f"figure of the question: {question[:200]}"),
        "has_figure": has_figure,
    }


def _said(e: Eval, key: str) -> dict[str, str]:
    reply = clean(e.records[key].get("model_prediction") or "")
    answer = parse(reply).answer or reply.strip()[:160] or "(reply not kept)"
    verdict, tone = _VERDICTS[e.items[key].code]
    shown = reply[:MAX_CHARS] or "(reply not kept)"
    return {"who": e.label, "verdict": verdict, "tone": tone, "answer": answer, "reply": shown}
