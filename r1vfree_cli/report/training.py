"""The report's part on training: curves of all runs together; facts, rollouts and the contract of each."""

import math
import re
import shlex
import statistics
from typing import Any

from ..core.errors import DataError
from .gallery import Album, add_picture, row_images
from .load import Run
from .plots import Figure, Series, curve
from .rollouts import read_groups
from .view import Cell, Table, duration, flatten, percent, plain, signed

GALLERY_STEPS, GALLERY_GROUPS = 4, 2  # rollouts shown: of so many steps, so many groups each
MAX_CHARS = 6000  # of one completion

# metric -> title, unit. Rewards beside `format` are found by their names.
_CURVES = {
    "reward": ("Reward", "weighted sum"),
    "reward_std": ("Reward spread within groups", "standard deviation"),
    "rewards/format/mean": ("Format rate", "share of replies"),
    "completions/mean_length": ("Completion length", "tokens"),
    "kl": ("KL to the reference", "nats a token"),
    "entropy": ("Entropy of the policy", "nats a token"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "frac_reward_zero_std": ("Groups without spread", "share"),
    "completions/clipped_ratio": ("Replies cut at the limit", "share"),
    "loss": ("Loss", "nats a token"),
    "mean_token_accuracy": ("Token accuracy", "share"),
    "step_time": ("Time a step", "s"),
    "judge/latency_p50": ("Judge latency, median", "s"),
    "judge/latency_p95": ("Judge latency, 95th percentile", "s"),
}
_REWARD = re.compile(r"rewards/(.+)/mean")
EVALUATION = re.compile(r"eval/([^/]+)/(.+?)(?<!/low)(?<!/high)")  # its interval is under KEY/low and KEY/high


def curves(runs: list[Run]) -> list[Figure]:
    """One figure a metric, with every run that logged it."""
    names = dict(_CURVES)
    for key in sorted({key for run in runs for line in run.metrics for key in line}):
        if found := _REWARD.fullmatch(key):
            names.setdefault(key, (f"Reward: {found[1]}", "mean"))
        elif found := EVALUATION.fullmatch(key):
            unit = "percent" if found[1] != "heldout" else "share" if found[2] in ("accuracy", "format") else "mean"
            names[key] = (f"{found[1]}, greedy: {found[2]}", unit)
    rewards = sorted(key for key in names if _REWARD.fullmatch(key))
    figures: list[Figure] = []
    for key in dict.fromkeys(["reward", *rewards, *names]):
        series = [
            Series(run.label, [x["step"] for x in points], [x.get(key) for x in points], _bounds(points, key), style=i)
            for i, run in enumerate(runs)
            if (points := [line for line in run.metrics if _is_logged(run, line, key)])
        ]
        if any(y is not None for s in series for y in s.y):
            title, unit = names[key]
            # Numbered: two metrics may differ in signs alone that a file name cannot have.
            name = f"report-curve-{len(figures) + 1:02d}-" + re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-")[:60]
            figures.append(curve(name, title, unit, series, legend=len(runs) > 1, share=unit.startswith("share")))
    return figures


def _bounds(points: list[dict], key: str) -> list[tuple[float, float] | None]:
    ends = (f"{key}/low", f"{key}/high")
    return [(x[ends[0]], x[ends[1]]) if x.keys() >= set(ends) else None for x in points]


def _is_logged(run: Run, line: dict, key: str) -> bool:
    # A step without the metric is a gap where its kind of line has it otherwise (a reward that nothing scored).
    is_reward = "reward" in line and _REWARD.fullmatch(key) is not None
    return key in line or (is_reward and any(key in other for other in run.metrics))


def view(run: Run, album: Album) -> dict[str, Any]:
    """All that the templates print of a run; pictures of its rollouts go into `album`."""
    notes = list(run.notes)
    return {
        "label": run.label,
        "facts": _facts(run),
        "tables": [t for t in (_heldout(run), _cost(run)) if t],
        "groups": gallery(run, album, notes),
        "commands": _commands(run),
        "contract": flatten({k: v for k, v in run.contract.items() if k != "versions"}),
        "versions": flatten(run.contract.get("versions") or run.launch.get("versions") or {}),
        "notes": notes,
    }


def summary(run: Run) -> dict[str, Any]:
    """What `--json` prints of a run."""
    last = run.metrics[-1] if run.metrics else {}
    found = {"state": run.status.get("state"), "step": run.status.get("step", last.get("step"))}
    return {"label": run.label, "path": str(run.path), **found, "reward": last.get("reward")}


def _facts(run: Run) -> list[tuple[str, str]]:
    model, data, train = (run.recipe.get(k) or {} for k in ("model", "data", "train"))
    named = [f"{r['name']} × {plain(r.get('weight', 1.0))}" for r in run.recipe.get("rewards", [])]
    now, planned = summary(run), run.status.get("max_steps") or 0
    steps = None if now["step"] is None else f"{now['step']:g}" + (f" of {planned:g}" if planned > 0 else "")
    pairs: list[tuple[str, Any]] = [
        ("state", now["state"]),
        ("reason", run.status.get("reason")),
        ("steps", steps),
        ("attempts", run.status.get("attempt")),
        ("model", model.get("name")),
        ("data", data.get("path") and f"{data['path']} ({data.get('split', 'train')})"),
        ("rewards", ", ".join(named)),
        ("group size", train.get("num_generations")),
        ("last reward", now["reward"]),
    ]
    return [(name, plain(value)) for name, value in pairs if value not in (None, "", [])]


def _heldout(run: Run) -> Table | None:
    rows = []
    for key, name in (("heldout_accuracy", "accuracy"), ("heldout_format", "format rate")):
        for decoding, values in run.summary.get(key, {}).items():
            before, after = (None if (v := values.get(k)) is None else 100 * v for k in ("before", "after"))
            change = None if before is None or after is None else after - before
            rows.append([Cell(f"{name}, {decoding}"), *map(Cell, (percent(before), percent(after), signed(change)))])
    note = "Rows with reference answers that were never trained on. Change in percentage points."
    return Table("Held-out rows, %", ["measured", "before", "after", "change"], rows, note) if rows else None


def _cost(run: Run) -> Table | None:
    """Time and money: the summary's stages, and what the judge logged step by step."""
    rows = [[Cell(stage), Cell(duration(value))] for stage, value in run.summary.get("seconds", {}).items()]
    steps = [line["step_time"] for line in run.metrics if "step_time" in line]
    if steps:
        rows.append([Cell("time a step, median"), Cell(duration(statistics.median(steps)))])
    logged = [item for line in run.metrics for item in line.items() if item[0].startswith("judge/")]
    for key in ("calls", "cache_hits", "tokens", "cost"):
        # judge/LABEL/... where there are several: their sum
        if values := [value for k, value in logged if re.fullmatch(rf"judge/([^/]+/)?{key}", k)]:
            rows.append([Cell(f"judge {key.replace('_', ' ')}"), Cell(plain(sum(values)))])
    for key in sorted({k for k, _ in logged if "/failed/" in k}):
        what = key.removeprefix("judge/").replace("failed/", "")
        rows.append([Cell(f"judge calls failed: {what}"), Cell(plain(sum(value for k, value in logged if k == key)))])
    return Table("Time and cost", ["what", "value"], rows) if rows else None


def _commands(run: Run) -> list[tuple[str, str]]:
    """(what, command line) as recorded in launch.json; the environment is never shown."""
    found = [("typed", run.launch.get("command")), ("started", shlex.join(run.launch.get("argv", [])))]
    found += [("shows all rollouts", shlex.join(["r1v", "view", str(run.path)]))] * bool(run.rollouts)
    return [(name, command) for name, command in found if command]


def gallery(run: Run, album: Album, notes: list[str]) -> list[dict]:
    """Groups from the first, the last and evenly spaced steps between: those whose advantages differ most."""
    steps = list(run.rollouts)
    n = min(GALLERY_STEPS, len(steps))
    groups: list[dict] = []
    for i in sorted({round(i * (len(steps) - 1) / max(n - 1, 1)) for i in range(n)}):
        try:
            found = read_groups(run.rollouts[steps[i]], steps[i], run.recipe)
            groups += sorted(found, key=lambda g: -g["spread"])[:GALLERY_GROUPS]
        except DataError as e:
            notes.append(e.message)
    images, note = row_images(run.recipe, {g["id"] for g in groups})
    notes += [note] if note else []
    for group in groups:
        alt = f"image of the question: {group['question'][:200]}"
        group["picture"] = add_picture(album, images.get(group["id"]), alt)
        group["samples"].sort(key=lambda s: -math.inf if s["advantage"] is None else s["advantage"], reverse=True)
        for s in group["samples"]:
            s |= {"cut": max(0, len(s["completion"]) - MAX_CHARS), "completion": s["completion"][:MAX_CHARS]}
    return groups
