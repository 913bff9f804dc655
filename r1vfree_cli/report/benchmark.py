"""The report's part on a benchmark: the table, its parts, paired comparisons, and the answers that changed."""

import re
import shlex
from collections.abc import Iterable
from typing import Any

from .changes import Comparison, changes, pair
from .gallery import Album
from .load import Eval
from .plots import Figure, Series, dots
from .replies import find_figures, read_replies
from .view import NONE, Cell, Table, duration, flatten, p_value, percent, plain, signed


def _metrics(evals: list[Eval]) -> dict[str, str]:
    """Metric -> its name in a table."""
    return {m: m.removesuffix("_aAcc").replace("_", " ") for m in evals[0].scores["metrics"]}


def _title(evals: list[Eval]) -> str:
    return plain(evals[0].scores.get("title") or "HallusionBench")


def view(evals: list[Eval], album: Album) -> dict[str, Any]:
    """What the templates print about one or more comparable evals; the first is the reference of comparisons."""
    replies = {e.label: read_replies(e) for e in evals}
    if len(evals) > 1:
        find_figures(evals[0], replies[evals[0].label])
    comparisons = [c for e in evals[1:] if (c := pair(evals[0], e, replies))]
    by_label = {e.label: e for e in evals}
    tables = [_main(evals, comparisons), _pairs(comparisons), _by_category(evals), _by_subcategory(evals)]
    return {
        "title": _title(evals),
        "lead": _lead(evals, comparisons),
        "tables": [t for t in [*tables, _honest(evals)] if t.rows],
        "figures": _figures(evals),
        "comparisons": comparisons,
        "changed": [changes(c, evals[0], by_label[c.label], replies, album) for c in comparisons],
        "evals": [_how(e) for e in evals],
        "notices": _notices(evals),
    }


def _lead(evals: list[Eval], comparisons: list[Comparison]) -> str:
    scores = evals[0].scores
    text = f"Protocol {scores['protocol']}, {plain(scores.get('n_questions'))} questions. Percent; below it the count."
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


def _score(part: dict | None, metric: str) -> tuple[float | None, str]:
    """(percent, `right/total`) of a part of scores.json, which an eval may lack."""
    found = part or {}
    return found.get("metrics", {}).get(metric), "/".join(map(str, found.get("counts", {}).get(metric, [])))


def _cells(part: dict | None, metrics: Iterable[str]) -> list[Cell]:
    return [Cell(percent(value), count) for value, count in (_score(part, m) for m in metrics)]


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
    baselines = [[Cell(name, "baseline"), *_cells(part, names)] for name, part in _baselines(evals[0]).items()]
    quiet = list(range(len(rows), len(rows) + len(baselines)))
    note = "Bold: best of its column." * (len(evals) > 1)
    return Table(f"{_title(evals)}, %", ["model", *names.values()], rows + baselines, note, quiet)


def _baselines(e: Eval) -> dict[str, dict]:
    """Name -> scores of a constant reply."""
    return {k.replace("_", " "): v for k, v in e.scores.get("baselines", {}).items()}


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


def _pairs(comparisons: list[Comparison]) -> Table:
    rows = []
    for c in comparisons:
        found = c.result["mcnemar"]
        p = p_value(found["p"]).removeprefix("p ").removeprefix("= ")
        rows.append([Cell(c.label), Cell(str(found["gained"])), Cell(str(found["lost"])), Cell(p)])
    note = "McNemar's exact test takes questions as independent, which those of one set are not: read the swap test's p first."
    title = "Questions gained and lost" + "".join(f" against {c.reference}" for c in comparisons[:1])
    return Table(title, ["model", "gained", "lost", "McNemar p"], rows, note)


def _by_category(evals: list[Eval]) -> Table:
    rows = []
    words = {"VD": "visual dependent", "VS": "visual supplement"}
    for key in ("by_category", "by_part"):
        for name in _parts(evals, key):
            more = words.get(name, "")
            for e in evals:
                whole = f"{name}, {more}" if more else name
                head = Cell(e.label, whole) if len(evals) > 1 else Cell(name, more)
                rows.append([head, *_cells(e.scores.get(key, {}).get(name), _metrics(evals))])
    return Table("By category, %", ["category", *_metrics(evals).values()], rows)


def _parts(evals: list[Eval], key: str) -> list[str]:
    """Names of the parts of the benchmark that any of the evals has."""
    return list(dict.fromkeys(name for e in evals for name in e.scores.get(key, {})))


def _by_subcategory(evals: list[Eval]) -> Table:
    rows = []
    for name in _parts(evals, "by_subcategory"):
        found = (_cells(e.scores.get("by_subcategory", {}).get(name), ["aAcc"]) for e in evals)
        rows.append([Cell(name.replace("_", " ")), *(cell for (cell,) in found)])
    return Table("aAcc by subcategory, %", ["subcategory", *[e.label for e in evals]], rows)


def _honest(evals: list[Eval]) -> Table:
    """What the score alone hides: answers that could not be read, bias, kinds of error, time and calls."""
    found = [
        ("unjudged questions", "", "unjudged", plain),
        ("questions without an answer", "counted as not right", "unanswered.n", plain),
        ("empty replies", "", "empty.n", plain),
        ("replies without a usable answer in tags", "", "answer_format.no_answer_tags", plain),
        ("replies cut at the length limit", "", "answer_format.cut_at_length", plain),
        ("replies with no readable answer", "", "answer_format.unreadable", plain),
        ("judge agrees with the rule", "", "judge_agreement", _agreement),
        ("yes bias", "yes_pct_diff; 0 is unbiased", "diagnostics.yes_pct_diff", lambda v: signed(v, 3)),
        ("wrong answers where no was right", "fp_ratio; 0.5 is unbiased", "diagnostics.fp_ratio", _thousandths),
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
        values = [_at(e.scores, place) for e in evals]
        if any(v is not None for v in values):
            rows.append([Cell(name, sub), *[Cell(show(v)) for v in values]])
    note = "Counts of questions, of figures in the lines that say so. n/a: not recorded."
    return Table("Behind the scores", ["", *[e.label for e in evals]], rows, note)


def _at(document: Any, place: str) -> Any:
    """What stands at `a.b` of a document, None where nothing does."""
    for key in place.split("."):
        document = (document or {}).get(key)
    return document


def _thousandths(value: Any) -> str:
    return percent(value, 3)


def _agreement(found: dict | None) -> str:
    return f"{100 * found['agree'] / found['n']:.1f} %" if found and found["n"] else NONE


def _figures(evals: list[Eval]) -> list[Figure]:
    names = _metrics(evals)
    metrics = []
    for e in evals:
        bounds = [e.scores.get("intervals", {}).get(m) for m in names]
        metrics.append(Series(e.label, [], [_score(e.scores, m)[0] for m in names], bounds))
    title = _title(evals) + " with 95 % intervals" * any(b for s in metrics for b in s.bounds or [])
    marks = [Series(name, [], [_score(p, m)[0] for m in names]) for name, p in _baselines(evals[0]).items()]
    name = "report-" + re.sub(r"\W+", "-", _title(evals).lower())
    figures = [dots(name, title, list(names.values()), metrics, marks=marks)]
    if parts := _parts(evals, "by_subcategory"):
        found = [e.scores.get("by_subcategory", {}) for e in evals]
        series = [Series(e.label, [], [_score(d.get(n), "aAcc")[0] for n in parts]) for e, d in zip(evals, found)]
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
