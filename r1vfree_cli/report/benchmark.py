"""The report's part on a benchmark: the table, its parts, paired comparisons, and the answers that changed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .changes import Changes, Comparison, changes, pair
from .gallery import Album
from .load import Eval, number, table
from .plots import Figure, Series, dots
from .replies import find_figures, read_replies, stage_commands
from .view import NONE, Cell, Table, duration, flatten, p_value, percent, plain, signed


def _metrics(evals: list[Eval]) -> dict[str, str]:
    """Metric -> its name in a table."""
    return {m: m.removesuffix("_aAcc").replace("_", " ") for m in table(evals[0].scores.get("metrics"))}


def _title(evals: list[Eval]) -> str:
    return plain(evals[0].scores.get("title") or "HallusionBench")


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

    title: str
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
    if len(evals) > 1:
        find_figures(evals[0], replies[evals[0].label])
    comparisons = [c for e in evals[1:] if (c := pair(evals[0], e, replies))]
    by_label = {e.label: e for e in evals}
    tables = [_main(evals, comparisons), *_pairs(comparisons), _by_category(evals), _by_subcategory(evals)]
    return Benchmark(
        title=_title(evals),
        lead=_lead(evals, comparisons),
        tables=[t for t in [*tables, _honest(evals)] if t.rows],
        figures=_figures(evals),
        comparisons=comparisons,
        changed=[changes(c, evals[0], by_label[c.label], replies, album) for c in comparisons],
        evals=[_how(e) for e in evals],
        notices=_notices(evals),
    )


def _lead(evals: list[Eval], comparisons: list[Comparison]) -> str:
    text = (
        f"Protocol {evals[0].protocol}, {plain(evals[0].scores.get('n_questions'))} questions. Percent; below it the "
        "count."
    )
    if "hard_aAcc" in _metrics(evals):
        text += " easy and hard count (set, question) pairs, as the official leaderboard does in spite of their name."
    if comparisons:
        c = comparisons[0].result
        text += (
            f" Differences are percentage points against {evals[0].label}, paired question by question: "
            f"{100 * c['level']:.0f} % intervals from {c['draws']:,} bootstrap draws over {c['sets']} sets of questions that "
            "are not independent, p from swapping the two models set by set. p values are not corrected for the "
            "number of comparisons."
        )
    return text


def _notices(evals: list[Eval]) -> list[str]:
    found = []
    for e in evals:
        warnings = e.scores.get("warnings")
        found += [f"{e.label}: {plain(w)}" for w in warnings] if isinstance(warnings, list) else []
        unjudged = number(e.scores.get("unjudged")) or 0
        if unjudged and not any("unjudged" in line for line in found):
            found.append(
                f"{e.label}: {unjudged:.0f} questions are unjudged; those without a verdict count as not right."
            )
    for what, read in (
        ("judges", _judge),
        ("prompts", lambda e: str(_setting(e, "template_hash") or "")[:12]),
        ("pixel limits", lambda e: plain([v for k in ("min_pixels", "max_pixels") if (v := _setting(e, k))])),
    ):
        values = {e.label: read(e) for e in evals}
        if len(set(values.values()) - {"", NONE}) > 1:
            listed = ", ".join(f"{label}: {value or NONE}" for label, value in values.items())
            found.append(f"The evals have different {what} ({listed}): part of a difference may come from that.")
    return found


def _setting(e: Eval, key: str) -> Any:
    return table(e.scores.get("settings")).get(key)


def _judge(e: Eval) -> str:
    """The judge in words: what must be equal for two results to be judged alike."""
    judge = table(_setting(e, "judge"))
    shown = f"shown the {judge['judge_input']}" if judge.get("judge_input") else ""
    prompt = f"prompt {str(judge['prompt_sha256'])[:12]}" if judge.get("prompt_sha256") else ""
    return " ".join(str(part) for part in (judge.get("kind"), judge.get("model"), shown, prompt) if part)


# --- tables ----------------------------------------------------------------------------------------------------


def _score(part: Any, metric: str) -> tuple[float | None, str]:
    """(percent, `right/total`) of a part of scores.json that has metrics and counts."""
    counts = table(table(part).get("counts")).get(metric)
    pair = [number(c) for c in counts] if isinstance(counts, list) else []
    said = f"{pair[0]:.0f}/{pair[1]:.0f}" if len(pair) == 2 and pair[0] is not None and pair[1] is not None else ""
    return number(table(table(part).get("metrics")).get(metric)), said


def _main(evals: list[Eval], comparisons: list[Comparison]) -> Table:
    names = _metrics(evals)
    best = {m: _best([_score(e.scores, m)[0] for e in evals], _constants(evals[0], m)) for m in names}
    rows = []
    for e in evals:
        row = [Cell(e.label, _model(e))]
        paired: dict = next((c.result["metrics"] for c in comparisons if c.label == e.label), {})
        for m in names:
            value, count = _score(e.scores, m)
            lines = [count, _difference(paired[m]) if m in paired else ""]
            is_best = len(evals) > 1 and value is not None and value == best[m]
            row.append(Cell(percent(value), "\n".join(line for line in lines if line), is_best))
        rows.append(row)
    quiet = []
    for name, part in _baselines(evals[0]).items():
        if part:
            quiet.append(len(rows))
            rows.append([Cell(name, "baseline"), *[Cell(percent(v), c) for v, c in (_score(part, m) for m in names)]])
    return Table(
        f"{_title(evals)}, %", ["model", *names.values()], rows, "Bold: best of its column." * (len(evals) > 1), quiet
    )


def _baselines(e: Eval) -> dict[str, Any]:
    """Name -> scores of a constant reply."""
    return {str(k).replace("_", " "): v for k, v in table(e.scores.get("baselines")).items()}


def _constants(e: Eval, metric: str) -> list[float]:
    return [v for part in _baselines(e).values() if (v := _score(part, metric)[0]) is not None]


def _best(values: list[float | None], constants: list[float]) -> float | None:
    """The best value of a column; None in a tie, and where a constant reply is as good."""
    known = [v for v in values if v is not None]
    best = max(known, default=None)
    return None if best is None or known.count(best) > 1 or best <= max(constants, default=-1) else best


def _model(e: Eval) -> str:
    name = _setting(e, "model")
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
                cells = [Cell(percent(v), c) for v, c in (_score(part, m) for m in _metrics(evals))]
                head = Cell(e.label, f"{category}, {name}") if len(evals) > 1 else Cell(category, name)
                rows.append([head, *cells])
    for name in dict.fromkeys(name for e in evals for name in table(e.scores.get("by_part"))):
        for e in evals:
            part = table(e.scores.get("by_part")).get(name)
            cells = [Cell(percent(v), c) for v, c in (_score(part, m) for m in _metrics(evals))]
            rows.append([Cell(e.label, name) if len(evals) > 1 else Cell(name), *cells])
    return Table("By category, %", ["category", *_metrics(evals).values()], rows)


def _subcategories(evals: list[Eval]) -> list[str]:
    return list(dict.fromkeys(name for e in evals for name in table(e.scores.get("by_subcategory"))))


def _by_subcategory(evals: list[Eval]) -> Table:
    rows = []
    for name in _subcategories(evals):
        found = [_score(table(e.scores.get("by_subcategory")).get(name), "aAcc") for e in evals]
        rows.append([Cell(name.replace("_", " ")), *[Cell(percent(v), c) for v, c in found]])
    return Table("aAcc by subcategory, %", ["subcategory", *[e.label for e in evals]], rows)


def _honest(evals: list[Eval]) -> Table:
    """What the score alone hides: answers that could not be read, bias, kinds of error, time and calls."""
    counts = lambda v: plain(number(v))  # noqa: E731
    found = [
        ("unjudged questions", "", ("unjudged",), counts),
        ("questions without an answer", "counted as not right", ("unanswered", "n"), counts),
        ("empty replies", "", ("empty", "n"), counts),
        ("replies without a usable answer in tags", "", ("answer_format", "no_answer_tags"), counts),
        ("replies cut at the length limit", "", ("answer_format", "cut_at_length"), counts),
        ("replies with no readable answer", "", ("answer_format", "unreadable"), counts),
        ("judge agrees with the rule", "", ("judge_agreement",), _agreement),
        ("yes bias", "yes_pct_diff; 0 is unbiased", ("diagnostics", "yes_pct_diff"), lambda v: signed(v, 3)),
        ("wrong answers where no was right", "fp_ratio; 0.5 is unbiased", ("diagnostics", "fp_ratio"), _digits),
        ("language hallucination", "", ("diagnostics", "language_hallucination"), counts),
        ("visual illusion", "", ("diagnostics", "visual_illusion"), counts),
        ("mixed", "", ("diagnostics", "mixed"), counts),
        ("figures all right", "", ("diagnostics", "consistency", "correct"), counts),
        ("figures inconsistent", "", ("diagnostics", "consistency", "inconsistent"), counts),
        ("figures all wrong", "", ("diagnostics", "consistency", "wrong"), counts),
        ("time to generate", "", ("times", "generate_s"), duration),
        ("time to judge", "", ("times", "judge_s"), duration),
        ("judge calls", "", ("settings", "judge", "calls"), counts),
        ("judge tokens read", "", ("settings", "judge", "prompt_tokens"), counts),
        ("judge tokens written", "", ("settings", "judge", "completion_tokens"), counts),
    ]
    rows = []
    for name, sub, path, show in found:
        values = [_at(e.scores, path) for e in evals]
        if any(v is not None for v in values):
            rows.append([Cell(name, sub), *[Cell(show(v)) for v in values]])
    note = "Counts of questions, of figures in the lines that say so. n/a: not recorded." if rows else ""
    return Table("Behind the scores", ["", *[e.label for e in evals]], rows, note)


def _at(document: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        document = table(document).get(key)
    return document


def _agreement(value: Any) -> str:
    agree, n = (number(table(value).get(k)) for k in ("agree", "n"))
    return f"{100 * agree / n:.1f} %" if agree is not None and n else NONE


def _digits(value: Any) -> str:
    found = number(value)
    return NONE if found is None else f"{found:.3f}"


def _interval(e: Eval, metric: str) -> tuple[float, float] | None:
    bounds = table(e.scores.get("intervals")).get(metric)
    low, high = (number(b) for b in bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _figures(evals: list[Eval]) -> list[Figure]:
    names = _metrics(evals)
    metrics = [
        Series(e.label, [], [_score(e.scores, m)[0] for m in names], [_interval(e, m) for m in names]) for e in evals
    ]
    title = _title(evals) + " with 95 % intervals" * any(b for s in metrics for b in s.bounds or [])
    marks = []
    for name, part in _baselines(evals[0]).items():
        marks.append(Series(name, [], [_score(part, m)[0] for m in names]))
    figures = [
        dots("report-" + re.sub(r"\W+", "-", _title(evals).lower()), title, list(names.values()), metrics, marks=marks)
    ]
    parts_of = _subcategories(evals)
    if parts_of:
        parts = [
            Series(e.label, [], [_score(table(e.scores.get("by_subcategory")).get(n), "aAcc")[0] for n in parts_of])
            for e in evals
        ]
        figures.append(
            dots("report-subcategories", "aAcc by subcategory", [n.replace("_", " ") for n in parts_of], parts)
        )
    return figures


# --- how it was made -------------------------------------------------------------------------------------------


def _how(e: Eval) -> How:
    import shlex

    found: dict[str, list[str]] = {}  # command line -> stages
    for stage, argv in stage_commands(e).items():
        # The first word is the path of the program on the machine where it ran.
        line = shlex.join(["r1v", *[str(a) for a in argv[1:]]]) if isinstance(argv, list) and argv else str(argv)
        found.setdefault(line, []).append(stage)
    commands = [(", ".join(stages), line) for line, stages in found.items()]
    pairs = flatten({k: v for k, v in e.settings.items() if k not in ("commands", "schema", "times", "warnings")})
    rows = [[Cell(k), Cell(v)] for k, v in pairs]
    return How(e.label, Table("Settings, versions and run contract", ["key", "value"], rows), pairs, commands)
