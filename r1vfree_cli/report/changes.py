"""Two evals question by question: the paired comparison, and the questions gained and lost."""

from typing import Any, NamedTuple

from ..core.errors import DataError, counted
from ..core.prompts import parse
from ..eval.stats import compare
from .gallery import Album
from .load import Eval, clean
from .replies import Replies, benchmark_of

SHOWN = 8  # questions shown of those gained, and of those lost
MAX_CHARS = 3000  # of one reply
_VERDICTS = {0: ("wrong", "down"), 1: ("right", "up"), 2: ("unclear", ""), None: ("unjudged", "")}


class Comparison(NamedTuple):
    """`stats.compare` of an eval with the reference eval."""

    label: str
    reference: str
    result: dict


def pair(reference: Eval, other: Eval, replies: dict[str, Replies]) -> Comparison | None:
    """`other` minus `reference`; None, with a note, when they are not judged one by one.

    Raises:
        DataError: they are about other questions.
    """
    a, b = replies[other.label], replies[reference.label]
    for e, found in ((other, a), (reference, b)):
        if not found.items or found.unjudged:
            why = f"{counted(found.unjudged, 'question')} of {e.label} unjudged"
            why = why if found.items else f"{e.label} has no judged.json"
            other.notes.append(f"no paired comparison with {reference.label}: {why}")
            return None
    try:
        score = benchmark_of(other).score
        return Comparison(other.label, reference.label, compare(list(a.items.values()), list(b.items.values()), score))
    except ValueError:
        raise DataError(
            f"{other.path} is about another question set than {reference.path}: their scores cannot stand in one table",
            details=sorted(a.items.keys() ^ b.items.keys())[:5],
            hint="make one report for each",
        ) from None


def changes(c: Comparison, reference: Eval, other: Eval, replies: dict[str, Replies], album: Album) -> dict[str, Any]:
    """What the templates print of the questions gained and lost; figures go into `album`."""
    before, after = replies[reference.label], replies[other.label]
    parts = []
    for key, title in (("gained", "Gained"), ("lost", "Lost")):
        ids = c.result[key]
        # Evenly spaced over the benchmark, not its first pages only.
        n = min(SHOWN, len(ids))
        chosen = [ids[i * len(ids) // n] for i in range(n)]
        shown = [_changed(i, before, after, (reference, other), album) for i in chosen]
        parts.append({"title": f"{title}: {n} of {len(ids)} shown", "shown": shown})
    lead = f"{counted(len(c.result['gained']), 'question')} gained and {len(c.result['lost'])} lost against {reference.label}."
    return {"title": f"{c.label} against {c.reference}", "lead": lead, "parts": parts}


def _changed(key: str, before: Replies, after: Replies, evals: tuple[Eval, Eval], album: Album) -> dict[str, Any]:
    where, right, has_figure = benchmark_of(evals[1]).describe(after.items[key])
    question = clean(str(after.records[key].get("question") or key))
    return {
        "where": clean(where),
        "question": question,
        "right": clean(right),
        "replies": [_said(e, found, key) for e, found in zip(evals, (before, after))],
        "picture": album.add(before.figure(key), f"figure of the question: {question[:200]}"),
        "has_figure": has_figure,
    }


def _said(e: Eval, found: Replies, key: str) -> dict[str, str]:
    reply = found.reply(key)
    answer = parse(reply).answer or reply.strip()[:160] or "(reply not kept)"
    verdict, tone = _VERDICTS[found.items[key].code]
    shown = reply[:MAX_CHARS] or "(reply not kept)"
    return {"who": e.label, "verdict": verdict, "tone": tone, "answer": answer, "reply": shown}
