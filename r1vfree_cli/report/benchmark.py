"""The report's part on a benchmark: the table, its parts, paired comparisons, and the answers that changed."""

import re
import shlex
from collections.abc import Callable
from functools import partial
from typing import Any

from .changes import changes, find_figures, pair, read_replies
from .gallery import Album
from .load import Eval
from .plots import Figure, Series, dots
from .view import NONE, Cell, Table, duration, flatten, p_value, percent, plain, signed

_PARTS = {"VD": "VD, visual dependent", "VS": "VS, visual supplement"}


def view(evals: list[Eval], album: Album) -> dict[str, Any]:
    """What the templates print about one or more comparable evals; the first is the reference of comparisons."""
    reference, *others = evals
    for e in evals:
        read_replies(e)
    if others:
        find_figures(reference)
    compared = [(e, c) for e in others if (c := pair(reference, e))]
    comparisons = [c for _, c in compared]
    tables = [
        _main(evals, comparisons),
        _pairs(comparisons),
        _by_category(evals),
        _by_subcategory(evals),
        _honest(evals),
    ]
    return {
        "title": _title(evals),
        "lead": _lead(evals, comparisons),
        "tables": [t for t in tables if t.rows],
        "figures": _figures(evals),
        "comparisons": comparisons,
        "changed": [changes(c, reference, e, album) for e, c in compared],
        "evals": [_how(e) for e in evals],
        "notices": _notices(evals),
    }


def _metrics(evals: list[Eval]) -> dict[str, str]:
    """Metric -> its name in a table."""
    return {m: m.removesuffix("_aAcc").replace("_", " ") for m in evals[0].scores["metrics"]}


def _title(evals: list[Eval]) -> str:
    return plain(evals[0].scores.get("title") or "HallusionBench")


def _lead(evals: list[Eval], comparisons: list[dict]) -> str:
    scores = evals[0].scores
    text = f"Protocol {scores['protocol']}, {plain(scores.get('n_questions'))} questions. Percent; below it the count."
    if "hard_aAcc" in _metrics(evals):
        text += " easy and hard count (set, question) pairs, as the official leaderboard does in spite of their name."
    for c in comparisons[:1]:
        text += (
            f" Differences are percentage points against {evals[0].label}, paired question by question: "
            f"{100 * c['level']:.0f} % intervals from {c['draws']:,} bootstrap draws over {c['sets']} sets of questions that "
            "are not independent, p from swapping the two models set by set. p values are not corrected for the "
            "number of comparisons."
        )
    return text


def _notices(evals: list[Eval]) -> list[str]:
    found = [f"{e.label}: {w}" for e in evals for w in e.scores.get("warnings", [])]
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
    return e.scores.get("settings", {}).get(key)


def _judge(e: Eval) -> str:
    """The judge in words: what must be equal for two results to be judged alike."""
    judge = _setting(e, "judge") or {}
    shown = f"shown the {judge['judge_input']}" if judge.get("judge_input") else ""
    prompt = f"prompt {str(judge['prompt_sha256'])[:12]}" if judge.get("prompt_sha256") else ""
    return " ".join(str(part) for part in (judge.get("kind"), judge.get("model"), shown, prompt) if part)


def _value(part: dict | None, metric: str) -> float | None:
    """Percent in a part of scores.json, which an eval may lack."""
    return (part or {}).get("metrics", {}).get(metric)


def _cell(part: dict | None, metric: str, paired: dict | None = None, best: float | None = None) -> Cell:
    value, count = _value(part, metric), "/".join(map(str, (part or {}).get("counts", {}).get(metric, [])))
    if paired and paired["difference"] is not None:
        low, high = paired["interval"] or (None, None)
        count += f"\n{signed(paired['difference'])}\n[{signed(low)}, {signed(high)}]\n{p_value(paired['p_swap'])}"
    return Cell(percent(value), count.strip(), value is not None and value == best)


def _main(evals: list[Eval], comparisons: list[dict]) -> Table:
    names, baselines = _metrics(evals), _baselines(evals[0])
    best = {m: _best([_value(e.scores, m) for e in evals], [_value(b, m) for b in baselines.values()]) for m in names}
    paired = {c["label"]: c["metrics"] for c in comparisons}
    rows = []
    for e in evals:
        model = str(_setting(e, "model") or "")
        cells = [_cell(e.scores, m, paired.get(e.label, {}).get(m), best[m]) for m in names]
        rows.append([Cell(e.label, "" if model == e.label else model), *cells])
    rows += [[Cell(name, "baseline"), *(_cell(part, m) for m in names)] for name, part in baselines.items()]
    note = "Bold: best of its column." * (len(evals) > 1)
    return Table(f"{_title(evals)}, %", ["model", *names.values()], rows, note, list(range(len(evals), len(rows))))


def _baselines(e: Eval) -> dict[str, dict]:
    """Name -> scores of a constant reply."""
    return {k.replace("_", " "): v for k, v in e.scores.get("baselines", {}).items()}


def _best(values: list[float | None], constants: list[float | None]) -> float | None:
    """The best of several values; None in a tie, and where a constant reply is as good."""
    known = sorted((v for v in values if v is not None), reverse=True)
    least = max((v for v in constants if v is not None), default=-1.0)
    is_best = len(values) > 1 and known and known[0] > least and known.count(known[0]) == 1
    return known[0] if is_best else None


