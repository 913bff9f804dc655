"""Two evals question by question: the paired comparison, and the questions gained and lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError
from ..core.prompts import parse
from ..eval.stats import compare
from .gallery import Album, Picture
from .load import Eval, clean
from .replies import Replies, benchmark_of

SHOWN = 8  # questions shown of those gained, and of those lost
MAX_CHARS = 3000  # of one reply


@dataclass(frozen=True)
class Said:
    """One eval's reply to a question."""

    who: str
    verdict: str  # right, wrong, unclear, unjudged
    answer: str
    reply: str

    @property
    def tone(self) -> str:
        return {"right": "up", "wrong": "down"}.get(self.verdict, "")


@dataclass(frozen=True)
class Changed:
    """A question that one eval has right and the other has not."""

    where: str
    question: str
    right: str
    replies: list[Said]
    picture: Picture | None
    has_figure: bool


@dataclass(frozen=True)
class Part:
    title: str
    shown: list[Changed]


@dataclass(frozen=True)
class Changes:
    """Questions gained and lost between two evals."""

    title: str
    lead: str
    parts: list[Part]


@dataclass(frozen=True)
class Comparison:
    """`stats.compare` of an eval with the reference eval."""

    label: str
    reference: str
    result: dict

    def to_dict(self) -> dict:
        return {"label": self.label, "reference": self.reference, **self.result}


def pair(reference: Eval, other: Eval, replies: dict[str, Replies]) -> Comparison | None:
    """`other` minus `reference`; None, with a note, when they are not judged one by one.

    Raises:
        DataError: they are about other questions.
    """
    a, b = replies[other.label], replies[reference.label]
    for e, found in ((other, a), (reference, b)):
        if not found.items or found.unjudged:
            why = (
                f"{found.unjudged} questions of {e.label} are unjudged"
                if found.items
                else f"{e.label} has no judged.json"
            )
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


def changes(c: Comparison, reference: Eval, other: Eval, replies: dict[str, Replies], album: Album) -> Changes:
    """What to show of a comparison; figures go into `album`."""
    before, after = replies[reference.label], replies[other.label]
    parts = []
    for key, title in (("gained", "Gained"), ("lost", "Lost")):
        ids = c.result[key]
        # Evenly spaced over the benchmark, not its first pages only.
        n = min(SHOWN, len(ids))
        chosen = [ids[i * len(ids) // n] for i in range(n)]
        shown = [_changed(i, before, after, (reference, other), album) for i in chosen]
        parts.append(Part(f"{title}: {n} of {len(ids)} shown", shown))
    lead = f"{len(c.result['gained'])} questions gained and {len(c.result['lost'])} lost against {reference.label}."
    return Changes(f"{c.label} against {c.reference}", lead, parts)


def _changed(key: str, before: Replies, after: Replies, evals: tuple[Eval, Eval], album: Album) -> Changed:
    where, right, has_figure = benchmark_of(evals[1]).describe(after.items[key])
    said = [_said(e, found, key) for e, found in zip(evals, (before, after))]
    question = clean(str(after.records[key].get("question") or key))
    image = before.figure(key)
    return Changed(
        where=clean(where),
        question=question,
        right=clean(right),
        replies=said,
        picture=album.add(image, f"figure of the question: {question[:200]}"),
        has_figure=has_figure,
    )


def _said(e: Eval, found: Replies, key: str) -> Said:
    reply = found.reply(key)
    answer = parse(reply).answer or reply.strip()[:160] or "(reply not kept)"
    return Said(e.label, _verdict(found.items[key]), answer, reply[:MAX_CHARS] or "(reply not kept)")


def _verdict(judged: Any) -> str:
    return {0: "wrong", 1: "right", 2: "unclear"}.get(-1 if judged.code is None else judged.code, "unjudged")
