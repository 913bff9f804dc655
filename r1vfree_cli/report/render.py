"""`report()`: collect, view, render both templates, and only then write: a report is replaced atomically."""

import math
import re
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import DataError, UsageError
from ..core.files import write_bytes
from . import benchmark, training
from .gallery import Album
from .load import UNFINISHED, Eval, Run, collect
from .plots import MARK
from .view import signed

_HOLDS_0 = "not established: the interval holds 0"


class Raw(str):
    """Markdown that r1v made itself and that must not be escaped again."""


def report(dirs: list[Path], out: Path, *, overwrite: bool = False) -> dict:
    """Write report.md, report.html and their pictures about run dirs and eval dirs into `out`.

    Files of an earlier report, known by the mark in them, are replaced, and its pictures removed that are no longer
    needed; a file of somebody else is replaced only with `overwrite`. The first eval dir is what the others are compared
    with. Returns what `--json` prints: `out`, `files`, `runs`, `evals`, `comparisons`, `missing`.

    Raises UsageError: no dirs; evals of different protocols; a foreign file in the way. DataError: a dir that is
    neither, damaged main files, or evals of different questions.
    """
    runs, evals = collect(dirs)
    album: Album = {}
    try:
        view = _view(runs, evals, album)
    except (TypeError, AttributeError, KeyError, ValueError, LookupError) as e:  # values that r1v does not write
        raise DataError(f"the files of {', '.join(map(str, dirs))} hold other values than r1v writes: {e!r}") from e
    view["training_first"] = bool(runs) and Path(dirs[0]).resolve() == runs[0].path.resolve()
    files = {"report.html": _render("report.html.j2", view, autoescape=True)}
    # `finalize` sees every {{ value }}: escaping is what happens unless a filter made the value Raw.
    files["report.md"] = _render("report.md.j2", view, finalize=lambda v: v if isinstance(v, Raw) else markdown(v))
    files |= {f"{f.name}.png": f.png for f in view["all_figures"]} | album
    _write(Path(out), files, overwrite)
    return {
        "out": str(out),
        "files": sorted(files),
        "runs": [training.summary(r) for r in runs],
        "evals": [{"label": e.label, "path": str(e.path), "metrics": e.scores["metrics"]} for e in evals],
        "comparisons": view["comparisons"],
        "missing": [{"where": who, "what": note} for who, note in view["missing"]],
    }


def _view(runs: list[Run], evals: list[Eval], album: Album) -> dict[str, Any]:
    figures = training.curves(runs)
    run_views = [training.view(run, album) for run in runs]
    bench = benchmark.view(evals, album) if evals else {}
    comparisons = bench.get("comparisons", [])
    unfinished = [f"{r.label}: {note}" for r in runs for note in r.notes if note.startswith(UNFINISHED)]
    missing = [(e.label, note) for e in evals for note in e.notes]
    missing += [(r["label"], note) for r in run_views for note in r["notes"]]
    names = [e.label for e in evals] + [r.label for r in runs]
    return {
        "mark": MARK,
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "title": "Report: " + (", ".join(names) if len(names) < 4 else f"{len(runs)} runs, {len(evals)} evals"),
        "verdict": verdict(runs, comparisons),
        "notices": [*bench.get("notices", []), *unfinished],
        "benchmark": bench,
        "comparisons": comparisons,
        "figures": figures,
        "all_figures": figures + bench.get("figures", []),
        "runs": run_views,
        "gallery_lead": "From the first and the last kept steps and evenly spaced ones between, the groups whose "
        "advantages differ most: these teach most and are no average sample. Best advantage first.",
        "curves_lead": "Where a faint line lies behind a strong one, it is single steps, and the strong one their "
        "running mean. Axes of shares go from 0 to 1.",
        "missing": list(dict.fromkeys(missing)),
    }


def verdict(runs: list[Run], comparisons: list[dict]) -> list[str]:
    """What changed, by how much, and whether it is established: a sentence a run and a comparison."""
    said = []
    for run in runs:
        accuracy = run.summary.get("heldout_accuracy", {})
        for how, pair in accuracy.items():
            before, after = pair.get("before"), pair.get("after")
            if before is not None and after is not None:
                change = _change(before, after, run.summary.get("heldout_rows"))
                said.append(f"{run.label}: held-out accuracy, {how}, {change}")
        first, last = (run.summary.get("reward", {}).get(k) for k in ("first", "last"))
        if accuracy:
            continue
        if evaluated := _evaluated(run):
            said.append(evaluated)
        elif first is not None and last is not None:
            said.append(
                f"{run.label}: training reward {first:.3g} → {last:.3g}. It is the judge's own score: whether the "
                "answers are better, a benchmark tells."
            )
    for c in comparisons:
        name, paired = next(iter(c["metrics"].items()))
        if paired["difference"] is None:
            continue
        (low, high), p = paired["interval"], paired["p_swap"]
        word = "established"
        if low <= 0 <= high:
            word = _HOLDS_0
        elif p > 1 - c["level"]:  # few sets of questions: their interval is too narrow
            word = f"not established: the two swapped at random differ as much (p {p:.2g})"
        said.append(
            f"{c['label']} against {c['reference']}: {name} {signed(paired['difference'])} points, "
            f"{100 * c['level']:.0f} % interval {signed(low)} to {signed(high)}, {word}."
        )
    return said