def _pairs(comparisons: list[dict]) -> Table:
    rows = []
    for c in comparisons:
        found = c["mcnemar"]
        p = p_value(found["p"]).removeprefix("p ").removeprefix("= ")
        rows.append([Cell(c["label"]), Cell(str(found["gained"])), Cell(str(found["lost"])), Cell(p)])
    note = "McNemar's exact test takes questions as independent, which those of one set are not: read the swap test's p first."
    title = "Questions gained and lost" + "".join(f" against {c['reference']}" for c in comparisons[:1])
    return Table(title, ["model", "gained", "lost", "McNemar p"], rows, note)


def _parts(evals: list[Eval], key: str) -> list[str]:
    """Names of the parts of the benchmark that any of the evals has."""
    return list(dict.fromkeys(name for e in evals for name in e.scores.get(key, {})))


def _by_category(evals: list[Eval]) -> Table:
    rows = []
    for key in ("by_category", "by_part"):
        for name in _parts(evals, key):
            full = _PARTS.get(name, name)
            for e in evals:
                head = Cell(e.label, full) if len(evals) > 1 else Cell(name, full.removeprefix(name).removeprefix(", "))
                rows.append([head, *(_cell(e.scores.get(key, {}).get(name), m) for m in _metrics(evals))])
    return Table("By category, %", ["category", *_metrics(evals).values()], rows)


def _by_subcategory(evals: list[Eval]) -> Table:
    rows = []
    for name in _parts(evals, "by_subcategory"):
        cells = [_cell(e.scores.get("by_subcategory", {}).get(name), "aAcc") for e in evals]
        rows.append([Cell(name.replace("_", " ")), *cells])
    return Table("aAcc by subcategory, %", ["subcategory", *[e.label for e in evals]], rows)


def _honest(evals: list[Eval]) -> Table:
    """What the score alone hides: answers that could not be read, bias, kinds of error, time and calls."""
    thousandths = partial(percent, digits=3)
    found: list[tuple[str, str, str, Callable]] = [
        ("unjudged questions", "", "unjudged", plain),
        ("questions without an answer", "counted as not right", "unanswered.n", plain),
        ("empty replies", "", "empty.n", plain),
        ("replies without a usable answer in tags", "", "answer_format.no_answer_tags", plain),
        ("replies cut at the length limit", "", "answer_format.cut_at_length", plain),
        ("replies with no readable answer", "", "answer_format.unreadable", plain),
        ("judge agrees with the rule", "", "judge_agreement", _agreement),
        ("yes bias", "yes_pct_diff; 0 is unbiased", "diagnostics.yes_pct_diff", partial(signed, digits=3)),
        ("wrong answers where no was right", "fp_ratio; 0.5 is unbiased", "diagnostics.fp_ratio", thousandths),
        ("language hallucination", "", "diagnostics.language_hallucination", plain),
        ("visual illusion", "", "diagnostics.visual_illusion", plain),
        ("mixed", "", "diagnostics.mixed", plain),
        ("figures all right", "", "diagnostics.consistency.correct", plain),
        ("figures inconsistent", "", "diagnostics.consistency.inconsistent", plain),
        ("figures all wrong", "", "diagnostics.consistency.wrong", plain),
        ("time to generate", "", "times.generate_s", duration),
        ("time to judge", "", "times.judge_s", duration),
        ("judge calls", "", "settings.judge.calls", plain),
        ("judge tokens read", "", "settings.judge.prompt_tokens", plain),
        ("judge tokens written", "", "settings.judge.completion_tokens", plain),
    ]
    rows = []
    for name, sub, place, show in found:
        values: list[Any] = [e.scores for e in evals]
        for key in place.split("."):
            values = [(v or {}).get(key) for v in values]
        if any(v is not None for v in values):
            rows.append([Cell(name, sub), *[Cell(show(v)) for v in values]])
    note = "Counts of questions, of figures in the lines that say so. n/a: not recorded."
    return Table("Behind the scores", ["", *[e.label for e in evals]], rows, note)


def _agreement(found: dict | None) -> str:
    return f"{100 * found['agree'] / found['n']:.1f} %" if found and found["n"] else NONE


def _figures(evals: list[Eval]) -> list[Figure]:
    names, metrics = _metrics(evals), []
    for e in evals:
        bounds = [e.scores.get("intervals", {}).get(m) for m in names]
        metrics.append(Series(e.label, [], [_value(e.scores, m) for m in names], bounds))
    title = _title(evals) + " with 95 % intervals" * any(b for s in metrics for b in s.bounds or [])
    marks = [Series(name, [], [_value(p, m) for m in names]) for name, p in _baselines(evals[0]).items()]
    name = "report-" + re.sub(r"\W+", "-", _title(evals).lower())
    figures = [dots(name, title, list(names.values()), metrics, marks)]
    if parts := _parts(evals, "by_subcategory"):
        found = [e.scores.get("by_subcategory", {}) for e in evals]
        series = [Series(e.label, [], [_value(d.get(n), "aAcc") for n in parts]) for e, d in zip(evals, found)]
        shown = [n.replace("_", " ") for n in parts]
        figures.append(dots("report-subcategories", "aAcc by subcategory", shown, series))
    return figures


def _how(e: Eval) -> dict[str, Any]:
    """How an eval was made: commands, settings, versions, run contract."""
    found: dict[str, list[str]] = {}  # command line -> stages
    for stage, argv in e.settings.get("commands", {}).items():
        # The first word is the path of the program on the machine where it ran.
        found.setdefault(shlex.join(["r1v", *argv[1:]]), []).append(stage)
    commands = [(", ".join(stages), line) for line, stages in found.items()]
    hidden = ("commands", "failures", "schema", "times", "warnings")
    settings = flatten({k: v for k, v in e.settings.items() if k not in hidden})
    return {"label": e.label, "settings": settings, "commands": commands}
