"""The report's part on HallusionBench: the table, its parts, paired comparisons, and the answers that changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..hallusion.score import METRICS, Item
from ..hallusion.stats import compare
from ..prompts import parse
from .collect import Eval, number, table
from .images import Album, Picture
from .plots import Figure, Series, dots
from .replies import Replies, figure_bytes, read_replies
from .view import NONE, Cell, Table, duration, flatten, p_value, percent, plain, signed

SHOWN_CHANGES = 8  # questions shown of those gained, and of those lost
MAX_CHARS = 3000  # of one reply
_NAMES = {"aAcc": "aAcc", "qAcc": "qAcc", "fAcc": "fAcc", "easy_aAcc": "easy", "hard_aAcc": "hard"}


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


@dataclass(frozen=True)
class How:
    """How an eval was made."""

    label: str
    table: Table
    pairs: list[tuple[str, str]]
    commands: list[tuple[str, str]]


@dataclass
class Benchmark:
    """All that the templates print about the benchmark."""

    lead: str
    tables: list[Table]
    figures: list[Figure]
    comparisons: list[Comparison]
    changed: list[Changes]
    evals: list[How]
    notices: list[str] = field(default_factory=list)


def view(evals: list[Eval], album: Album) -> Benchmark:
    """The benchmark's part for one or more comparable evals; the first is the reference of comparisons."""
    replies = {e.label: read_replies(e) for e in evals}
    comparisons = [c for e in evals[1:] if (c := _compare(evals[0], e, replies))]
    by_label = {e.label: e for e in evals}
    tables = [_main(evals, comparisons), *_pairs(comparisons), _by_category(evals), _by_subcategory(evals)]
    return Benchmark(
        lead=_lead(evals, comparisons),
        tables=[t for t in [*tables, _honest(evals, replies)] if t.rows],
        figures=_figures(evals),
        comparisons=comparisons,
        changed=[_changes(c, evals[0], by_label[c.label], replies, album) for c in comparisons],
        evals=[_how(e) for e in evals],
        notices=_notices(evals),
    )


def _lead(evals: list[Eval], comparisons: list[Comparison]) -> str:
    text = (
        f"Protocol {evals[0].protocol}, {plain(evals[0].scores.get('n_questions'))} questions. Percent; below it the "
        "count. easy and hard count (set, question) pairs, as the official leaderboard does in spite of their name."
    )
    if comparisons:
        c = comparisons[0].result
        text += (
            f" Differences are percentage points against {evals[0].label}, paired question by question: "
            f"{100 * c['level']:.0f} % intervals from {c['draws']:,} bootstrap draws over {c['sets']} sets within "
            "category and subcategory, p from swapping the two models set by set. p values are not corrected for the "
            "number of comparisons."
        )
    return text


def _notices(evals: list[Eval]) -> list[str]:
    found = []
    for e in evals:
        unjudged = number(e.scores.get("unjudged")) or 0
        if unjudged:
            found.append(
                f"{e.label}: {unjudged:.0f} questions are unjudged and count as not right; its scores are a lower bound."
            )
    for key, what in (
        ("judge", "judges"),
        ("judge_input", "judge inputs"),
        ("template_hash", "prompts"),
        ("max_pixels", "pixel limits"),
    ):
        values = {e.label: plain(_setting(e, key)) for e in evals}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{label}: {value}" for label, value in values.items())
            found.append(f"The evals have different {what} ({listed}): part of a difference may come from that.")
    return found


def _setting(e: Eval, key: str) -> Any:
    """A setting, wherever in eval.json it is: at the top, in settings, or in the model's contract."""
    for part in (e.settings, table(e.settings.get("settings")), table(e.settings.get("contract"))):
        if key in part:
            return part[key]
    return None


# --- tables ----------------------------------------------------------------------------------------------------


def _score(part: Any, metric: str) -> tuple[float | None, str]:
    """(percent, `right/total`) of a part of scores.json that has metrics and counts."""
    counts = table(table(part).get("counts")).get(metric)
    pair = [number(c) for c in counts] if isinstance(counts, list) else []
    said = f"{pair[0]:.0f}/{pair[1]:.0f}" if len(pair) == 2 and pair[0] is not None and pair[1] is not None else ""
    return number(table(table(part).get("metrics")).get(metric)), said