def _evaluated(run: Run) -> str | None:
    """The evaluation while training, first and last: the metric of `keep_best`, else the first."""
    lines = [line for line in run.metrics if any(map(training.EVALUATION.fullmatch, line))]
    if len(lines) < 2:
        return None
    keys = [key for key in lines[0] if training.EVALUATION.fullmatch(key)]
    best = (run.recipe.get("eval") or {}).get("keep_best")
    key = next((k for k in keys if k.endswith(f"/{best}")), keys[0])
    wanted = [key, f"{key}/low", f"{key}/high"]
    if not lines[0].keys() & lines[-1].keys() >= set(wanted):
        return None
    first, last = ([line[k] for k in wanted] for line in (lines[0], lines[-1]))
    apart = last[1] > first[2] or last[2] < first[1]
    word = "established" if apart else "not established: the intervals overlap"
    shown = [f"{value:.3g} ({low:.3g} to {high:.3g})" for value, low, high in (first, last)]
    return f"{run.label}: {key.removeprefix('eval/')}, greedy, {' → '.join(shown)}, {word}."


def _change(before: float, after: float, n: float | None) -> str:
    """Shares of 1 as points, with a 95 % interval that takes both as independent: wider than a paired one."""
    text = f"{100 * before:.1f} % → {100 * after:.1f} %, {signed(100 * (after - before))} points"
    if not n:
        return f"{text}; the number of rows was not kept, so there is no interval."
    half = 1.96 * math.sqrt((before * (1 - before) + after * (1 - after)) / n)
    word = "established" if abs(after - before) > half else _HOLDS_0
    return f"{text} ± {100 * half:.1f} ({n:.0f} rows, 95 %), {word}."


def _render(template: str, view: dict, **options) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("r1vfree_cli.report", "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, **options)
    environment.filters |= {"fence": fence, "raw": Raw, "attr_text": attribute, "signed": signed}
    environment.filters |= {
        "scored": lambda value: "not scored" if value is None else f"{value:.3g}",
        "tone": lambda advantage: "" if not advantage else "up" if advantage > 0 else "down",
    }
    return environment.get_template(template).render(view).lstrip().encode()


def markdown(value: Any) -> str:
    """Text as Markdown that shows exactly it: no emphasis, no cell, list or heading starts, no HTML."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", text.strip())
    text = re.sub(r"^(\d+)([.)])(?=\s|$)|^()([-+=])(?=\s|-|=|$)", r"\1\3\\\2\4", text)
    return re.sub(r"\s*\n\s*", "<br>", text)


def fence(text: Any) -> Raw:
    """A fenced code block that no line in the text can end."""
    ticks = max(("`" + run for run in re.findall(r"``+", str(text))), key=len, default="```")
    return Raw(f"{ticks}text\n{text}\n{ticks}")


def attribute(text: Any) -> Raw:
    """A value for a double-quoted HTML attribute, on one line."""
    return Raw(re.sub(r"\s+", " ", escape(str(text))).replace("|", "&#124;"))


def _write(out: Path, files: dict[str, bytes], overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder", hint="choose another --out")
    foreign = [name for name in files if (out / name).exists() and not _is_ours(out / name)]
    if foreign and not overwrite:
        details = [f"in the way: {', '.join(sorted(foreign))}"]
        hint = "--out names another folder, --overwrite replaces them"
        raise UsageError(f"{out} holds files that r1v report did not write", details=details, hint=hint)
    # The pages last: they never name a picture that is not there yet.
    for name in sorted(files, key=lambda n: n.startswith("report.")):
        write_bytes(out / name, files[name])
    for old in [*out.glob("report-*.png"), *out.glob("report-*.jpg")]:
        if old.name not in files and _is_ours(old):
            old.unlink()


def _is_ours(path: Path) -> bool:
    """Whether the file carries the mark in its head, where every file of a report has it."""
    if not path.is_file():
        return False
    with open(path, "rb") as f:
        return MARK.encode() in f.read(1024)
