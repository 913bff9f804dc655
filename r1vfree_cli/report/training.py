"""The report's part on training: curves of all runs together; facts, rollouts and the contract of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..core.prompts import INSTRUCTION
from .gallery import Album, Picture, row_images
from .load import Run, clean, first_line, number, table
from .plots import Figure, Series, curve
from .view import NONE, Cell, Table, duration, flatten, percent, plain, signed

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


@dataclass
class Sample:
    """One completion of a group. `rewards` are name -> number, None where it was not scored."""

    completion: str
    answer: str | None
    rewards: list[tuple[str, float | None]]
    advantage: float | None
    cut: int = 0

    def score(self, value: float | None) -> str:
        return "not scored" if value is None else f"{value:.3g}"

    @property
    def tone(self) -> str:
        return "" if not self.advantage else "up" if self.advantage > 0 else "down"

    @property
    def shown_advantage(self) -> str:
        return signed(self.advantage, 2)


@dataclass
class Group:
    """The completions of one prompt at one step, best advantage first."""

    step: int
    id: str
    question: str
    samples: list[Sample]
    picture: Picture | None = None

    @property
    def spread(self) -> float:
        known = [s.advantage for s in self.samples if s.advantage is not None]
        return max(known) - min(known) if known else -1.0


@dataclass
class RunView:
    """All that the templates print of a run."""

    label: str
    path: str
    stage: str
    state: str
    facts: list[tuple[str, str]]
    tables: list[Table]
    groups: list[Group]
    commands: list[tuple[str, str]]
    contract: list[tuple[str, str]]
    versions: list[tuple[str, str]]
    notes: list[str]
    figures: list[Figure] = field(default_factory=list)


def curves(runs: list[Run]) -> list[Figure]:
    """One figure a metric, with every run that logged it."""
    logged = {key for run in runs for line in run.metrics for key in line}
    names = dict(_CURVES)
    for key in sorted(logged):
        found = _REWARD.fullmatch(key)
        if found and key not in names:
            names[key] = (f"Reward: {found[1]}", "mean")
    order = [
        "reward",
        *sorted(k for k in names if _REWARD.fullmatch(k)),
        *[k for k in names if not _REWARD.fullmatch(k)],
    ]
    figures: list[Figure] = []
    for key in dict.fromkeys(order):
        series = [
            Series(run.label, [x for x, _ in points], [y for _, y in points], style=i)
            for i, run in enumerate(runs)
            if (points := [(line["step"], line.get(key)) for line in run.metrics if _is_logged(run, line, key)])
        ]
        if any(y is not None for s in series for y in s.y):
            title, unit = names[key]
            # Numbered: two metrics may differ in signs alone that a file name cannot have.
            name = f"report-curve-{len(figures) + 1:02d}-" + re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-")[:60]
            share = unit.startswith("share")
            figures.append(curve(name, title, unit, series, legend=len(runs) > 1, share=share))
    return figures


def _is_logged(run: Run, line: dict, key: str) -> bool:
    # A step without the metric is a gap where its kind of line has it otherwise (a reward that nothing scored).
    return key in line or (
        "reward" in line and _REWARD.fullmatch(key) is not None and any(key in o for o in run.metrics)
    )


def view(run: Run, album: Album) -> RunView:
    """Everything about one run; pictures of its rollouts go into `album`."""
    notes = list(run.notes)
    groups = gallery(run, album, notes)
    return RunView(
        label=run.label,
        path=clean(str(run.path)),
        stage=run.stage,
        state=str(run.status.get("state") or "unknown"),
        facts=_facts(run),
        tables=[t for t in (_heldout(run), _cost(run)) if t],
        groups=groups,
        commands=_commands(run),
        contract=flatten({k: v for k, v in run.contract.items() if k != "versions"}),
        versions=flatten(table(run.contract.get("versions")) or table(run.launch.get("versions"))),
        notes=notes,
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    model, data, train = (table(run.recipe.get(k)) for k in ("model", "data", "train"))
    rewards = run.recipe.get("rewards")
    named = (
        [f"{r.get('name')} × {plain(r.get('weight', 1.0))}" for r in rewards if isinstance(r, dict)]
        if isinstance(rewards, list)
        else []
    )
    last = run.metrics[-1] if run.metrics else {}
    pairs: list[tuple[str, Any]] = [
        ("state", run.status.get("state")),
        ("reason", run.status.get("reason")),
        ("steps", _steps(run)),
        ("attempts", run.status.get("attempt")),
        ("model", model.get("name")),
        ("data", data.get("path") and f"{data['path']} ({data.get('split', 'train')})"),
        ("rewards", ", ".join(named)),
        ("group size", train.get("num_generations")),
        ("last reward", last.get("reward")),
    ]
    return [(name, plain(value)) for name, value in pairs if value not in (None, "", [])]


def _steps(run: Run) -> str | None:
    done = number(run.status.get("step", run.metrics[-1]["step"] if run.metrics else None))
    planned = number(run.status.get("max_steps"))
    return None if done is None else f"{done:g}" + (f" of {planned:g}" if planned and planned > 0 else "")


def _heldout(run: Run) -> Table | None:
    rows = []
    for key, name in (("heldout_accuracy", "accuracy"), ("heldout_format", "format rate")):
        for decoding, values in table(run.summary.get(key)).items():
            before, after = (_share(table(values).get(k)) for k in ("before", "after"))
            if before is None and after is None:
                continue
            change = signed(after - before) if before is not None and after is not None else NONE
            rows.append([Cell(f"{name}, {decoding}"), Cell(percent(before)), Cell(percent(after)), Cell(change)])
    if not rows:
        return None
    note = "Rows with reference answers that were never trained on. Change in percentage points."
    return Table("Held-out rows, %", ["measured", "before", "after", "change"], rows, note)


def _share(value: Any) -> float | None:
    """Percent, of a share in [0, 1]."""
    found = number(value)
    return None if found is None else 100 * found


def _cost(run: Run) -> Table | None:
    """Time and money: the summary's stages, and what the judge logged step by step."""
    rows: list[list[Cell]] = []
    seconds = {k: v for k, v in table(run.summary.get("seconds")).items() if number(v) is not None}
    rows += [[Cell(str(stage)), Cell(duration(value))] for stage, value in seconds.items()]
    steps = [line["step_time"] for line in run.metrics if "step_time" in line]
    if steps:
        rows.append([Cell("time a step, median"), Cell(duration(sorted(steps)[len(steps) // 2]))])
    totals = {"calls": "judge calls", "cache_hits": "judge cache hits", "tokens": "judge tokens", "cost": "judge cost"}
    for key, name in totals.items():
        logged = [line[f"judge/{key}"] for line in run.metrics if f"judge/{key}" in line]
        if logged:
            rows.append([Cell(name), Cell(plain(sum(logged)))])
    kinds = sorted({k for line in run.metrics for k in line if k.startswith("judge/failed/")})
    for kind in kinds:
        total = sum(line.get(kind, 0) for line in run.metrics)
        rows.append([Cell(f"judge calls failed: {kind.removeprefix('judge/failed/')}"), Cell(plain(total))])
    return Table("Time and cost", ["what", "value"], rows) if rows else None


def _commands(run: Run) -> list[tuple[str, str]]:
    """(what, command line) as recorded in launch.json; the environment is never shown."""
    import shlex

    found: list[tuple[str, str]] = []
    for name, key in (("typed", "command"), ("started", "argv"), ("started", "shell")):
        value = run.launch.get(key) or table(run.launch.get("plan")).get(key)
        if isinstance(value, list):
            value = shlex.join(str(v) for v in value)
        if isinstance(value, str) and value and value not in [c for _, c in found]:
            found.append((name, value))
    return found


# --- rollouts --------------------------------------------------------------------------------------------------


def gallery(run: Run, album: Album, notes: list[str]) -> list[Group]:
    """Groups from the first, the last and evenly spaced steps between: those whose advantages differ most."""
    if not run.rollouts:
        return []
    n = min(GALLERY_STEPS, len(run.rollouts))
    picked = sorted({round(i * (len(run.rollouts) - 1) / max(n - 1, 1)) for i in range(n)})
    groups: list[Group] = []
    for i in picked:
        groups += _groups(run, i, notes)
    images, note = row_images(table(run.recipe.get("data")), {g.id for g in groups}, seed=_seed(run))
    if note:
        notes.append(note)
    for group in groups:
        group.picture = album.add(images.get(group.id), f"image of the question: {group.question[:200]}")
    return groups


def _seed(run: Run) -> int:
    seed = number(table(run.recipe.get("train")).get("seed"))
    return 42 if seed is None else int(seed)


def _groups(run: Run, index: int, notes: list[str]) -> list[Group]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = run.rollouts[index]
    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as e:
        notes.append(f"rollouts/{file.name} cannot be read: {clean(first_line(e))}")
        return []
    by_group: dict[Any, list[dict]] = {}
    for row in rows:
        by_group.setdefault((row.get("step"), row.get("group"), row.get("id")), []).append(row)
    groups = []
    for (step, _, row_id), members in by_group.items():
        samples = sorted(
            (_sample(m) for m in members), key=lambda s: -(s.advantage if s.advantage is not None else -9e9)
        )
        groups.append(Group(int(number(step) or 0), clean(str(row_id)), question(members[0].get("prompt")), samples))
    return sorted(groups, key=lambda g: -g.spread)[:GALLERY_GROUPS]


def _sample(row: dict) -> Sample:
    text = clean(_text(row.get("completion")))
    rewards = [(clean(k.removeprefix("rewards/")), number(v)) for k, v in row.items() if k.startswith("rewards/")]
    answer = row.get("answer")
    return Sample(
        completion=text[:MAX_CHARS],
        answer=None if answer is None else clean(_text(answer)),
        rewards=rewards,
        advantage=number(row.get("advantage")),
        cut=max(0, len(text) - MAX_CHARS),
    )


def _text(value: Any) -> str:
    """The text of a string or of messages with text parts."""
    if isinstance(value, list):
        return "\n".join(t for t in (_text(v) for v in value) if t)
    if isinstance(value, dict):
        return _text(value.get("content") or value.get("text") or "")
    return "" if value is None else str(value)


def question(prompt: Any) -> str:
    """The question of a prompt: without the instruction, chat markup and image tokens."""
    text = _text(prompt).replace(INSTRUCTION, "")
    if "<|im_start|>user" in text:
        text = text.split("<|im_start|>user")[-1].split("<|im_end|>")[0]
    return clean(re.sub(r"<\|(?:vision_start|vision_end|image_pad|video_pad)\|>", "", text).strip())
