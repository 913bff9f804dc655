"""What a run leaves in its run dir: every rollout as parquet, lines of figures, the summary. No torch here."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..core import console
from ..core.files import parse_json, read_json, read_jsonl, write_bytes, write_json, write_text
from ..core.prompts import parse
from ..run.run_dir import RunDir


@dataclass
class Rollout:
    """One completion of one prompt, as it was scored.

    `group`: number of the prompt within the step. `clipped`: cut at the limit, no end token. `rewards`: raw score by
    name, None where not scored. `reward`: weighted sum, None when the sample is excluded from its group's baseline (a
    required reward is missing). `advantage`: None when the step was stopped before it had one.
    """

    step: int
    group: int
    id: str
    prompt: str
    completion: str
    tokens: int
    clipped: bool
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None


class Recorder:
    """The one place of rollouts: those of all ranks, in the order of the global batch, since the last logged step.

    Every rank holds the same ones. `batch` is the generation batch that is being trained on.
    """

    def __init__(self) -> None:
        self.batch: list[Rollout] = []
        self._since: list[Rollout] = []
        self._written = 0  # how many of `_since` are in files

    def add(self, batch: list[Rollout], group_size: int) -> None:
        """Keep a generation batch whose groups of `group_size` follow each other, and number its groups."""
        step = batch[0].step
        first = 1 + max((r.group for r in self._since if r.step == step), default=-1)
        for i, rollout in enumerate(batch):
            rollout.group = first + i // group_size
        self.batch = batch
        self._since += batch

    def write(self, run_dir: RunDir) -> None:
        new = self._since[self._written :]
        for step in sorted({r.step for r in new}):
            write_rollouts(run_dir, step, [r for r in new if r.step == step])
        self._written = len(self._since)

    def take(self) -> list[Rollout]:
        taken, self._since, self._written = self._since, [], 0
        return taken

    def forget_after(self, step: int) -> None:
        """Leave out the rollouts of a step that was stopped half-way: a resumed run takes it again."""
        self._since = [r for r in self._since if r.step <= step]
        self._written = len(self._since)

    def state_dict(self) -> dict[str, Any]:
        """The rollouts that no logged step has counted yet."""
        return {"since": [asdict(r) for r in self._since]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since = [Rollout(**r) for r in state["since"]]
        self._written = len(self._since)


def spread_over_groups(rollouts: Sequence[Rollout], limit: int) -> list[Rollout]:
    """At most `limit` rollouts, one of each group in turn, so that a few show different questions."""
    turns = zip_longest(*groups_of(rollouts))
    return [rollout for turn in turns for rollout in turn if rollout is not None][:limit]


def groups_of(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts of each prompt, of one step or several."""
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault((rollout.step, rollout.group), []).append(rollout)
    return list(groups.values())


def rollout_file(run_dir: RunDir, step: int) -> Path:
    """Where the rollouts that trained step `step` (from 1) are."""
    return run_dir.rollouts / f"step-{step:08d}.parquet"


def write_rollouts(run_dir: RunDir, step: int, rollouts: Sequence[Rollout]) -> None:
    """Write all rollouts of one step atomically; null means not scored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {name: pa.string() for name in ("id", "prompt", "completion", "answer")}
    kinds = {"step": pa.int64(), "group": pa.int64(), **kinds, "tokens": pa.int64(), "clipped": pa.bool_()}
    kinds |= {f"rewards/{name}": pa.float64() for name in (rollouts[0].rewards if rollouts else ())}
    kinds |= {"reward": pa.float64(), "advantage": pa.float64()}
    rows = [
        vars(r) | {"answer": parse(r.completion).answer} | {f"rewards/{name}": v for name, v in r.rewards.items()}
        for r in rollouts
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(kinds.items()))), buffer)
    write_bytes(rollout_file(run_dir, step), buffer.getvalue())


def truncate_rollouts(run_dir: RunDir, step: int) -> None:
    """Delete the rollouts of steps after `step`: a resumed run makes them again."""
    for file in run_dir.rollouts.glob("step-*.parquet"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()


def truncate_lines(path: Path, step: int) -> None:
    """Delete the lines of steps above `step` from a JSONL file, the partial line that a killed run left, and damaged
    lines, each with a warning that names it."""
    if not path.is_file():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(True), 1):
        try:
            document = parse_json(line)
            json.dumps(document, allow_nan=False)
            if type(document["step"]) is not int:
                raise ValueError
            if document["step"] <= step:
                kept.append(document)
        except (ValueError, RecursionError, TypeError, KeyError):
            if line.endswith(b"\n"):
                console.warn(f"{path}, line {number} is damaged: it is left out")
    write_text(path, "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in kept))


def update_summary(run_dir: RunDir, fields: dict) -> dict:
    """Merge `fields` into summary.json, dicts in dicts too, and return all of it."""
    summary = _merged(read_json(run_dir.summary) if run_dir.summary.is_file() else {}, fields)
    write_json(run_dir.summary, summary)
    return summary


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def summarise_metrics(run_dir: RunDir) -> dict:
    """Figures of metrics.jsonl for the summary; `judge`: totals of what the judge counted.

    {first, last}: means over the first and the last tenth of the logged steps, since one step's mean is noise.
    """
    lines = [d for _, d in read_jsonl(run_dir.metrics) if "loss" in d] if run_dir.metrics.is_file() else []
    if not lines:
        return {"steps": 0}
    window = max(1, len(lines) // 10)

    def ends(key: str) -> dict[str, float | None]:
        values = [d.get(key) for d in lines]
        return {"first": _mean(values[:window]), "last": _mean(values[-window:])}

    names = sorted({k for d in lines for k in d if k.startswith("rewards/") and k.endswith("/mean")})
    totals: Counter[str] = Counter()
    for key, value in (item for d in lines for item in d.items()):
        if key.startswith("judge/") and "latency" not in key and _is_figure(value):
            totals[key.removeprefix("judge/")] += value
    summary = {
        "steps": lines[-1]["step"],
        "reward": ends("reward") | {"steps_averaged": window},
        "format_rate": ends("rewards/format/mean"),
        "loss": ends("loss"),
        "rewards": {name.split("/")[1]: ends(name) for name in names},
        "completion_length": ends("completions/mean_length"),
        "step_time_mean": _mean([d.get("step_time") for d in lines]),
    }
    return summary | ({"judge": dict(totals)} if totals else {})


def _is_figure(value: Any) -> bool:
    """Whether it is a number to count with: people edit these files."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _mean(values: list[float | None]) -> float | None:
    numbers = [v for v in values if v is not None and _is_figure(v)]
    return sum(numbers) / len(numbers) if numbers else None