def _main(evals: list[Eval], comparisons: list[Comparison]) -> Table:
    values = {m: [_score(e.scores, m)[0] for e in evals] for m in METRICS}
    best = {m: max((v for v in found if v is not None), default=None) for m, found in values.items()}
    rows = []
    for e in evals:
        row = [Cell(e.label, _model(e))]
        paired: dict = next((c.result["metrics"] for c in comparisons if c.label == e.label), {})
        for m in METRICS:
            value, count = _score(e.scores, m)
            lines = [count, _difference(paired[m]) if m in paired else ""]
            is_best = len(evals) > 1 and value is not None and value == best[m]
            row.append(Cell(percent(value), "\n".join(line for line in lines if line), is_best))
        rows.append(row)
    quiet = []
    for key, name in (("always_yes", "always yes"), ("always_no", "always no")):
        part = table(evals[0].scores.get("baselines")).get(key)
        if part:
            quiet.append(len(rows))
            rows.append([Cell(name, "baseline"), *[Cell(percent(v), c) for v, c in (_score(part, m) for m in METRICS)]])
    return Table(
        "HallusionBench, %", ["model", *_NAMES.values()], rows, "Bold: best of its column." * (len(evals) > 1), quiet
    )


def _model(e: Eval) -> str:
    model = _setting(e, "model")
    name = model.get("name") or model.get("path") if isinstance(model, dict) else model
    return "" if not name or str(name) == e.label else str(name)


def _difference(paired: dict) -> str:
    if paired.get("difference") is None:
        return ""
    low, high = paired.get("interval") or (None, None)
    return f"{signed(paired['difference'])}\n[{signed(low)}, {signed(high)}]\n{p_value(paired.get('p_swap'))}"


def _pairs(comparisons: list[Comparison]) -> list[Table]:
    rows = []
    for c in comparisons:
        found = c.result["mcnemar"]
        p = p_value(found["p"]).removeprefix("p ").removeprefix("= ")
        rows.append([Cell(c.label), Cell(str(found["gained"])), Cell(str(found["lost"])), Cell(p)])
    note = "McNemar's exact test takes questions as independent, which those of one set are not: read the swap test's p first."
    reference = comparisons[0].reference if comparisons else ""
    return [
        Table(f"Questions gained and lost against {reference}", ["model", "gained", "lost", "McNemar p"], rows, note)
    ]


def _by_category(evals: list[Eval]) -> Table:
    rows = []
    for category, name in (("VD", "visual dependent"), ("VS", "visual supplement")):
        for e in evals:
            part = table(e.scores.get("by_category")).get(category)
            if part:
                cells = [Cell(percent(v), c) for v, c in (_score(part, m) for m in METRICS)]
                head = Cell(e.label, f"{category}, {name}") if len(evals) > 1 else Cell(category, name)
                rows.append([head, *cells])
    return Table("By category, %", ["category", *_NAMES.values()], rows)


def _subcategories(evals: list[Eval]) -> list[str]:
    return list(dict.fromkeys(name for e in evals for name in table(e.scores.get("by_subcategory"))))


def _by_subcategory(evals: list[Eval]) -> Table:
    rows = []
    for name in _subcategories(evals):
        found = [_score(table(e.scores.get("by_subcategory")).get(name), "aAcc") for e in evals]
        rows.append([Cell(name.replace("_", " ")), *[Cell(percent(v), c) for v, c in found]])
    return Table("aAcc by subcategory, %", ["subcategory", *[e.label for e in evals]], rows)


def _honest(evals: list[Eval], replies: dict[str, Replies]) -> Table:
    """What the score alone hides: bias, kinds of error, answers that could not be read."""

    def row(
        name: str, value: Callable[[Eval], Any], show: Callable[[Any], str] = plain, sub: str = ""
    ) -> list[Cell] | None:
        found = [value(e) for e in evals]
        return [Cell(name, sub), *[Cell(show(v)) for v in found]] if any(v is not None for v in found) else None

    def diagnostic(*keys: str) -> Callable[[Eval], Any]:
        def read(e: Eval) -> Any:
            value: Any = e.scores.get("diagnostics")
            for key in keys:
                value = table(value).get(key)
            return value

        return read

    rows = [
        row("unjudged questions", lambda e: e.scores.get("unjudged")),
        *[row(name, lambda e, key=key: replies[e.label].counts.get(key), sub=sub) for key, name, sub in _ANSWERS],
        row("judge agrees with the yes/no rule", lambda e: replies[e.label].agreement, lambda v: f"{percent(v)} %"),
        row("yes bias", diagnostic("yes_pct_diff"), lambda v: signed(v, 3), "yes_pct_diff; 0 is unbiased"),
        row("wrong answers that said yes", diagnostic("fp_ratio"), lambda v: _digits(v), "fp_ratio; 0.5 is unbiased"),
        row("language hallucination", diagnostic("language_hallucination")),
        row("visual illusion", diagnostic("visual_illusion")),
        row("mixed", diagnostic("mixed")),
        row("figures all right", diagnostic("consistency", "correct")),
        row("figures inconsistent", diagnostic("consistency", "inconsistent")),
        row("figures all wrong", diagnostic("consistency", "wrong")),
    ]
    note = "Counts of questions; consistency counts figures." if any(rows) else ""
    return Table("Behind the scores", ["", *[e.label for e in evals]], [r for r in rows if r], note)


_ANSWERS = (
    ("no_answer_tags", "replies without answer tags", ""),
    ("cut_at_limit", "replies cut at the length limit", ""),
    ("unreadable", "replies with no readable yes or no", ""),
)


def _digits(value: Any) -> str:
    found = number(value)
    return NONE if found is None else f"{found:.3f}"


def _figures(evals: list[Eval]) -> list[Figure]:
    metrics = [Series(e.label, [], [_score(e.scores, m)[0] for m in METRICS]) for e in evals]
    marks = []
    for key, name in (("always_yes", "always yes"), ("always_no", "always no")):
        part = table(evals[0].scores.get("baselines")).get(key)
        if part:
            marks.append(Series(name, [], [_score(part, m)[0] for m in METRICS]))
    figures = [dots("report-hallusionbench", "HallusionBench", list(_NAMES.values()), metrics, marks=marks)]
    names = _subcategories(evals)
    if names:
        parts = [
            Series(e.label, [], [_score(table(e.scores.get("by_subcategory")).get(n), "aAcc")[0] for n in names])
            for e in evals
        ]
        figures.append(dots("report-subcategories", "aAcc by subcategory", [n.replace("_", " ") for n in names], parts))
    return figures


# --- pairs of evals --------------------------------------------------------------------------------------------


def _compare(reference: Eval, other: Eval, replies: dict[str, Replies]) -> Comparison | None:
    a, b = replies[other.label].items, replies[reference.label].items
    for e, items in ((other, a), (reference, b)):
        if not items:
            other.notes.append(f"no paired comparison: the judged questions of {e.label} are not there")
            return None
    try:
        return Comparison(other.label, reference.label, compare(list(a.values()), list(b.values())))
    except ValueError as e:
        other.notes.append(f"no paired comparison with {reference.label}: {e}")
        return None


def _changes(c: Comparison, reference: Eval, other: Eval, replies: dict[str, Replies], album: Album) -> Changes:
    before, after = replies[reference.label], replies[other.label]
    parts = []
    for key, title in (("gained", "Gained"), ("lost", "Lost")):
        ids = c.result[key]
        # Evenly spaced over the benchmark, not its first pages only.
        n = min(SHOWN_CHANGES, len(ids))
        chosen = [ids[i * len(ids) // n] for i in range(n)]
        shown = [_changed(i, before, after, (reference, other), album) for i in chosen]
        parts.append(Part(f"{title}: {n} of {len(ids)} shown", shown))
    lead = f"{len(c.result['gained'])} questions gained and {len(c.result['lost'])} lost against {reference.label}."
    return Changes(f"{c.label} against {c.reference}", lead, parts)


def _changed(key: str, before: Replies, after: Replies, evals: tuple[Eval, Eval], album: Album) -> Changed:
    item = after.items[key]
    record = {**before.records.get(key, {}), **after.records.get(key, {})}
    said = [_said(e, found, key) for e, found in zip(evals, (before, after))]
    question = str(record.get("question") or key)
    image = figure_bytes(evals[1], record) or figure_bytes(evals[0], record)
    return Changed(
        where=f"{item.category} {item.subcategory}, set {item.set_id}, figure {item.figure_id}, question {item.question_id}",
        question=question,
        right="yes" if item.gt else "no",
        replies=said,
        picture=album.add(image, f"figure of the question: {question[:200]}"),
        has_figure=item.visual_input != 0,
    )


def _said(e: Eval, found: Replies, key: str) -> Said:
    reply = found.reply(key)
    answer = parse(reply).answer or reply.strip()[:160] or "(reply not kept)"
    return Said(e.label, _verdict(found.items[key]), answer, reply[:MAX_CHARS] or "(reply not kept)")


def _verdict(item: Item) -> str:
    return {0: "wrong", 1: "right", 2: "unclear"}.get(item.code if item.code is not None else -1, "unjudged")


# --- how it was made -------------------------------------------------------------------------------------------


def _how(e: Eval) -> How:
    import shlex

    commands: list[tuple[str, str]] = []
    for key in ("command", "argv"):
        value = e.settings.get(key)
        value = shlex.join(map(str, value)) if isinstance(value, list) else value
        if isinstance(value, str) and value and not commands:
            commands.append(("command", value))
    pairs = flatten({k: v for k, v in e.settings.items() if k not in ("command", "argv")})
    rows = [[Cell(k), Cell(duration(v) if k.endswith("_s") else v)] for k, v in pairs]
    return How(e.label, Table("Settings and versions", ["key", "value"], rows), pairs, commands)
